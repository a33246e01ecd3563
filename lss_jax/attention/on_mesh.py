"""Attention of global arrays on a mesh: from natural order to what strategies know, segments in theirs, and back."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.attention.head_groups import in_head_groups
from lss_jax.attention.mask import Intervals
from lss_jax.attention.pairs import QUERY_AXIS, Pairs
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import make_attend
from lss_jax.parallel.dropout import Dropout, SharedDropout
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import axes_of, named_axes, without_unsharded


class Sharded(NamedTuple):
    """The mesh axes that shard each dimension."""

    mesh: Mesh
    batch: tuple[str, ...]
    seq: str
    heads: tuple[str, ...]

    def spec(self, *dimensions: tuple[str, ...] | str) -> P:
        """The spec of an array for `shard_map`, without the axes that have one device."""
        return without_unsharded(P(*dimensions), self.mesh)


class How(NamedTuple):
    """What is known when attention is compiled."""

    sharded: Sharded
    strategy: str
    setting: Setting
    head_groups: int
    shared_dropout: bool  # the same for all rows and heads


class Dropped(NamedTuple):
    """Dropout of a call's attention weights: the rate, and a hash to tell its steps and layers apart."""

    rate: Any
    key: jax.Array


Arrays = tuple[jax.Array, jax.Array, jax.Array]  # query, key, value
Given = jax.Array | tuple[jax.Array, jax.Array]  # the output, and if the setting wants it the log-sum-exp


@partial(jax.jit, static_argnames="how")
def attention_on_mesh(arrays: Arrays, mask: Intervals, pairs: Pairs | None, dropped: Dropped | None, how: How) -> Given:
    """On the mesh, whether its axes are automatic or explicit (where types say how arrays are sharded)."""
    on_mesh = partial(_on_mesh, how=how)
    mesh, spec = jax.typeof(arrays[0]).sharding.mesh, jax.typeof(arrays[0]).sharding.spec
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    if AxisType.Explicit in mesh.axis_types:
        placed = [NamedSharding(mesh, of_result) for of_result in (spec, P(*spec[:-1]))]
        out = tuple(placed) if how.setting.scores.residual else placed[0]
        on_mesh = jax.sharding.auto_axes(on_mesh, axes=mesh.axis_names, out_sharding=out)
    return on_mesh(arrays, mask, pairs, dropped)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def in_two_programs(arrays: Arrays, mask: Intervals, pairs: Pairs | None, dropped: Dropped | None, how: How) -> Given:
    """The same under `jax.disable_jit`: each pass stays one program.

    Eagerly, every operation of every block would be a program of its own, compiled for each turn of each loop.
    """
    with jax.disable_jit(False):
        return attention_on_mesh(arrays, mask, pairs, dropped, how)


def _forward(arrays, mask, pairs, dropped, how):
    with jax.disable_jit(False):
        return jax.vjp(partial(attention_on_mesh, how=how), arrays, mask, pairs, dropped)


def _backward(how, transpose, cotangent):
    with jax.disable_jit(False):
        return transpose(cotangent)


in_two_programs.defvjp(_forward, _backward)


def _on_mesh(arrays: Arrays, mask: Intervals, pairs: Pairs | None, dropped: Dropped | None, how: How) -> Given:
    """From global arrays in natural order to what the strategies know, segments in layout order, and back."""
    sharded, shape, setting = how.sharded, arrays[0].shape, how.setting
    layout, length = setting.layout, shape[-3]
    position_L = layout.positions(layout.padded(length))
    x_spec = sharded.spec(sharded.batch, sharded.seq, sharded.heads)
    mask_spec = sharded.spec(sharded.seq) if mask.start.ndim == 1 else sharded.spec(sharded.batch, sharded.seq)
    pairs = jax.tree.map(lambda x: _padded_pairs(x, setting, length, arrays[1].shape[-3]), pairs)
    pair_specs = jax.tree.map(partial(_pair_spec, sharded), pairs)
    dropout, dropout_specs = (None, None) if dropped is None else _dropout(dropped, arrays[0].shape, position_L, how)

    @partial(
        jax.shard_map,
        mesh=Mesh(sharded.mesh.devices, sharded.mesh.axis_names),  # all axes automatic
        in_specs=((x_spec,) * 3, mask_spec, pair_specs, dropout_specs),
        out_specs=x_spec,
    )
    def on_segments(segments: Arrays, mask: Intervals, pairs: Pairs | None, dropout: Any) -> Any:
        attend = in_head_groups(make_attend(how.strategy, mask, setting), how.head_groups)
        pairs = jax.tree.map(partial(_local_pairs, x_spec, sharded.seq, layout), pairs, pair_specs)
        if isinstance(dropout, Dropout) and (names := axes_of(x_spec[2])):
            dropout = dropout._replace(first_head=jax.lax.axis_index(names) * segments[0].shape[2])
        attend = partial(attend, dropout=dropout, pairs=pairs)
        if layout.name == "contiguous":
            return attend(*segments)
        count = 3 if setting.key_layout == layout else 1  # other keys stay in natural order
        moved = _moved(segments[:count], partial(layout.from_natural, axes=(sharded.seq,)))
        given = attend(*moved, *segments[count:])
        return jax.tree.map(lambda x: _moved((x,), partial(layout.to_natural, axes=(sharded.seq,)))[0], given)

    def padded(x: jax.Array, layout: Layout) -> jax.Array:
        missing = layout.padded(x.shape[-3]) - x.shape[-3]
        return jnp.pad(x.reshape(-1, *x.shape[-3:]), ((0, 0), (0, missing), (0, 0), (0, 0)))

    def in_layout_order(bound: jax.Array) -> jax.Array:  # intervals of the padding end at 0: it is masked out
        bound = bound.reshape(-1, length) if bound.ndim > 1 else bound
        missing = len(position_L) - length
        return jnp.pad(bound, [(0, 0)] * (bound.ndim - 1) + [(0, missing)])[..., position_L]

    query, key, value = map(padded, arrays, (layout, setting.key_layout, setting.key_layout))
    given = on_segments((query, key, value), Intervals(*map(in_layout_order, mask)), pairs, dropout)
    if not setting.scores.residual:
        return given[:, :length].reshape(shape)
    o_BLHK, lse_BLH = (x[:, :length] for x in given)
    return o_BLHK.reshape(shape), lse_BLH.reshape(shape[:-1]).astype(o_BLHK.dtype)


def _dropout(dropped: Dropped, shape: tuple[int, ...], position_L: Any, how: How) -> tuple[Any, Any]:
    """Dropout by the rows and the natural positions of a global batch, and its specs."""
    sharded, row_B = how.sharded, jnp.arange(math.prod(shape[:-3]))
    rows, positions = sharded.spec(sharded.batch), sharded.spec(sharded.seq)
    if how.shared_dropout:
        return SharedDropout(*dropped, row_B, position_L), SharedDropout._make((P(), P(), rows, positions))
    return Dropout(*dropped, row_B, position_L, 0), Dropout._make((P(), P(), rows, positions, P()))


def _padded_pairs(x_BHLS: jax.Array, setting: Setting, queries: int, keys: int) -> jax.Array:
    """An array over pairs for queries and keys that are padded; a row for each query where a segment has but one."""
    padded = setting.layout.padded(queries), setting.key_layout.padded(keys)
    if padded[0] == setting.layout.devices:
        x_BHLS = jnp.broadcast_to(x_BHLS, (*x_BHLS.shape[:2], queries, x_BHLS.shape[3]))
    shared = [size == 1 < whole for size, whole in zip(x_BHLS.shape[2:], (queries, keys), strict=True)]
    missing = [0 if one else whole - size for one, whole, size in zip(shared, padded, x_BHLS.shape[2:], strict=True)]
    return jnp.pad(x_BHLS, [(0, 0), (0, 0), *((0, count) for count in missing)])


def _pair_spec(sharded: Sharded, x_BHLS: jax.Array) -> P:
    """An axis of size 1 is the same on all devices, and keys are whole on each."""
    rows, heads, queries, _ = (size > 1 for size in x_BHLS.shape)
    return sharded.spec(sharded.batch * rows, sharded.heads * heads, sharded.seq if queries else ())


def _local_pairs(x_spec: P, seq: str, layout: Layout, x_BHlS: jax.Array, spec: P) -> jax.Array:
    """The rows of this device's queries in layout order, varying over all axes: a gradient is summed over them."""
    x_BHlS = jax.lax.pcast(x_BHlS, tuple(named_axes(x_spec) - named_axes(spec)), to="varying")
    if x_BHlS.shape[QUERY_AXIS] == 1:
        return x_BHlS
    moved_lBHS = layout.from_natural(jnp.moveaxis(x_BHlS, QUERY_AXIS, 0), (seq,))
    return jnp.moveaxis(moved_lBHS, 0, QUERY_AXIS)


def _moved(arrays: tuple[jax.Array, ...], move: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
    """Arrays `[B, l, H, ...]` with their tokens in another order, moved together in one array."""
    moved = move(jnp.moveaxis(jnp.concatenate(arrays, axis=2), 1, 0))
    ends = list(itertools.accumulate(x.shape[2] for x in arrays))
    return tuple(jnp.split(jnp.moveaxis(moved, 0, 1), ends[:-1], axis=2))
