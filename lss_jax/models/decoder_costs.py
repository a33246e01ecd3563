"""What a training step of the decoder sends and computes outside attention."""

from collections.abc import Iterator

from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.traffic import Traffic, sizes_of
from lss_jax.config.schema import Config
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import REGIONS


def traffic(config: Config, mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, Traffic]]:
    """Tensor parallelism: per layer and microbatch a gather and a scatter for each of attention and MLP, in each pass.

    With remat both re-gather in the backward pass. With a sharded vocabulary the embeddings are scattered, and the
    head's input is gathered, once per microbatch.
    """
    sizes, layers = sizes_of(config, mesh), config.model.layers
    segment = sizes.B * sizes.l * config.model.width
    part = segment // mesh.shape[MODEL]
    regathers, ends = 2 * (config.model.remat == "block"), int(config.model.vocab_parallel)
    for direction, kind, times, elements in (
        ("forward", "all-gather", 2 * layers + ends, segment),
        ("forward", "reduce-scatter", 2 * layers + ends, part),
        ("backward", "all-gather", (2 + regathers) * layers + ends, segment),
        ("backward", "reduce-scatter", 2 * layers + ends, part),
    ):
        yield f"{REGIONS} {direction}", Traffic(kind, times * config.optim.accumulate, elements, sizes.itemsize)


def products(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Operations of projections, MLPs and head, per device: one product forward, two backward.

    With remat the forward products are recomputed, except a block's last one, whose result the backward pass does not
    need, and attention's output projection where a model group saves its sum.
    """
    sizes, parts = sizes_of(config, mesh), mesh.shape[MODEL]
    E, F, V = config.model.width, config.model.mlp_width // parts, config.model.vocab // parts
    heads, out, mlp = E * sizes.K * (sizes.H + 2 * sizes.G), E * sizes.K * sizes.H, E * F
    layer = 3 * (heads + out + 2 * mlp)
    if config.model.remat == "block":
        layer += heads + mlp + (out if parts == 1 else 0)
    tokens = config.optim.accumulate * sizes.B * sizes.l
    return 2 * tokens * (config.model.layers * layer + 3 * E * V)
