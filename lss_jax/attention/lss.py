"""LSS attention (arXiv 2311.02382, Sec. 3): each device computes its own rows, nobody ever aggregates them.

Two collectives per layer and training step: one gather of keys and values on the way forward, one scatter of their
gradients on the way back. Nvidia's sequence parallelism needs eight.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import COMMUNICATED, Setting, after, stacked
from lss_jax.attention.traffic import Sizes, Traffic
from lss_jax.parallel.dropout import Dropout, PairDropout


def lss_attention(
    q_BlHK: jax.Array, k_BlGK: jax.Array, v_BlGK: jax.Array, mask: Intervals, dropout: Dropout | None, setting: Setting
) -> jax.Array:
    """This segment's rows of attention, `o_BlHK`, from local `q, k, v`, inside `shard_map` over `setting.axis`.

    The key/value heads travel in `gather_groups` groups (the paper: one), with one collective each: while the rows of
    one are computed the keys and values of the next may travel, so that two groups are held. On the way back the rows
    of a group wait for those before, so that dense scores are of one group, and for their scatter: of scatters that do
    not wait XLA makes one for TPUs, which holds both.
    """
    return _own_rows(q_BlHK, stacked(k_BlGK, v_BlGK), mask, dropout, setting)


def traffic(sizes: Sizes, setting: Setting) -> dict[str, list[Traffic]]:
    """What one layer moves: gradients travel in float32, so that the sum over devices rounds once."""
    N, groups = setting.layout.devices, setting.gather_groups
    gather = Traffic("all-gather", groups, N * sizes.pair // groups, sizes.itemsize)
    scatter = Traffic("reduce-scatter", groups, sizes.pair // groups, 4)
    return {"forward": [gather], "backward": [gather, scatter] if setting.regather else [scatter]}


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _own_rows(
    q_BlHK: jax.Array, kv_2BGlK: jax.Array, mask: Intervals, dropout: Dropout | None, setting: Setting
) -> jax.Array:
    """`l` queries against all `L` keys."""
    return _forward(q_BlHK, kv_2BGlK, mask, dropout, setting)[0]


def _forward(q_BlHK, kv_2BGlK, mask, dropout, setting):
    kernel = KERNELS[setting.kernel]
    rows: list[jax.Array] = []
    saved = []
    for group, (q, kv, pair_dropout) in enumerate(_groups(q_BlHK, kv_2BGlK, dropout, setting)):
        if group >= 2:
            kv = after(rows[group - 2], kv)
        kv_N2BGlK = _gathered(kv, setting)
        o, kept = kernel.forward(q, kv_N2BGlK, mask, pair_dropout, setting)
        rows.append(o)
        saved.append((kept, None if setting.regather else kv_N2BGlK))
    o_BlHK = jnp.concatenate(rows, axis=2)
    return o_BlHK, (q_BlHK, kv_2BGlK, mask, dropout, o_BlHK, saved)


def _backward(setting, residuals, do_BlHK):
    q_BlHK, kv_2BGlK, mask, dropout, o_BlHK, saved = residuals
    kernel = KERNELS[setting.kernel]
    dq: list[jax.Array] = []
    dkv: list[jax.Array] = []
    o_and_do = zip(*(jnp.split(x, setting.gather_groups, axis=2) for x in (o_BlHK, do_BlHK)), strict=True)
    groups = zip(_groups(q_BlHK, kv_2BGlK, dropout, setting), o_and_do, saved, strict=True)
    for group, ((q, kv, pair_dropout), (o, do), (kept, kv_N2BGlK)) in enumerate(groups):
        if setting.regather:
            kv_N2BGlK = _gathered(after(dkv[group - 2] if group >= 2 else do, kv), setting)
        if group:
            do = after(dq[-1], after(dkv[-1], do))
        dq_of_group, dkv_N2BGKl = kernel.backward(q, kv_N2BGlK, mask, pair_dropout, o, kept, do, setting)
        dq.append(dq_of_group)
        dkv.append(_scattered(dkv_N2BGKl, setting).swapaxes(3, 4).astype(kv.dtype))
    return jnp.concatenate(dq, axis=2), jnp.concatenate(dkv, axis=2), None, None


_own_rows.defvjp(_forward, _backward)


def _gathered(kv_2BGlK: jax.Array, setting: Setting) -> jax.Array:
    """Every query needs every key: all segments' keys and values, `kv_N2BGlK`."""
    if setting.axis is None:
        return kv_2BGlK[None]
    return checkpoint_name(jax.lax.all_gather(kv_2BGlK, setting.axis), COMMUNICATED)


def _scattered(dkv_N2BGKl: jax.Array, setting: Setting) -> jax.Array:
    """Every device has its rows' share of all gradients: the sum over devices, each keeping its own segment.

    A segment travels as one vector: of arrays TPUs would cut padded tiles, and mend the borders afterwards.
    """
    if setting.axis is None:
        return dkv_N2BGKl[0]
    N, *segment = dkv_N2BGKl.shape
    return jax.lax.psum_scatter(dkv_N2BGKl.reshape(N, -1), setting.axis).reshape(segment)


def _groups(
    q_BlHK: jax.Array, kv_2BGlK: jax.Array, dropout: Dropout | None, setting: Setting
) -> Iterator[tuple[jax.Array, jax.Array, PairDropout | None]]:
    """The queries, own keys and values, and dropout of each group of heads."""
    arrays = (q_BlHK, kv_2BGlK, jnp.arange(q_BlHK.shape[2])[None, None])  # heads on axis 2
    for q, kv, head in zip(*(jnp.split(x, setting.gather_groups, axis=2) for x in arrays), strict=True):
        yield q, kv, dropout and dropout.of_heads(head[0, 0])
