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
    array_problems,
    implementation_problems,
    mesh_problems,
    option_problems,
    placement_problems,
    refuse,
    said_clearly,
)
from lss_jax.attention.head_groups import in_head_groups
from lss_jax.attention.mask import Intervals
from lss_jax.attention.placement import setting_of
from lss_jax.attention.seen import Seen, is_traced
from lss_jax.attention.setting import Scores, Setting
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
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    mesh: Mesh,
    prefix: int = 0,
    intervals: tuple[Any, Any] | None = None,
    strategy: str = "lss",
    layout: str = "contiguous",
    kernel: str = "auto",
    block_queries: int = 512,
    block_keys: int = 256,
    head_groups: int = 1,
    regather: bool = False,
    axes: tuple[Names, str, Names] = (DATA, SEQ, MODEL),
) -> Any:
    """`jax.nn.dot_product_attention` with the sequence sharded over a mesh axis: exact, and no device has all scores.

    From global arrays in natural order to `[..., L, H, K]`, under `jit`, `jax.grad`, `jax.checkpoint` and `jax.vmap`.
    A length that the mesh does not divide is padded. Arguments up to `return_residual` are JAX's, the others ours. The
    module says more of each.

    >>> mesh = jax.make_mesh((2, 4), ("data", "seq"))
    >>> q_BLHK, k_BLGK, v_BLGK = (jax.random.normal(jax.random.key(H), (2, 40, H, 8)) for H in (4, 2, 2))
    >>> o_BLHK = dot_product_attention(q_BLHK, k_BLGK, v_BLGK, mesh=mesh, is_causal=True)
    >>> expected_BLHK = jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, is_causal=True)
    >>> bool(abs(o_BLHK - expected_BLHK).max() < 1e-5)
    True

    Args:
      query: `[..., L, H, K]`, float32, bfloat16 or float16; all leading axes are the batch, `B` rows.
      key: `[..., S, G, K]`; each of its `G` heads serves `H/G` neighbouring heads of the queries. The result is in the
        dtype to which all three are promoted.
      value: as `key`.
      scale: of the scores, in float32; None is `K**-0.5`.
      is_causal: a token sees itself and what came before.
      query_seq_lengths: integers `[B]`: the queries from there on see nothing.
      key_value_seq_lengths: integers `[B]`: the keys from there on are not seen.
      local_window_size: numbers of tokens seen to the left and to the right; one number is both.
      implementation: None or "xla", which mean the same.
      return_residual: the log-sum-exp of the scores of each query, `[..., L, H]`, is returned too; it has no gradient.
      mesh: any mesh with an axis for the sequence.
      prefix: with `is_causal`, number of tokens at the start that see one another.
      intervals: `(start, end)`: a query sees keys at `start <= position < end`, integers `[L]` or `[..., L]`.
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
    query, key, value = _promoted(query, key, value)
    arrays = {"query": query, "key": key, "value": value}
    seen = Seen(is_causal, local_window_size, prefix, query_seq_lengths, key_value_seq_lengths, intervals)
    problems = (array_problems(query, key, value), mesh_problems(mesh, axes), placement_problems(mesh, arrays))
    refuse(itertools.chain(*problems, seen.traced(), implementation_problems(implementation)))
    options = dict(strategy=strategy, layout=layout, kernel=kernel, block_queries=block_queries, block_keys=block_keys)
    options |= dict(head_groups=head_groups, regather=regather, prefix=prefix, window=0, source_layout=layout)
    options |= dict(global_tokens=0, features=0)
    heads = query.shape[-2], key.shape[-2]
    how = _how(options, seen, heads, _sharded(mesh, axes, math.prod(query.shape[:-3]), math.gcd(*heads)))
    if is_traced(scale):
        query, scale = _scaled(query, scale), None
    scores = Scores(None if scale is None else float(scale), return_residual)
    setting = dataclasses.replace(how.setting, scores=scores)
    if query.shape[-3] != key.shape[-3]:
        setting = dataclasses.replace(setting, key_layout=Layout("contiguous", setting.layout.devices))
    mask = seen.mask(query.shape[:-2], key.shape[-3])
    with said_clearly(), jax.disable_jit(False):  # eagerly, every operation of every block is a program of its own
        return _attention((query, key, value), mask, how._replace(setting=setting))


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


def _promoted(*arrays: Any) -> list[jax.Array]:
    """Arrays of one dtype, by JAX's rules."""
    arrays = tuple(map(jnp.asarray, arrays))
    return [x.astype(jnp.result_type(*arrays)) for x in arrays]


def _scaled(query: jax.Array, scale: Any) -> jax.Array:
    """Queries with a scale that is traced, and may be differentiated, for kernels that divide by the root of `K`."""
    return (query.astype(jnp.float32) * (scale * query.shape[-1] ** 0.5)).astype(query.dtype)


Arrays = tuple[jax.Array, jax.Array, jax.Array]  # query, key, value
Given = jax.Array | tuple[jax.Array, jax.Array]  # the output, and if the setting wants it the log-sum-exp


@partial(jax.jit, static_argnames="how")
def _attention(arrays: Arrays, mask: Intervals, how: How) -> Given:
    """On the mesh, whether its axes are automatic or explicit (where types say how arrays are sharded)."""
    on_mesh = partial(_on_mesh, how=how)
    mesh, spec = jax.typeof(arrays[0]).sharding.mesh, jax.typeof(arrays[0]).sharding.spec
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    if AxisType.Explicit in mesh.axis_types:
        placed = [NamedSharding(mesh, of_result) for of_result in (spec, P(*spec[:-1]))]
        out = tuple(placed) if how.setting.scores.residual else placed[0]
        on_mesh = jax.sharding.auto_axes(on_mesh, axes=mesh.axis_names, out_sharding=out)
    return on_mesh(arrays, mask)


def _on_mesh(arrays: Arrays, mask: Intervals, how: How) -> Given:
    """From global arrays in natural order to what the strategies know, segments in layout order, and back."""
    sharded, shape, setting = how.sharded, arrays[0].shape, how.setting
    layout, length = setting.layout, shape[-3]
    position_L = layout.positions(layout.padded(length))
    x_spec = sharded.spec(sharded.batch, sharded.seq, sharded.heads)
    mask_spec = sharded.spec(sharded.seq) if mask.start.ndim == 1 else sharded.spec(sharded.batch, sharded.seq)

    @partial(
        jax.shard_map,
        mesh=Mesh(sharded.mesh.devices, sharded.mesh.axis_names),  # all axes automatic
        in_specs=((x_spec,) * 3, mask_spec),
        out_specs=x_spec,
    )
    def on_segments(segments: Arrays, mask: Intervals) -> Any:
        attend = in_head_groups(make_attend(how.strategy, mask, setting), how.head_groups)
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
    given = on_segments((query, key, value), Intervals(*map(in_layout_order, mask)))
    if not setting.scores.residual:
        return given[:, :length].reshape(shape)
    o_BLHK, lse_BLH = (x[:, :length] for x in given)
    return o_BLHK.reshape(shape), lse_BLH.reshape(shape[:-1]).astype(o_BLHK.dtype)


def _moved(arrays: tuple[jax.Array, ...], move: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
    """Arrays `[B, l, H, ...]` with their tokens in another order, moved together in one array."""
    moved = move(jnp.moveaxis(jnp.concatenate(arrays, axis=2), 1, 0))
    ends = list(itertools.accumulate(x.shape[2] for x in arrays))
    return tuple(jnp.split(jnp.moveaxis(moved, 0, 1), ends[:-1], axis=2))
