"""LSS attention (arXiv 2311.02382, Sec. 3): each device computes its own rows, nobody ever aggregates them.

Two collectives per layer and training step: one gather of keys and values on the way forward, one scatter of their
gradients on the way back. Nvidia's sequence parallelism needs eight.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import COMMUNICATED, Setting, Sizes, Traffic, stacked
from lss_jax.dropout import Dropout, PairDropout


def lss_attention(
    q_BlHK: jax.Array, k_BlGK: jax.Array, v_BlGK: jax.Array, mask: Intervals, dropout: Dropout | None, setting: Setting
) -> jax.Array:
    """This segment's rows of attention, `o_BlHK`, from local `q, k, v`, inside `shard_map` over `setting.axis`.

    The key/value heads travel in `gather_groups` groups, with one collective each: while one group's rows are computed
    the next group may travel. A group starts when the one before the last is done, so that two are held at a time; on
    the way back the same holds in reverse.
    """
    heads, groups = q_BlHK.shape[2], setting.gather_groups
    q_of_group = jnp.split(q_BlHK, groups, axis=2)
    kv_of_group = jnp.split(stacked(k_BlGK, v_BlGK), groups, axis=2)
    head_of_group = jnp.split(jnp.arange(heads), groups)
    rows: list[jax.Array] = []
    for group, (q, kv, head) in enumerate(zip(q_of_group, kv_of_group, head_of_group, strict=True)):
        if group >= 2:
            kv, rows[group - 2] = jax.lax.optimization_barrier((kv, rows[group - 2]))
        rows.append(own_rows(q, kv, mask, dropout and dropout.of_heads(head), setting))
    return jnp.concatenate(rows, axis=2)


def traffic(sizes: Sizes, setting: Setting, regather: bool) -> dict[str, list[Traffic]]:
    """What one layer moves: gradients travel in float32, so that the sum over devices rounds once."""
    N, groups = setting.layout.devices, setting.gather_groups
    gather = Traffic("all-gather", groups, N * sizes.pair // groups * sizes.itemsize)
    scatter = Traffic("reduce-scatter", groups, sizes.pair // groups * 4)
    return {"forward": [gather], "backward": [gather, scatter] if regather else [scatter]}


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def own_rows(
    q_BlHK: jax.Array, kv_2BGlK: jax.Array, mask: Intervals, dropout: PairDropout | None, setting: Setting
) -> jax.Array:
    """`l` queries against all `L` keys: `o_BlHK`."""
    return _forward(q_BlHK, kv_2BGlK, mask, dropout, setting)[0]


def _forward(q_BlHK, kv_2BGlK, mask, dropout, setting):
    kv_N2BGlK = kv_2BGlK[None]
    if setting.axis:
        kv_N2BGlK = jax.lax.all_gather(kv_2BGlK, setting.axis)  # every query needs every key
    kv_N2BGlK = checkpoint_name(kv_N2BGlK, COMMUNICATED)
    return KERNELS[setting.kernel].forward(q_BlHK, kv_N2BGlK, mask, dropout, setting)


def _backward(setting, saved, do_BlHK):
    dq_BlHK, dkv_N2BGKl = KERNELS[setting.kernel].backward(saved, do_BlHK, setting)
    dkv_2BGKl = dkv_N2BGKl[0]
    if setting.axis:
        # Every device holds its rows' share of all gradients: the sum over devices, each keeping its own segment.
        dkv_2BGKl = jax.lax.psum_scatter(dkv_N2BGKl, setting.axis)
    return dq_BlHK, dkv_2BGKl.swapaxes(3, 4).astype(do_BlHK.dtype), None, None


own_rows.defvjp(_forward, _backward)
