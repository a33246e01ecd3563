"""Ulysses attention (Jacobs et al. 2023, arXiv 2309.14509): exchange a part of the sequence for a part of the heads.

Per layer and training step four all-to-alls: of queries, keys and values together, of the output, and of their
gradients. In between each device holds the whole sequence of `H/N` heads.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lss_jax.attention.collectives import after, stacked
from lss_jax.attention.kernels import KERNELS
from lss_jax.attention.kernels.blockwise import blocks_of_keys
from lss_jax.attention.kernels.interface import Attended, Output, Queries, Residuals, cotangent_of_output
from lss_jax.attention.mask import Intervals
from lss_jax.attention.pairs import of_whole_sequence
from lss_jax.attention.setting import Setting, at_precision
from lss_jax.attention.strategy import (
    InKernel,
    Local,
    Shards,
    Shown,
    Strategy,
    masks_of_devices,
    refuses_nothing,
)
from lss_jax.attention.traffic import Sizes, Traffic
from lss_jax.config.rules import next_multiple
from lss_jax.config.schema import AttentionConfig
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.residuals import ATTENDED, COMMUNICATED


def ulysses_attention(local: Local, setting: Setting) -> jax.Array | Attended:
    """This segment's attention `o_BlHK`, inside `shard_map` over `setting.axis`.

    `local.mask` is that of the whole sequence in natural order, from `whole_mask`. `N` must divide `H`. Where it does
    not divide `G`, each key/value head travels as often as it takes for every device to get those of its query heads.
    """
    N, (_, l, H, _), G = setting.layout.devices, local.q_BlHK.shape, local.k_BlGK.shape[2]
    k_BlgK, v_BlgK = (jnp.repeat(x_BlGK, math.lcm(G, N) // G, axis=2) for x_BlGK in (local.k_BlGK, local.v_BlGK))
    pair_dropout = None
    if local.dropout is not None:
        here = jax.lax.axis_index(setting.axis) if setting.axis else 0
        of_whole = local.dropout._replace(position_l=jnp.arange(l * N))
        pair_dropout = of_whole.of_heads(here * (H // N) + jnp.arange(H // N))
    pairs = local.pairs and of_whole_sequence(local.pairs, setting, l)
    return _exchanged(Queries(local.q_BlHK, local.mask, pair_dropout, pairs), k_BlgK, v_BlgK, setting)


def traffic(sizes: Sizes, setting: Setting) -> dict[str, list[Traffic]]:
    """What one layer moves."""
    G = math.lcm(sizes.G, setting.layout.devices)
    queries, pairs = sizes.B * sizes.l * sizes.H * sizes.K, 2 * sizes.B * sizes.s * G * sizes.K
    inward, outward = (Traffic("all-to-all", 1, numbers, sizes.itemsize) for numbers in (queries + pairs, queries))
    again = [inward] if setting.regather else []
    return {"forward": [inward, outward], "backward": [*again, outward, inward]}


def whole_mask(mask: Intervals, setting: Setting) -> Intervals:
    """The intervals of all queries in natural order: once per step, for all layers."""
    if setting.axis is None:
        return mask
    stacked_N2l = jax.lax.all_gather(jnp.stack(mask), setting.axis)
    return Intervals(*setting.layout.natural(stacked_N2l, stacked_N2l.ndim - 1))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchanged(queries: Queries, k_BlgK: jax.Array, v_BlgK: jax.Array, setting: Setting) -> jax.Array | Attended:
    """`queries` are this segment's, all heads; what goes with them is the whole sequence's, this device's heads."""
    return _forward(queries, k_BlgK, v_BlgK, setting)[0]


@at_precision
def _forward(queries, k_BlgK, v_BlgK, setting):
    exchanged, kv_12BhLK = _exchange(queries, k_BlgK, v_BlgK, setting)
    output = KERNELS[setting.kernel].forward(exchanged, kv_12BhLK, setting.unsharded)
    o_BlHK = checkpoint_name(_to_sequence((output.o_BlHK,), setting)[0], ATTENDED)
    lse_BlH = None if output.lse_BlH is None else _to_sequence((output.lse_BlH[..., None],), setting)[0][..., 0]
    own = (queries, k_BlgK, v_BlgK) if setting.regather else None
    return Output(o_BlHK, output.lse, lse_BlH).given, (own, None if own else (exchanged, kv_12BhLK), output)


@at_precision
def _backward(setting, saved, cotangent):
    own, exchanged, output = saved
    do_BlHK = cotangent_of_output(cotangent)
    if own:  # not before they are needed
        queries, k_BlgK, v_BlgK = own
        queries = queries._replace(q_BlHK=after(do_BlHK, queries.q_BlHK))
        exchanged = _exchange(queries, k_BlgK, v_BlgK, setting)
    do_BLhK = _to_heads((do_BlHK,), setting)[0]
    residuals = Residuals(exchanged[0], exchanged[1], output)
    dqueries, dkv_12BhKL = KERNELS[setting.kernel].backward(residuals, do_BLhK, setting.unsharded)
    dk_BLhK, dv_BLhK = dkv_12BhKL[0].astype(do_BlHK.dtype).transpose(0, 1, 4, 2, 3)
    dq_BlHK, dk_BlgK, dv_BlgK = _to_sequence((dqueries.q_BlHK, dk_BLhK, dv_BLhK), setting)
    return dqueries._replace(q_BlHK=dq_BlHK), dk_BlgK, dv_BlgK


_exchanged.defvjp(_forward, _backward)


def _exchange(queries: Queries, k_BlgK: jax.Array, v_BlgK: jax.Array, setting: Setting) -> tuple[Queries, jax.Array]:
    """Queries, keys and values of the whole sequence, of this device's heads."""
    q_BLhK, k_BLhK, v_BLhK = checkpoint_name(_to_heads((queries.q_BlHK, k_BlgK, v_BlgK), setting), COMMUNICATED)
    return queries._replace(q_BlHK=q_BLhK), stacked(k_BLhK, v_BLhK)[None]


def _to_heads(arrays_BlHK: tuple[jax.Array, ...], setting: Setting) -> tuple[jax.Array, ...]:
    """Segments of all heads to the whole sequence (natural order) of this device's heads, in one collective.

    The first array is of the queries' tokens; the others are keys and values, of a length and a layout of their own.
    """
    if setting.axis is None:
        return arrays_BlHK
    N = setting.layout.devices
    by_head = [x.reshape(*x.shape[:2], N, -1, x.shape[3]) for x in arrays_BlHK]
    received = _sent([jnp.moveaxis(x_BlNhK, 2, 0) for x_BlNhK in by_head], setting)  # to each device its heads
    return tuple(layout.natural(x_NBlhK, 2) for x_NBlhK, layout in _with_layouts(received, setting))


def _to_sequence(arrays_BLhK: tuple[jax.Array, ...], setting: Setting) -> tuple[jax.Array, ...]:
    """The inverse of `_to_heads`."""
    if setting.axis is None:
        return arrays_BLhK
    by_segment = [layout.segments(x_BLhK, 1) for x_BLhK, layout in _with_layouts(arrays_BLhK, setting)]
    received = [jnp.moveaxis(x_NBlhK, 0, 2) for x_NBlhK in _sent(by_segment, setting)]  # to each device its segment
    return tuple(x_BlNhK.reshape(*x_BlNhK.shape[:2], -1, x_BlNhK.shape[4]) for x_BlNhK in received)


def _with_layouts(arrays: Sequence[jax.Array], setting: Setting) -> Iterator[tuple[jax.Array, Layout]]:
    """The queries with their layout, then keys and values, if they are there, with theirs."""
    return zip(arrays, (setting.layout, setting.key_layout, setting.key_layout), strict=False)


def _sent(arrays_NBlhK: Sequence[jax.Array], setting: Setting) -> list[jax.Array]:
    """Exchanges arrays of any lengths in one all-to-all: entry `i` of each goes to device `i`."""
    rows_NrK = [x.reshape(len(x), -1, x.shape[-1]) for x in arrays_NBlhK]
    out_NrK = jnp.concatenate(rows_NrK, axis=1)
    in_NrK = jax.lax.all_to_all(out_NrK, setting.axis, split_axis=0, concat_axis=0, tiled=True)
    ends = list(itertools.accumulate(rows.shape[1] for rows in rows_NrK))
    parts = jnp.split(in_NrK, ends[:-1], axis=1)
    return [part.reshape(x.shape) for part, x in zip(parts, arrays_NBlhK, strict=True)]


def _problems(attention: AttentionConfig, shards: Shards) -> Iterator[str]:
    """Every device computes equally many heads of each group."""
    heads, _, seq, model = shards
    groups = max(attention.head_groups, 1)
    if heads % (seq * model * groups):
        by = f"mesh.seq={seq}" + (f" times mesh.model={model}" if model > 1 else "")
        by += f" times attention.head_groups={groups}" if groups > 1 else ""
        yield (
            f'model.heads={heads} is not divisible by {by}, which attention.strategy="ulysses" needs; '
            f'use model.heads={next_multiple(heads, seq * model * groups)} or attention.strategy="lss"'
        )


def _whole_sequence(shown: Shown, sizes: Sizes, setting: Setting) -> InKernel:
    """A kernel computes the whole sequence of some heads."""
    N = setting.layout.devices
    whole = dataclasses.replace(sizes, l=sizes.l * N, s=sizes.s * N, H=sizes.H // N, G=max(sizes.G // N, 1))
    return InKernel(whole, setting.unsharded, masks_of_devices(shown, whole.l, setting.unsharded.layout))


ULYSSES = Strategy(
    exact=True,
    defined_by=(),
    attention=ulysses_attention,
    traffic=traffic,
    whole_mask=whole_mask,
    kernels=tuple(KERNELS),
    options=("regather",),
    problems=_problems,
    refuses=refuses_nothing,
    own_window=False,
    in_kernel=_whole_sequence,
    recomputed=lambda setting: (setting.regather, setting.regather),
    key_blocks=blocks_of_keys,
    operations=None,
)
