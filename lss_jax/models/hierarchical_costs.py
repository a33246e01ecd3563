"""What a training step of the hierarchy of decoders sends and computes, and what it cannot do."""

from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.setting import SELF
from lss_jax.attention.traffic import Traffic, sizes_of
from lss_jax.config.rules import MeshSizes, next_multiple
from lss_jax.config.schema import Config
from lss_jax.data.kinds import is_packed
from lss_jax.models.decoder_costs import Layers, is_tiled, products_of_layers
from lss_jax.models.family import AttentionLayers, Trained
from lss_jax.models.hierarchical import global_config, local_config
from lss_jax.parallel.layout import CHUNKS_PER_DEVICE, SEQUENCE, layout_on
from lss_jax.parallel.mesh import DATA, SEQ, abstract_mesh
from lss_jax.parallel.scopes import ATTENTION, PATCHES


def attentions(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> list[AttentionLayers]:
    """Over patches on the mesh, and within patches, each of which is a sequence of its own on one device."""
    rows = config.data.batch_size * layout_on(config, mesh).padded(config.data.seq_len) // config.model.patch
    local, alone = local_config(config, rows), abstract_mesh((mesh.shape[DATA] * mesh.shape[SEQ], 1, 1))
    reached = reaches_layers(trained, "stack")
    return [
        AttentionLayers(global_config(config), mesh, SELF, ATTENTION, reached),
        AttentionLayers(local, alone, SELF, ATTENTION, reached),
    ]


def exchanges(config: Config, mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, Traffic]]:
    """The tokens of a patch, from each chunk to the one behind it."""
    times = config.optim.accumulate * CHUNKS_PER_DEVICE[config.attention.layout]
    yield PATCHES, Traffic("collective-permute", times, sizes_of(config, mesh).B * config.model.patch, 4)


def traffic(_config: Config, _mesh: Mesh | AbstractMesh, _trained: Trained) -> Iterator[tuple[str, Traffic]]:
    """Nothing over `model`, which shards no hierarchy."""
    yield from ()


def reaches_layers(trained: Trained, _stack: str) -> bool:
    """Whether the backward pass goes through the layers: all are trained."""
    return any(jax.tree.leaves(trained))


def products(config: Config, mesh: Mesh | AbstractMesh, trained: Trained) -> int:
    """Operations of projections, MLPs, the map from the global to the local decoder, and the head, per device."""
    model, sizes, total = config.model, sizes_of(config, mesh), 0
    for layers, stack in zip(attentions(config, mesh, trained), ("stack", "local_stack"), strict=True):
        of_stack = Layers(SEQUENCE, layers.config.model.layers, True, False, trained[stack]["blocks"])
        total += products_of_layers(layers.config, layers.mesh, of_stack)
    to_local = 3 * model.width // model.patch * model.local_width
    of_head = (3 + is_tiled(config, mesh)) * model.local_width * model.vocab
    return total + 2 * config.optim.accumulate * sizes.B * sizes.l * (to_local + of_head)


def problems(config: Config, sizes: MeshSizes | None) -> Iterator[str]:
    """What a hierarchy needs, and what it cannot do, a line each."""
    model, name = config.model, f"model.family={config.model.family!r}"
    needed = {key: getattr(model, key) for key in ("patch", "local_layers", "local_width")}
    for key, value in needed.items():
        if value < 1:
            yield f"model.{key}={value} must be at least 1 for {name}; see configs/base.py for what it is"
    if min(needed.values()) < 1:
        return
    if model.width % model.patch:
        yield (
            f"model.width={model.width} is not divisible by model.patch={model.patch}, each of whose tokens has an "
            f"equal part of a patch's embedding; use model.width={next_multiple(model.width, model.patch)}"
        )
    if model.heads > 0 and model.local_width % model.heads:
        yield (
            f"model.local_width={model.local_width} is not divisible by model.heads={model.heads}; "
            f"use model.local_width={next_multiple(model.local_width, model.heads)}"
        )
    elif model.heads > 0 and model.positions == "rope" and model.local_width // model.heads % 2:
        yield (
            f"model.local_width={model.local_width} makes heads of odd width {model.local_width // model.heads}, but "
            f"rope rotates pairs; use model.local_width={next_multiple(model.local_width, 2 * model.heads)}"
        )
    yield from _cannot(config, name)
    if sizes is None:
        return
    if sizes[2] > 1:
        yield f"mesh.model={sizes[2]} shards what {name} keeps whole; use mesh.model=1 and more of mesh.seq"
    yield from _chunk_problems(config, sizes)


def _cannot(config: Config, name: str) -> Iterator[str]:
    """Options that a hierarchy has no use for, with those that turn them off."""
    model, attention = config.model, config.attention
    unused = {
        "attention.window": (attention.window, 0, "see a token through its patch alone"),
        "attention.prefix": (attention.prefix, 0, "predict all tokens"),
        "model.dropout": (model.dropout, 0.0, "drop nothing"),
        "model.remat_every": (model.remat_every, 1, "differ in their number of layers"),
        "optim.frozen": (config.optim.frozen, "", "are trained as a whole"),
        "lora.rank": (config.lora.rank, 0, "are trained as a whole"),
        "optim.offload": (config.optim.offload, False, "rest on the devices"),
        "data.restart_positions": (config.data.restart_positions, False, "count positions from the start of a window"),
    }
    for key, (value, off, why) in unused.items():
        if value != off:
            yield f"{key}={value!r} has no use with {name}, whose decoders {why}; use {key}={off!r}"
    if model.remat == "offload":
        yield f'model.remat="offload" has no use with {name}, whose layers wait on the devices; use model.remat="input"'
    if is_packed(config.data) and config.data.pack:
        yield (
            f"data.pack=True makes windows of several documents, and with {name} a patch of two would see both; use "
            f'data.pack=False, data that is one document, or model.family="decoder"'
        )


def _chunk_problems(config: Config, sizes: MeshSizes) -> Iterator[str]:
    """Chunks are whole patches."""
    patch, L, chunks = config.model.patch, config.data.seq_len, sizes[1] * CHUNKS_PER_DEVICE[config.attention.layout]
    chunk = -(-L // chunks)
    if chunk % patch:
        yield (
            f"data.seq_len={L} in {chunks} chunks (mesh.seq={sizes[1]}, attention.layout={config.attention.layout!r}) "
            f"is {chunk} tokens each, which are not whole patches of model.patch={patch}; "
            f"use data.seq_len={next_multiple(L, patch * chunks)}"
        )
