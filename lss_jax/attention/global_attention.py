"""Attention on its own, for somebody else's model: the strategies as functions of global arrays in natural order.

Here the arrays are a user's: whole, on any mesh with an axis for the sequence, and under the user's own `jit`.

What each query sees: masks combine, a token sees what all of them show, and a query that sees nothing has zeros (and
no gradient), where `jax.nn.dot_product_attention` has the mean of all values, of what is masked out too.
`intervals` are integers that broadcast to `[L]`, or to `[..., L]` for a mask per row: padding is
`(0, lengths_B[:, None])`, and `lss_jax.attention.mask.packed` makes the intervals of packed documents.

What moves: with `layout="zigzag"` all devices have the same work under a causal mask. As the arrays are in natural
order, that takes 4 sends more per call, 2 of the segment's `q, k, v` and 2 of its output, and as many in the backward
pass; only a model that is itself in zigzag order has it for nothing.

What the mesh shards: `axes` names its axes for batch, sequence and heads. For batch and heads it may be several names,
or None. Where the mesh has no "data" or "model", or they do not divide `B`, or `H` and `G`, that dimension is not
sharded, and the devices along these axes all do the same work.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.attention.arguments import (
    Names,
    Seen,
    array_problems,
    is_traced,
    mesh_problems,
    option_problems,
    placement_problems,
    refuse,
    said_clearly,
)
from lss_jax.attention.head_groups import in_head_groups
from lss_jax.attention.mask import Intervals
from lss_jax.attention.placement import setting_of
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import make_attend
from lss_jax.attention.strategy import Shards
from lss_jax.config.schema import AttentionConfig, ConfigError, typed
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, axes_of, without_unsharded

SECTION = re.compile(r"\b(attention|model|mesh)\.")  # of a config's key: an argument is called the same without it


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mesh: Mesh,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    prefix: int = 0,
    intervals: tuple[Any, Any] | None = None,
    scale: float | None = None,
    strategy: str = "lss",
    layout: str = "contiguous",
    kernel: str = "auto",
    block_queries: int = 512,
    block_keys: int = 256,
    head_groups: int = 1,
    regather: bool = False,
    axes: tuple[Names, str, Names] = (DATA, SEQ, MODEL),
) -> jax.Array:
    """`jax.nn.dot_product_attention` with the sequence sharded over a mesh axis: exact, and no device has all scores.

    From global arrays in natural order to `[..., L, H, K]` in the dtype of the queries, under `jit`, `jax.grad`,
    `jax.checkpoint` and `jax.vmap`. A length that the mesh does not divide is padded. The module says more of each.

    >>> mesh = jax.make_mesh((2, 4), ("data", "seq"))
    >>> q_BLHK, k_BLGK, v_BLGK = (jax.random.normal(jax.random.key(H), (2, 40, H, 8)) for H in (4, 2, 2))
    >>> o_BLHK = dot_product_attention(q_BLHK, k_BLGK, v_BLGK, mesh=mesh, is_causal=True)
    >>> expected_BLHK = jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, is_causal=True)
    >>> bool(abs(o_BLHK - expected_BLHK).max() < 1e-5)
    True

    Args:
      query: `[..., L, H, K]`, float32 or bfloat16; all leading axes are the batch, `B` rows.
      key: `[..., L, G, K]`; each of its `G` heads serves `H/G` neighbouring heads of the queries.
      value: as `key`.
      mesh: any mesh with an axis for the sequence.
      is_causal: a token sees itself and what came before.
      local_window_size: numbers of tokens seen to the left and to the right; one number is both, as in JAX.
      prefix: with `is_causal`, number of tokens at the start that see one another.
      intervals: `(start, end)`: a query sees keys at `start <= position < end`, integers `[L]` or `[..., L]`.
      scale: of the scores; None is `K**-0.5`.
      strategy: "lss", "ring" or "ulysses"; this and the next six as in `configs/base.py`.
      layout: "contiguous", or "zigzag", which balances a causal mask.
      kernel: "auto", "blockwise", "dense", "triton" or "mosaic".
      block_queries: an upper bound on the queries in a block.
      block_keys: likewise.
      head_groups: groups of heads that are communicated and computed one after the other.
      regather: communicate keys and values once more in the backward pass, instead of saving them.
      axes: the mesh's names for the axes that shard batch, sequence and heads.

    Raises:
      ConfigError: a `ValueError`: shapes, options or mesh do not go together; a line per problem.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    arrays = {"query": query, "key": key, "value": value}
    seen = Seen(is_causal, local_window_size, prefix, intervals)
    problems = (array_problems(query, key, value), mesh_problems(mesh, axes), placement_problems(mesh, arrays))
    refuse(itertools.chain(*problems, seen.traced()))
    options = dict(strategy=strategy, layout=layout, kernel=kernel, block_queries=block_queries, block_keys=block_keys)
    options |= dict(head_groups=head_groups, regather=regather, prefix=prefix, window=0, source_layout=layout)
    options |= dict(global_tokens=0, features=0)
    heads = query.shape[-2], key.shape[-2]
    how = _how(options, seen, heads, _sharded(mesh, axes, math.prod(query.shape[:-3]), math.gcd(*heads)))
    if is_traced(scale):
        query, scale = _scaled(query, scale), None
    how = how._replace(setting=dataclasses.replace(how.setting, scale=None if scale is None else float(scale)))
    mask = seen.mask(query.shape[:-2])
    with said_clearly(), jax.disable_jit(False):  # eagerly, every operation of every block is a program of its own
        return _attention((query, key, value), mask, how)


class Sharded(NamedTuple):
    """The mesh axes that shard each dimension."""

    mesh: Mesh
    batch: tuple[str, ...]
    seq: str
    heads: tuple[str, ...]

    def spec(self, *dimensions: tuple[str, ...] | str) -> P:
        """The spec of an array for `shard_map`, without the axes that have one device."""
        return without_unsharded(P(*dimensions), self.mesh)


def _sharded(mesh: Mesh, axes: tuple[Names, str, Names], batch: int, heads: int) -> Sharded:
    """What there is of `axes` in this mesh and divides the batch and the heads."""

    def dividing(names: Names, size: int) -> tuple[str, ...]:
        there = tuple(name for name in axes_of(names) if name in mesh.axis_names)
        return () if size % math.prod(mesh.shape[name] for name in there) else there

    return Sharded(mesh, dividing(axes[0], batch), axes[1], dividing(axes[2], heads))


class How(NamedTuple):
    """What is known when attention is compiled."""

    sharded: Sharded
    strategy: str
    setting: Setting
    head_groups: int


def _how(options: dict[str, Any], seen: Seen, heads: tuple[int, int], sharded: Sharded) -> How:
    """The options, checked for this many heads of queries and of keys on this mesh.

    Raises:
      ConfigError: they do not go together, said in the names of the arguments.
    """
    mesh, seq = sharded.mesh, sharded.seq
    shards = Shards(*heads, mesh.shape[seq], model=math.prod(mesh.shape[name] for name in sharded.heads))
    try:
        attention = typed(AttentionConfig, options)
        refuse(option_problems(attention, seen, shards))
        layout = Layout(attention.layout, shards.seq)
        setting = setting_of(attention, layout, seq if shards.seq > 1 else None, mesh)
        return How(sharded, attention.strategy, setting, attention.head_groups)
    except ConfigError as error:
        raise ConfigError(SECTION.sub("", str(error))) from None


def _scaled(query: jax.Array, scale: Any) -> jax.Array:
    """Queries with a scale that is traced, and may be differentiated, for kernels that divide by the root of `K`."""
    return (query.astype(jnp.float32) * (scale * query.shape[-1] ** 0.5)).astype(query.dtype)


Arrays = tuple[jax.Array, jax.Array, jax.Array]  # query, key, value


@partial(jax.jit, static_argnames="how")
def _attention(arrays: Arrays, mask: Intervals, how: How) -> jax.Array:
    """On the mesh, whether its axes are automatic or explicit (where types say how arrays are sharded)."""
    on_mesh = partial(_on_mesh, how=how)
    mesh, spec = jax.typeof(arrays[0]).sharding.mesh, jax.typeof(arrays[0]).sharding.spec
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    if AxisType.Explicit in mesh.axis_types:
        on_mesh = jax.sharding.auto_axes(on_mesh, axes=mesh.axis_names, out_sharding=NamedSharding(mesh, spec))
    return on_mesh(arrays, mask)


def _on_mesh(arrays: Arrays, mask: Intervals, how: How) -> jax.Array:
    """From global arrays in natural order to what the strategies know, segments in layout order, and back."""
    sharded, shape = how.sharded, arrays[0].shape
    layout, length = how.setting.layout, shape[-3]
    missing, position_L = layout.padded(length) - length, layout.positions(layout.padded(length))
    x_spec = sharded.spec(sharded.batch, sharded.seq, sharded.heads)
    mask_spec = sharded.spec(sharded.seq) if mask.start.ndim == 1 else sharded.spec(sharded.batch, sharded.seq)

    @partial(
        jax.shard_map,
        mesh=Mesh(sharded.mesh.devices, sharded.mesh.axis_names),  # all axes automatic
        in_specs=((x_spec,) * 3, mask_spec),
        out_specs=x_spec,
    )
    def on_segments(segments: Arrays, mask: Intervals) -> jax.Array:
        attend = in_head_groups(make_attend(how.strategy, mask, how.setting), how.head_groups)
        if layout.name == "contiguous":
            return attend(*segments)
        o_BlHK = attend(*_moved(segments, partial(layout.from_natural, axes=(sharded.seq,))))
        return _moved((o_BlHK,), partial(layout.to_natural, axes=(sharded.seq,)))[0]

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x.reshape(-1, *x.shape[-3:]), ((0, 0), (0, missing), (0, 0), (0, 0)))

    def in_layout_order(bound: jax.Array) -> jax.Array:  # intervals of the padding end at 0: it is masked out
        bound = bound.reshape(-1, length) if bound.ndim > 1 else bound
        return jnp.pad(bound, [(0, 0)] * (bound.ndim - 1) + [(0, missing)])[..., position_L]

    query, key, value = map(padded, arrays)
    o_BLHK = on_segments((query, key, value), Intervals(*map(in_layout_order, mask)))
    return o_BLHK[:, :length].reshape(shape)


def _moved(arrays_BlHK: tuple[jax.Array, ...], move: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
    """The arrays with their tokens in another order, moved together in one array."""
    moved_lBHK = move(jnp.moveaxis(jnp.concatenate(arrays_BlHK, axis=2), 1, 0))
    ends = list(itertools.accumulate(x.shape[2] for x in arrays_BlHK))
    return tuple(jnp.split(jnp.moveaxis(moved_lBHK, 0, 1), ends[:-1], axis=2))
