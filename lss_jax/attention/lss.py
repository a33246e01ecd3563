"""LSS attention (arXiv 2311.02382, Sec. 3): each device attends from its own segment, and nobody aggregates the output.

Two collectives per layer and training step: one gather of keys and values in the forward pass, one scatter of their
gradients in the backward pass. Nvidia's sequence parallelism needs eight.

Where the mask shows a narrow window alone, each device fetches its neighbours instead (`nearby`).
"""

import jax
import jax.numpy as jnp

from lss_jax.attention import nearby
from lss_jax.attention.collectives import all_gather, psum_scatter, stacked
from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.kernels.interface import Attended, Queries, Residuals
from lss_jax.attention.nearby import runs_of
from lss_jax.attention.saved import Passes, differentiable
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategy import Local
from lss_jax.attention.traffic import Sizes, Traffic


def forward(queries: Queries, kv_2BGlK: jax.Array, setting: Setting) -> Residuals:
    """This segment's `l` queries attend to all keys: of their own sequence, or of another one."""
    kv_N2BGlK = all_gather(kv_2BGlK, setting.axis)  # Sec. 3: every query needs every key
    output = KERNELS[setting.kernel].forward(queries, kv_N2BGlK, setting)  # stays on this device
    return Residuals(queries, kv_N2BGlK, output)


def backward(saved: Residuals, do_BlHK: jax.Array, setting: Setting) -> tuple[Queries, jax.Array]:
    """The gradients of this segment's queries, and of its keys and values."""
    dqueries, dkv_N2BGKl = KERNELS[setting.kernel].backward(saved, do_BlHK, setting)  # partial sums, for all segments
    dkv_2BGKl = psum_scatter(dkv_N2BGKl, setting.axis)  # each device keeps the finished gradient of its own segment
    return dqueries, dkv_2BGKl


GATHERED = Passes(forward, backward, lambda kv_2BGlK, setting: all_gather(kv_2BGlK, setting.axis))
NEARBY = Passes(nearby.forward, nearby.backward, nearby.fetch)


def lss_attention(local: Local, setting: Setting) -> jax.Array | Attended:
    """This segment's attention `o_BlHK`, inside `shard_map` over `setting.axis`."""
    dropout = local.dropout and local.dropout.of_heads(jnp.arange(local.q_BlHK.shape[2]))
    queries = Queries(local.q_BlHK, local.mask, dropout, local.pairs)
    narrow = local.pairs is None and runs_of(local.k_BlGK.shape[1], setting)
    passes = NEARBY if narrow else GATHERED
    return differentiable(queries, stacked(local.k_BlGK, local.v_BlGK), passes, setting)


def traffic(sizes: Sizes, setting: Setting) -> dict[str, list[Traffic]]:
    """What one layer moves: gradients travel in float32, so that the sum over devices rounds once."""
    runs = runs_of(sizes.s, setting)
    if runs:
        there, back = (list(nearby.sends(runs, sizes.pair // sizes.s, size)) for size in (sizes.itemsize, 4))
        return {"forward": there, "backward": [*there, *back] if setting.regather else back}
    gather = Traffic("all-gather", 1, setting.layout.devices * sizes.pair, sizes.itemsize)
    scatter = Traffic("reduce-scatter", 1, sizes.pair, 4)
    return {"forward": [gather], "backward": [gather, scatter] if setting.regather else [scatter]}
