"""What a training step of a transformer sends and computes outside attention: in layers, embedding and head."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.placement import setting_on
from lss_jax.attention.setting import CROSS, SELF, Between
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.traffic import Traffic, sizes_of
from lss_jax.config.schema import Config
from lss_jax.models.family import AttentionLayers, Trained
from lss_jax.models.layers import ADAPTER
from lss_jax.models.stack import repeats
from lss_jax.models.tiles import tiles_on
from lss_jax.parallel.layout import SEQUENCE
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import ATTENTION, REGIONS


class Layers(NamedTuple):
    """A stack of layers; with parameters of `cross_attention` they attend to a source too."""

    sequence: str  # whose tokens they are applied to
    depth: int
    reached: bool  # by the backward pass
    source_reached: bool  # the same of the source that they attend to
    trained: Trained  # of their blocks

    @property
    def attentions(self) -> dict[str, Between]:
        """The attentions of a layer by the names of their modules."""
        own = {"attention": Between(self.sequence, self.sequence)}
        return own | ({"cross_attention": CROSS} if "cross_attention" in self.trained else {})


def reaches_layers(trained: Trained, _stack: str) -> bool:
    """Whether the backward pass goes through the layers: where something in them, or before them, is trained."""
    return any_trained(trained, "tokens", "positions", "stack")


def any_trained(trained: Trained, *parts: str) -> bool:
    """Whether anything is trained in these parts of a model, as far as it has them."""
    return any(jax.tree.leaves([trained[part] for part in parts if part in trained]))


def attentions(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> list[AttentionLayers]:
    """The one attention of a decoder's or an encoder's layers."""
    return [AttentionLayers(config, mesh, SELF, ATTENTION, reaches_layers(trained, "stack"))]


def _layers(config: Config, trained: Trained) -> Layers:
    reached = reaches_layers(trained, "stack")
    return Layers(SEQUENCE, config.model.layers, reached, False, trained["stack"]["blocks"])


def traffic(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> Iterator[tuple[str, Traffic]]:
    """Tensor parallelism: the collectives over `model` of embedding, layers and head."""
    layers = _layers(config, trained)
    yield from traffic_of_embedding(config, mesh, SEQUENCE, trained)
    yield from traffic_of_layers(config, mesh, layers)
    yield from traffic_of_head(config, mesh, trained, layers.reached)


def products(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> int:
    """Operations of projections, MLPs, head, and the embedding of patches, per device."""
    layers = _layers(config, trained)
    of_head = products_of_head(config, mesh, trained, layers.reached)
    return products_of_layers(config, mesh, layers) + of_head + _products_of_patches(config, mesh, trained)


def traffic_of_layers(config: Config, mesh: Mesh | AbstractMesh, layers: Layers) -> Iterator[tuple[str, Traffic]]:
    """Per layer and microbatch a gather and a scatter for each attention and the MLP, in each pass.

    What is recomputed re-gathers its input, and attention, where a whole block is, scatters its output once more. The
    collectives of the MLP are split into those of the tiles. The backward pass goes as far as there is something to
    train.
    """
    model, tiles = config.model, tiles_on(config, mesh, layers.sequence)
    part = {part_of(config, mesh, layers.sequence): 1}
    remat, blocks, forward = int(model.remat != "none"), repeats(model), layers.depth
    backward = forward * layers.reached
    for name in layers.attentions:
        again = max(remat, blocks) if _needs_input(config, mesh, layers, name) else blocks
        yield from moved(config, mesh, "forward", part, gathers=forward, scatters=forward)
        gathers, scatters = backward * (1 + again), backward * (1 + blocks)
        yield from moved(config, mesh, "backward", part, gathers=gathers, scatters=scatters)
    more = max(blocks - 1, 0)  # the last block that is recomputed needs no output of its MLP
    again = max(remat, int(is_tiled(config, mesh, layers.sequence))) + more
    yield from moved(config, mesh, "forward", tiles, gathers=forward, scatters=forward)
    yield from moved(config, mesh, "backward", tiles, gathers=backward * (1 + again), scatters=backward * (1 + more))


def traffic_of_embedding(
    config: Config, mesh: Mesh | AbstractMesh, sequence: str, trained: Trained
) -> Iterator[tuple[str, Traffic]]:
    """With a sharded vocabulary the embedded tokens of a sequence are scattered, once per microbatch."""
    if config.model.vocab_parallel:
        part = {part_of(config, mesh, sequence): 1}
        yield from moved(config, mesh, "forward", part, gathers=0, scatters=1)
        yield from moved(config, mesh, "backward", part, gathers=int(trained["tokens"]["table_VE"]), scatters=0)


def traffic_of_head(
    config: Config, mesh: Mesh | AbstractMesh, trained: Trained, reached: bool
) -> Iterator[tuple[str, Traffic]]:
    """With a sharded vocabulary the head's input is gathered, tile by tile, once per microbatch."""
    if config.model.vocab_parallel and not config.model.classes:
        tiles, tiled = tiles_on(config, mesh), int(is_tiled(config, mesh))
        features = int(_reaches_features(config, mesh, trained, reached))
        yield from moved(config, mesh, "forward", tiles, gathers=1, scatters=0)
        yield from moved(config, mesh, "backward", tiles, gathers=tiled, scatters=features)


def moved(
    config: Config, mesh: Mesh | AbstractMesh, direction: str, tiles: dict[int, int], *, gathers: int, scatters: int
) -> Iterator[tuple[str, Traffic]]:
    """So many gathers and scatters of each tile: `tiles` has their sizes on one device, and how many there are."""
    sizes, times = sizes_of(config, mesh), config.optim.accumulate
    for kind, count, parts in (("all-gather", gathers, mesh.shape[MODEL]), ("reduce-scatter", scatters, 1)):
        for tokens, number in tiles.items():
            elements = sizes.B * tokens * config.model.width * parts
            yield f"{REGIONS} {direction}", Traffic(kind, times * count * number, elements, sizes.itemsize)


def _reaches_features(config: Config, mesh: Mesh | AbstractMesh, trained: Trained, reached: bool) -> bool:
    """Whether the backward pass goes through the head; in tiles the gradient of its input takes the input's place."""
    tiled = is_tiled(config, mesh) and config.model.pooling == "none"
    return reached or any(trained["final_norm"].values()) or tiled


def _needs_input(config: Config, mesh: Mesh | AbstractMesh, layers: Layers, name: str) -> bool:
    """Whether the backward pass of an attention's projections needs their input: for a gradient, or to recompute them.

    The input of cross-attention's keys and values is the source, which is there.
    """
    attention, between = layers.trained[name], layers.attentions[name]
    names = ("query", "key", "value") if between.queries == between.keys else ("query",)
    projections = (attention[projection].items() for projection in names)
    gradients = any(is_trained for items in projections for part, is_trained in items if part != "bias")
    recomputed = STRATEGIES[config.attention.strategy].recomputed(setting_on(config, mesh, between))
    return gradients or any(recomputed[: len(names)])


def part_of(config: Config, mesh: Mesh | AbstractMesh, sequence: str) -> int:
    """The tokens of a device's part of its segment."""
    return sizes_of(config, mesh, Between(sequence, sequence)).l // mesh.shape[MODEL]


def is_tiled(config: Config, mesh: Mesh | AbstractMesh, sequence: str = SEQUENCE) -> bool:
    """Whether a device computes its tokens in several tiles."""
    return part_of(config, mesh, sequence) not in tiles_on(config, mesh, sequence)


def products_of_layers(config: Config, mesh: Mesh | AbstractMesh, layers: Layers) -> int:
    """Operations of the projections and MLPs of a stack.

    A kernel has one product forward, one backward for its input, and one for its own gradient, if it is trained.
    """
    total = 0
    for one in _linears(config, mesh, layers):
        sizes = sizes_of(config, mesh, Between(one.sequence, one.sequence))
        total += sizes.B * sizes.l * _elements(one, layers, layers.trained[one.region][one.name])
    return 2 * config.optim.accumulate * layers.depth * total


def products_of_head(config: Config, mesh: Mesh | AbstractMesh, trained: Trained, reached: bool) -> int:
    """Operations of the head, whose input has a gradient if the layers are `reached`."""
    head = trained["head"]["kernel_EV"] if "head" in trained else trained["tokens"]["table_VE"]
    tiled = is_tiled(config, mesh) and config.model.pooling == "none"
    of_head = 1 + tiled + _reaches_features(config, mesh, trained, reached) + head
    return 2 * of_head * config.model.width * _logits(config, mesh)


def _products_of_patches(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> int:
    """Operations of the embedding of patches of images."""
    if not config.data.patch:
        return 0
    elements = config.data.pixels * config.model.width * (1 + trained["tokens"]["kernel_PE"])
    return 2 * config.optim.accumulate * sizes_of(config, mesh).B * part_of(config, mesh, SEQUENCE) * elements


def _logits(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """The logits that a device computes in a step."""
    model, sizes, parts = config.model, sizes_of(config, mesh), mesh.shape[MODEL]
    rows = config.optim.accumulate * sizes.B
    if model.pooling != "none":
        return rows * model.classes
    if model.vocab_parallel and not model.classes:
        return rows * sizes.l * -(-model.vocab // parts)
    return rows * sizes.l // parts * (config.data.pixels * model.classes or model.vocab)


class _Linear(NamedTuple):
    """A linear map of a layer: the elements per device of its matrices, and what the backward pass computes again."""

    region: str
    name: str
    sequence: str  # whose tokens it is applied to
    kernel: int
    lora_a: int  # as often as it is used: by every group of heads, where it is not theirs alone
    lora_b: int
    recomputed: int  # how often the whole product is
    inner: bool  # whether the adapter's inner product is, for the gradient of `lora_b`
    hoisted: int  # of `lora_a`, where JAX takes its product in one pass out of the loop over groups


def _elements(one: _Linear, layers: Layers, trained: dict[str, bool]) -> int:
    """The elements of matrices that a token is multiplied with, in both passes."""
    own = {name: getattr(one, name) for name in ("kernel", *ADAPTER) if name in trained}
    gradients = sum(elements for name, elements in own.items() if trained[name])
    to_input = layers.reached if one.sequence == layers.sequence else layers.source_reached
    products = sum(own.values()) * (1 + layers.reached * one.recomputed + to_input) + gradients
    if "lora_a" in own and layers.reached:
        products += one.lora_a * (one.inner and trained["lora_b"]) - one.hoisted
    return products


def _linears(config: Config, mesh: Mesh | AbstractMesh, layers: Layers) -> Iterator[_Linear]:
    """Yields the linear maps of a layer.

    Recomputed are: in blocks, all products but the last one of attention, where a model group saves its sum, and of the
    MLP, whose results the backward pass does not need; in groups of heads and in tiles, those that their own backward
    pass starts from.
    """
    for name, between in layers.attentions.items():
        yield from _projections(config, mesh, name, between)
    model, sequence, rank = config.model, layers.sequence, config.lora.rank
    E, F = model.width, model.mlp_width // mesh.shape[MODEL]
    again, tile_again = max(repeats(model) - 1, 0), model.remat != "none" or is_tiled(config, mesh, sequence)
    for name in ("gate", "up") if model.mlp == "swiglu" else ("up",):
        yield _Linear("mlp", name, sequence, E * F, E * rank, rank * F, again + tile_again, False, 0)
    yield _Linear("mlp", "down", sequence, F * E, F * rank, rank * E, again, tile_again, 0)


def _projections(config: Config, mesh: Mesh | AbstractMesh, region: str, between: Between) -> Iterator[_Linear]:
    """Yields the linear maps of an attention."""
    model, sizes, groups = config.model, sizes_of(config, mesh, between), config.attention.head_groups
    E, rank, remat, blocks = model.width, config.lora.rank, model.remat, repeats(model)
    in_groups = remat == "block" or groups > 1
    queries, keys = STRATEGIES[config.attention.strategy].recomputed(setting_on(config, mesh, between))
    for name, heads, projected, sequence in (
        ("query", sizes.H, queries, between.queries),
        ("key", sizes.G, keys, between.keys),
        ("value", sizes.G, keys, between.keys),
    ):
        normalized = model.qk_norm and name != "value"  # by a norm whose backward pass starts from its input
        width, tiled = heads * sizes.K, is_tiled(config, mesh, sequence)
        projected = in_groups and projected
        again = blocks + (projected + normalized if tiled else max(projected, in_groups and normalized))
        inner = tiled or (in_groups and not projected)
        hoisted = 0 if tiled or remat == "block" else E * rank * (groups - 1)
        yield _Linear(region, name, sequence, E * width, E * rank * groups, rank * width, again, inner, hoisted)
    width, sum_again = sizes.H * sizes.K, remat == "block" and mesh.shape[MODEL] == 1
    inner = groups > 1 or (remat == "block" and not sum_again)
    again, lora_b = blocks + sum_again, rank * E * groups
    yield _Linear(region, "out", between.queries, width * E, width * rank, lora_b, again, inner, 0)
