"""What a training step of a decoder or an encoder sends and computes outside attention."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.placement import setting_on
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.traffic import Traffic, sizes_of
from lss_jax.config.schema import Config
from lss_jax.models.family import Trained
from lss_jax.models.layers import ADAPTER
from lss_jax.models.stack import repeats
from lss_jax.models.tiles import tiles_on
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import REGIONS


def reaches_layers(trained: Trained) -> bool:
    """Whether the backward pass goes through the layers: where something in them, or before them, is trained."""
    return any(jax.tree.leaves([trained[part] for part in ("tokens", "positions", "stack") if part in trained]))


def _reaches_features(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> bool:
    """Whether the backward pass goes through the head; in tiles the gradient of its input takes the input's place."""
    tiled = is_tiled(config, mesh) and config.model.pooling == "none"
    return reaches_layers(trained) or any(trained["final_norm"].values()) or tiled


def traffic(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> Iterator[tuple[str, Traffic]]:
    """Tensor parallelism: per layer and microbatch a gather and a scatter for each of attention and MLP, in each pass.

    What is recomputed re-gathers its input, and attention, where a whole block is, scatters its output once more. With
    a sharded vocabulary the embeddings are scattered, and the head's input is gathered, once per microbatch. The
    collectives of MLP and head are split into those of the tiles. The backward pass goes as far as there is something
    to train.
    """
    model, sizes = config.model, sizes_of(config, mesh)
    part, tiles = sizes.l // mesh.shape[MODEL], tiles_on(config, mesh)
    token = sizes.B * model.width
    remat, blocks = int(model.remat != "none"), repeats(model)
    tiled, embeds = int(is_tiled(config, mesh)), int(model.vocab_parallel)
    head = embeds * (not model.classes)
    layers = model.layers if reaches_layers(trained) else 0  # of the backward pass
    features, embedding = int(_reaches_features(config, mesh, trained)), int(trained["tokens"]["table_VE"])
    again = max(remat, blocks) if _attention_needs_input(config, mesh, trained) else blocks
    mlp_again = max(remat, tiled) + max(blocks - 1, 0)  # the last block that is recomputed needs no output of its MLP
    for direction, kind, of_layers, of_tiles, of_head, of_embedding in (
        ("forward", "all-gather", model.layers, model.layers, 1, 0),
        ("forward", "reduce-scatter", model.layers, model.layers, 0, 1),
        ("backward", "all-gather", layers * (1 + again), layers * (1 + mlp_again), tiled, embedding),
        ("backward", "reduce-scatter", layers * (1 + blocks), layers * (1 + max(blocks - 1, 0)), features, 0),
    ):
        whole, in_tiles = of_layers + of_embedding * embeds, of_tiles + of_head * head
        for tokens, times in ((part, whole), *((size, in_tiles * count) for size, count in tiles.items())):
            elements = token * tokens * (mesh.shape[MODEL] if kind == "all-gather" else 1)
            yield f"{REGIONS} {direction}", Traffic(kind, times * config.optim.accumulate, elements, sizes.itemsize)


def _attention_needs_input(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> bool:
    """Whether the backward pass of attention's projections needs their input: for a gradient, or to recompute them."""
    attention = trained["stack"]["blocks"]["attention"]
    projections = (attention[name].items() for name in ("query", "key", "value"))
    gradients = any(is_trained for items in projections for name, is_trained in items if name != "bias")
    return gradients or any(STRATEGIES[config.attention.strategy].recomputed(setting_on(config, mesh)))


def is_tiled(config: Config, mesh: Mesh | AbstractMesh) -> bool:
    """Whether a device computes its tokens in several tiles."""
    return sizes_of(config, mesh).l // mesh.shape[MODEL] not in tiles_on(config, mesh)


def products(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> int:
    """Operations of projections, MLPs and head, per device.

    A kernel has one product forward, one backward for its input, and one for its own gradient, if it is trained.
    """
    sizes, model = sizes_of(config, mesh), config.model
    layer = layer_products(config, mesh, trained["stack"]["blocks"], reaches_layers(trained))
    tokens = config.optim.accumulate * sizes.B * sizes.l
    head = trained["head"]["kernel_EV"] if "head" in trained else trained["tokens"]["table_VE"]
    tiled = is_tiled(config, mesh) and model.pooling == "none"
    of_head = 1 + tiled + _reaches_features(config, mesh, trained) + head
    return 2 * (tokens * model.layers * layer + of_head * model.width * _logits(config, mesh))


def layer_products(config: Config, mesh: Mesh | AbstractMesh, trained: Trained, reached: bool) -> int:
    """The elements of all matrices of a layer that a token is multiplied with, in both passes."""
    return sum(_elements(one, reached, trained[one.region][one.name]) for one in _linears(config, mesh))


def _logits(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """The logits that a device computes in a step."""
    model, sizes, parts = config.model, sizes_of(config, mesh), mesh.shape[MODEL]
    rows = config.optim.accumulate * sizes.B
    if model.pooling != "none":
        return rows * model.classes
    if model.vocab_parallel and not model.classes:
        return rows * sizes.l * -(-model.vocab // parts)
    return rows * sizes.l // parts * (model.classes or model.vocab)


class _Linear(NamedTuple):
    """A linear map of a layer: the elements per device of its matrices, and what the backward pass computes again."""

    region: str
    name: str
    kernel: int
    lora_a: int  # as often as it is used: by every group of heads, where it is not theirs alone
    lora_b: int
    recomputed: int  # how often the whole product is
    inner: bool  # whether the adapter's inner product is, for the gradient of `lora_b`
    hoisted: int  # of `lora_a`, where JAX takes its product in one pass out of the loop over groups


def _elements(one: _Linear, reached: bool, trained: dict[str, bool]) -> int:
    """The elements of matrices that a token is multiplied with, in both passes."""
    own = {name: getattr(one, name) for name in ("kernel", *ADAPTER) if name in trained}
    gradients = sum(elements for name, elements in own.items() if trained[name])
    products = sum(own.values()) * (1 + reached * (1 + one.recomputed)) + gradients
    if "lora_a" in own and reached:
        products += one.lora_a * (one.inner and trained["lora_b"]) - one.hoisted
    return products


def _linears(config: Config, mesh: Mesh | AbstractMesh) -> Iterator[_Linear]:
    """Yields the linear maps of a layer.

    Recomputed are: in blocks, all products but the last one of attention, where a model group saves its sum, and of the
    MLP, whose results the backward pass does not need; in groups of heads and in tiles, those that their own backward
    pass starts from.
    """
    model, sizes, parts = config.model, sizes_of(config, mesh), mesh.shape[MODEL]
    E, F, rank, groups = model.width, model.mlp_width // parts, config.lora.rank, config.attention.head_groups
    remat, tiled, blocks = model.remat, is_tiled(config, mesh), repeats(model)
    in_groups = remat == "block" or groups > 1
    queries, keys = STRATEGIES[config.attention.strategy].recomputed(setting_on(config, mesh))
    for name, heads, projected in (("query", sizes.H, queries), ("key", sizes.G, keys), ("value", sizes.G, keys)):
        normalized = model.qk_norm and name != "value"  # by a norm whose backward pass starts from its input
        width = heads * sizes.K
        projected = in_groups and projected
        again = blocks + (projected + normalized if tiled else max(projected, in_groups and normalized))
        inner = tiled or (in_groups and not projected)
        hoisted = 0 if tiled or remat == "block" else E * rank * (groups - 1)
        yield _Linear("attention", name, E * width, E * rank * groups, rank * width, again, inner, hoisted)
    width, sum_again = sizes.H * sizes.K, remat == "block" and parts == 1
    inner = groups > 1 or (remat == "block" and not sum_again)
    yield _Linear("attention", "out", width * E, width * rank, rank * E * groups, blocks + sum_again, inner, 0)
    again = max(blocks - 1, 0)
    for name in ("gate", "up") if model.mlp == "swiglu" else ("up",):
        yield _Linear("mlp", name, E * F, E * rank, rank * F, again + (remat != "none" or tiled), False, 0)
    yield _Linear("mlp", "down", F * E, F * rank, rank * E, again, remat != "none" or tiled, 0)
