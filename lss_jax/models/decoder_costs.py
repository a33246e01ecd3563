"""What a training step of the decoder sends and computes outside attention."""

from collections.abc import Iterator

from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.placement import setting_on
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.traffic import Traffic, sizes_of
from lss_jax.config.schema import Config
from lss_jax.models.stack import repeats
from lss_jax.models.tiles import tiles_on
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import REGIONS


def traffic(config: Config, mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, Traffic]]:
    """Tensor parallelism: per layer and microbatch a gather and a scatter for each of attention and MLP, in each pass.

    What is recomputed re-gathers its input, and attention, where a whole block is, scatters its output once more. With
    a sharded vocabulary the embeddings are scattered, and the head's input is gathered, once per microbatch. The
    collectives of MLP and head are split into those of the tiles.
    """
    model, sizes = config.model, sizes_of(config, mesh)
    part, tiles = sizes.l // mesh.shape[MODEL], tiles_on(config, mesh)
    token = sizes.B * model.width
    remat, blocks = int(model.remat != "none"), repeats(model)
    tiled, head = int(part not in tiles), int(model.vocab_parallel)
    mlp_again = max(remat, tiled) + max(blocks - 1, 0)  # the last block that is recomputed needs no output of its MLP
    for direction, kind, of_layers, of_tiles, of_head, of_embedding in (
        ("forward", "all-gather", 1, 1, 1, 0),
        ("forward", "reduce-scatter", 1, 1, 0, 1),
        ("backward", "all-gather", 1 + max(remat, blocks), 1 + mlp_again, tiled, 1),
        ("backward", "reduce-scatter", 1 + blocks, 1 + max(blocks - 1, 0), 1, 0),
    ):
        whole = of_layers * model.layers + of_embedding * head
        in_tiles = of_tiles * model.layers + of_head * head
        for tokens, times in ((part, whole), *((size, in_tiles * count) for size, count in tiles.items())):
            elements = token * tokens * (mesh.shape[MODEL] if kind == "all-gather" else 1)
            yield f"{REGIONS} {direction}", Traffic(kind, times * config.optim.accumulate, elements, sizes.itemsize)


def products(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Operations of projections, MLPs and head, per device: one product forward, two backward.

    Recomputed are: in blocks, all products but the last one of attention, where a model group saves its sum, and of the
    MLP, whose results the backward pass does not need; in groups of heads and in tiles, those that their own backward
    pass starts from.
    """
    model, sizes, parts = config.model, sizes_of(config, mesh), mesh.shape[MODEL]
    E, F, V = model.width, model.mlp_width // parts, -(-model.vocab // parts)
    heads, out, mlp = E * sizes.K * (sizes.H + 2 * sizes.G), E * sizes.K * sizes.H, E * F
    ins = 2 if model.mlp == "swiglu" else 1  # products before the activation
    tiled, blocks = sizes.l // parts not in tiles_on(config, mesh), repeats(model)
    layer = 3 * (heads + out + (ins + 1) * mlp)
    if model.remat == "block" and parts == 1:
        layer += out
    layer += blocks * (heads + out) + max(blocks - 1, 0) * (ins + 1) * mlp
    layer += ins * mlp if model.remat != "none" or tiled else 0
    if model.remat == "block" or config.attention.head_groups > 1:
        setting = setting_on(config, mesh)
        queries, keys = STRATEGIES[config.attention.strategy].recomputed(setting)
        layer += E * sizes.K * (queries * sizes.H + keys * 2 * sizes.G)
    tokens = config.optim.accumulate * sizes.B * sizes.l
    return 2 * tokens * (model.layers * layer + (4 if tiled else 3) * E * V)
