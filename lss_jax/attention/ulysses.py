"""Ulysses attention (Jacobs et al. 2023, arXiv 2309.14509): exchange a part of the sequence for a part of the heads.

Per layer and training step four all-to-alls: of queries, keys and values together, of the output, and of their
gradients. In between each device holds the whole sequence of `H/N` heads.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import ATTENDED, COMMUNICATED, Setting, stacked
from lss_jax.attention.traffic import Sizes, Traffic
from lss_jax.parallel.dropout import Dropout, PairDropout


def ulysses_attention(
    q_BlHK: jax.Array, k_BlGK: jax.Array, v_BlGK: jax.Array, mask: Intervals, dropout: Dropout | None, setting: Setting
) -> jax.Array:
    """This segment's rows of attention, `o_BlHK`, from local `q, k, v`, inside `shard_map` over `setting.axis`.

    `mask` is that of the whole sequence in natural order, from `whole_mask`. `N` must divide `H`. Where it does not
    divide `G`, each key/value head travels as often as it takes for every device to get those of its query heads.
    """
    copies = math.lcm(k_BlGK.shape[2], setting.layout.devices) // k_BlGK.shape[2]
    k_BlgK, v_BlgK = (jnp.repeat(x_BlGK, copies, axis=2) for x_BlGK in (k_BlGK, v_BlGK))
    pair_dropout = None
    if dropout is not None:
        here = jax.lax.axis_index(setting.axis) if setting.axis else 0
        heads = q_BlHK.shape[2] // setting.layout.devices
        length = q_BlHK.shape[1] * setting.layout.devices
        pair_dropout = dropout._replace(position_l=jnp.arange(length)).of_heads(here * heads + jnp.arange(heads))
    return _exchanged(q_BlHK, k_BlgK, v_BlgK, mask, pair_dropout, setting)


def traffic(sizes: Sizes, setting: Setting) -> dict[str, list[Traffic]]:
    """What one layer moves."""
    G = math.lcm(sizes.G, setting.layout.devices)
    head = sizes.B * sizes.l * sizes.K
    inward, outward = (Traffic("all-to-all", 1, head * heads, sizes.itemsize) for heads in (sizes.H + 2 * G, sizes.H))
    return {"forward": [inward, outward], "backward": [outward, inward]}


def whole_mask(mask: Intervals, setting: Setting) -> Intervals:
    """The intervals of all queries in natural order: once per step, for all layers."""
    if setting.axis is None:
        return mask
    stacked_N2l = jax.lax.all_gather(jnp.stack(mask), setting.axis)
    return Intervals(*setting.layout.natural(stacked_N2l, stacked_N2l.ndim - 1))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _exchanged(q_BlHK, k_BlgK, v_BlgK, mask, dropout: PairDropout | None, setting: Setting) -> jax.Array:
    return _forward(q_BlHK, k_BlgK, v_BlgK, mask, dropout, setting)[0]


def _forward(q_BlHK, k_BlgK, v_BlgK, mask, dropout, setting):
    q_BLhK, k_BLhK, v_BLhK = checkpoint_name(_to_heads((q_BlHK, k_BlgK, v_BlgK), setting), COMMUNICATED)
    kv_12BhLK = stacked(k_BLhK, v_BLhK)[None]
    o_BLhK, kept = KERNELS[setting.kernel].forward(q_BLhK, kv_12BhLK, mask, dropout, setting.uncut)
    o_BlHK = checkpoint_name(_to_sequence((o_BLhK,), setting)[0], ATTENDED)
    return o_BlHK, (q_BLhK, kv_12BhLK, mask, dropout, o_BLhK, kept)


def _backward(setting, saved, do_BlHK):
    do_BLhK = _to_heads((do_BlHK,), setting)[0]
    dq_BLhK, dkv_12BhKL = KERNELS[setting.kernel].backward(*saved, do_BLhK, setting.uncut)
    dk_BLhK, dv_BLhK = dkv_12BhKL[0].astype(do_BlHK.dtype).transpose(0, 1, 4, 2, 3)
    return *_to_sequence((dq_BLhK, dk_BLhK, dv_BLhK), setting), None, None


_exchanged.defvjp(_forward, _backward)


def _to_heads(arrays_BlHK: tuple[jax.Array, ...], setting: Setting) -> tuple[jax.Array, ...]:
    """Segments of all heads to the whole sequence (natural order) of this device's heads, in one collective."""
    if setting.axis is None:
        return arrays_BlHK
    N = setting.layout.devices
    parts = [x.reshape(*x.shape[:2], N, -1, x.shape[3]) for x in arrays_BlHK]
    out_NBlhK = jnp.moveaxis(jnp.concatenate(parts, axis=3), 2, 0)  # to each device its heads
    in_NBlhK = jax.lax.all_to_all(out_NBlhK, setting.axis, split_axis=0, concat_axis=0, tiled=True)
    return _split_heads(setting.layout.natural(in_NBlhK, 2), [part.shape[3] for part in parts])


def _to_sequence(arrays_BLhK: tuple[jax.Array, ...], setting: Setting) -> tuple[jax.Array, ...]:
    """The inverse of `_to_heads`."""
    if setting.axis is None:
        return arrays_BLhK
    out_NBlhK = setting.layout.segments(jnp.concatenate(arrays_BLhK, axis=2), 1)  # to each device its segment
    in_NBlhK = jax.lax.all_to_all(out_NBlhK, setting.axis, split_axis=0, concat_axis=0, tiled=True)
    parts = _split_heads(jnp.moveaxis(in_NBlhK, 0, 2), [x.shape[2] for x in arrays_BLhK])
    return tuple(part.reshape(*part.shape[:2], -1, part.shape[4]) for part in parts)


def _split_heads(x: jax.Array, counts: list[int]) -> tuple[jax.Array, ...]:
    ends = [sum(counts[:index]) for index in range(1, len(counts))]
    return tuple(jnp.split(x, ends, axis=-2))
