"""Attention on its own, for somebody else's model: the strategies as functions of global arrays in natural order.

Here the arrays are a user's: whole, on any mesh with an axis for the sequence, and under the user's own `jit`.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.attention.mask import Intervals, bidirectional, neighbours, prefix_causal
from lss_jax.attention.placement import setting_of
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import make_attend
from lss_jax.config.rules import attention_problems, less_than_1, strategy_on_mesh
from lss_jax.config.schema import AttentionConfig, ConfigError, typed
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, axes_of, over_cut_axes

Names = str | tuple[str, ...] | None  # of the mesh axes that cut one dimension
DTYPES = ("float32", "bfloat16")
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
    gather_groups: int = 1,
    regather: bool = False,
    axes: tuple[Names, str, Names] = (DATA, SEQ, MODEL),
) -> jax.Array:
    """`jax.nn.dot_product_attention` with the sequence cut over a mesh axis: exact, and no device has all scores.

    Takes and gives global arrays in natural order, under `jit`, `jax.grad`, `jax.checkpoint` and `jax.vmap`. A length
    that the mesh does not divide is padded, and cropped again.

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
      mesh: any mesh with an axis for the sequence; see `axes`.
      is_causal: a token sees itself and what came before. Masks combine: a token sees what all of them show.
      local_window_size: so many tokens to the left and to the right are seen; one number is both, as in JAX.
      prefix: with `is_causal`, the first so many tokens see one another.
      intervals: `(start, end)`: a query sees keys at `start <= position < end`. Integers that broadcast to `[L]`, or to
        `[..., L]` for a mask per row: padding is `(0, lengths_B[:, None])`, and `lss_jax.attention.mask.packed` makes
        the intervals of packed documents. A query that sees nothing has a row of zeros.
      scale: of the scores; None is `K**-0.5`.
      strategy: "lss", "ring" or "ulysses".
      layout: "contiguous", or "zigzag", which gives all devices the same work under a causal mask. As the arrays are in
        natural order, that takes 4 sends more per call, 2 of the segment's `q, k, v` and 2 of its rows, and as many on
        the way back; only a model that is itself in zigzag order has it for nothing.
      kernel: "auto", "blockwise", "dense", "triton" or "mosaic"; this and what follows as in `configs/base.py`.
      block_queries: at most, in a block.
      block_keys: likewise.
      gather_groups: for "lss": heads travel in so many groups.
      regather: for "lss": gather once more on the way back, instead of keeping all keys and values.
      axes: what the mesh calls the axes that cut batch, sequence and heads. For batch and heads it may be several
        names, or None; where the mesh has no "data" or "model", or they do not divide `B`, or `H` and `G`, nothing is
        cut, and the devices along them all do the same work.

    Returns:
      `[..., L, H, K]`, in the dtype of the queries.

    Raises:
      ConfigError: a `ValueError`: shapes, options or mesh do not go together; a line per problem.

    Source: arXiv 2311.02382, Sec. 3; of the other strategies `lss_jax.attention.ring` and `lss_jax.attention.ulysses`.
    """
    refuse(_array_problems(query, key, value))
    refuse(_mesh_problems(mesh, axes))
    L, H, G = *query.shape[-3:-1], key.shape[-2]
    cut = _cut(mesh, axes, math.prod(query.shape[:-3]), math.gcd(H, G))
    sides = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    options = dict(strategy=strategy, layout=layout, kernel=kernel, block_queries=block_queries, block_keys=block_keys)
    options |= dict(gather_groups=gather_groups, regather=regather, prefix=prefix, window=0)
    try:
        attention = typed(AttentionConfig, options)
        refuse(_option_problems(attention, is_causal, sides, H, G, cut))
        setting = setting_of(attention, Layout(layout, mesh.shape[cut.seq]), cut.if_cut(cut.seq), mesh)
    except ConfigError as error:
        raise ConfigError(SECTION.sub("", str(error))) from None
    mask = _mask(L, is_causal, sides, prefix)
    if intervals is not None:
        mask &= _intervals(intervals, query.shape[:-2])
    if scale is not None:
        query = query * jnp.asarray(scale * query.shape[-1] ** 0.5, query.dtype)  # kernels divide by the root of K
    return _attention(query, key, value, mask, cut, strategy, setting)


class _Cut(NamedTuple):
    """The mesh axes that cut each dimension."""

    mesh: Mesh
    batch: tuple[str, ...]
    seq: str
    heads: tuple[str, ...]

    def size(self, names: tuple[str, ...]) -> int:
        """Into how many parts."""
        return math.prod(self.mesh.shape[name] for name in names)

    def if_cut(self, name: str) -> str | None:
        """The axis, None if it has one device."""
        return name if self.mesh.shape[name] > 1 else None

    def spec(self, *dimensions: tuple[str, ...] | str) -> P:
        """For `shard_map`: without what cuts nothing."""
        return over_cut_axes(P(*dimensions), self.mesh)


def _cut(mesh: Mesh, axes: tuple[Names, str, Names], batch: int, heads: int) -> _Cut:
    """What there is of `axes` in this mesh and divides the batch and the heads."""

    def dividing(names: Names, size: int) -> tuple[str, ...]:
        there = tuple(name for name in axes_of(names) if name in mesh.axis_names)
        return () if size % math.prod(mesh.shape[name] for name in there) else there

    return _Cut(mesh, dividing(axes[0], batch), axes[1], dividing(axes[2], heads))


@partial(jax.jit, static_argnames=("cut", "strategy", "setting"))
def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Intervals, cut: _Cut, strategy: str, setting: Setting
) -> jax.Array:
    """On the mesh, whether its axes are automatic or explicit (where types say how arrays are cut)."""
    on_mesh = partial(_on_mesh, cut=cut, strategy=strategy, setting=setting)
    mesh, spec = jax.typeof(query).sharding.mesh, jax.typeof(query).sharding.spec
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    if AxisType.Explicit in mesh.axis_types:
        on_mesh = jax.sharding.auto_axes(on_mesh, axes=mesh.axis_names, out_sharding=NamedSharding(mesh, spec))
    return on_mesh(query, key, value, mask)


def _on_mesh(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Intervals, cut: _Cut, strategy: str, setting: Setting
) -> jax.Array:
    """From global arrays in natural order to what the strategies know, segments in layout order, and back."""
    layout, length = setting.layout, query.shape[-3]
    missing, position_L = layout.padded(length) - length, layout.positions(layout.padded(length))
    x_spec, mask_spec = cut.spec(cut.batch, cut.seq, cut.heads), cut.spec(cut.batch, cut.seq)
    if mask.start.ndim == 1:
        mask_spec = cut.spec(cut.seq)

    @partial(
        jax.shard_map,
        mesh=Mesh(cut.mesh.devices, cut.mesh.axis_names),  # all axes automatic
        in_specs=(x_spec, x_spec, x_spec, mask_spec),
        out_specs=x_spec,
    )
    def on_segments(q_BlHK: jax.Array, k_BlGK: jax.Array, v_BlGK: jax.Array, mask: Intervals) -> jax.Array:
        attend, segments = make_attend(strategy, mask, setting), (q_BlHK, k_BlGK, v_BlGK)
        if layout.name == "contiguous":
            return attend(*segments)
        o_BlHK = attend(*_moved(segments, partial(layout.from_natural, axes=(cut.seq,))))
        return _moved((o_BlHK,), partial(layout.to_natural, axes=(cut.seq,)))[0]

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x.reshape(-1, *x.shape[-3:]), ((0, 0), (0, missing), (0, 0), (0, 0)))

    def in_layout_order(bound: jax.Array) -> jax.Array:  # the padding sees nothing: its intervals end at 0
        bound = bound.reshape(-1, length) if bound.ndim > 1 else bound
        return jnp.pad(bound, [(0, 0)] * (bound.ndim - 1) + [(0, missing)])[..., position_L]

    mask = Intervals(*map(in_layout_order, mask))
    o_BLHK = on_segments(padded(query), padded(key), padded(value), mask)
    return o_BLHK[:, :length].reshape(query.shape)


def _moved(arrays_BlHK: tuple[jax.Array, ...], move: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
    """Rows to another order, all arrays together."""
    moved_lBHK = move(jnp.moveaxis(jnp.concatenate(arrays_BlHK, axis=2), 1, 0))
    ends = list(itertools.accumulate(x.shape[2] for x in arrays_BlHK))
    return tuple(jnp.split(jnp.moveaxis(moved_lBHK, 0, 1), ends[:-1], axis=2))


def _mask(length: int, is_causal: bool, sides: tuple[int, int] | None, prefix: int) -> Intervals:
    """What each token sees, `[L]`, before the user's own intervals."""
    position_L = jnp.arange(length, dtype=jnp.int32)
    mask = bidirectional(position_L, length)
    if is_causal:
        mask &= prefix_causal(position_L, prefix)
    if sides is not None:
        mask &= neighbours(position_L, *(min(side, length) for side in sides))
    return mask


def _intervals(bounds: tuple[Any, Any], shape_BL: tuple[int, ...]) -> Intervals:
    """The user's own, `[L]` or `[..., L]`.

    Raises:
      ConfigError: they are not integers, or of another shape.
    """
    arrays = [jnp.asarray(bound) for bound in bounds]
    shapes = [array.shape for array in arrays]
    for name, array in zip(("start", "end"), arrays, strict=True):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ConfigError(f"intervals: {name} is of dtype {array.dtype}; give positions as integers")
    try:
        shared = len(jnp.broadcast_shapes(*shapes, shape_BL[-1:])) == 1
        whole = jnp.broadcast_shapes(*shapes, shape_BL)
    except ValueError:
        whole = ()
    if whole != shape_BL:
        raise ConfigError(
            f"intervals: start and end of shapes {shapes[0]} and {shapes[1]} do not broadcast to {shape_BL}, which the "
            f"queries have before their heads; give [L] for all rows, or [..., L]"
        )
    return Intervals(*(jnp.broadcast_to(a, shape_BL[-1:] if shared else shape_BL).astype(jnp.int32) for a in arrays))


def refuse(problems: Iterable[str]) -> None:
    """Raises a `ConfigError` if there are any."""
    if text := "\n".join(problems):
        raise ConfigError(text)


def _array_problems(query: jax.Array, key: jax.Array, value: jax.Array) -> Iterator[str]:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    dtypes = [str(x.dtype) for x in (query, key, value)]
    if min(query.ndim, key.ndim, value.ndim) < 3:
        yield f"{shapes}: each is [..., L, heads, K], of three dimensions at least"
    elif key.shape != value.shape or (*query.shape[:-2], query.shape[-1]) != (*key.shape[:-2], key.shape[-1]):
        yield (
            f"{shapes}: they may differ in the number of the query heads alone; attention to another sequence, or with "
            f"values of another width, is left to jax.nn.dot_product_attention"
        )
    elif 0 in query.shape or 0 in key.shape:
        yield f"{shapes}: nothing to attend to; every dimension must be at least 1"
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        yield f"query, key and value of dtypes {', '.join(dtypes)}; give all three as {' or as '.join(DTYPES)}"


def _mesh_problems(mesh: Mesh, axes: tuple[Names, str, Names]) -> Iterator[str]:
    """Names that are not there, but for the usual ones of batch and heads; or no place for a mesh."""
    if not isinstance(mesh, Mesh):
        yield f"mesh={mesh!r} is no jax.sharding.Mesh; give one, as of jax.make_mesh((jax.device_count(),), ({SEQ!r},))"
        return
    if jax.sharding.get_abstract_mesh().manual_axes:
        yield (
            "global arrays are needed, and this is inside a shard_map; call it outside, or for local arrays use "
            "lss_jax.attention.strategies.make_attend"
        )
    names = [name for part in axes for name in axes_of(part)]
    missing = [name for name in names if name not in (*mesh.axis_names, *({DATA, MODEL} - {axes[1]}))]
    if missing or len(set(names)) < len(names) or axes[1] not in mesh.axis_names:
        yield (
            f"axes={axes!r} do not name axes of this mesh, which has {', '.join(map(repr, mesh.axis_names))}; give its "
            f"names for what cuts batch, sequence and heads, each once and None for nothing, as axes=(None, "
            f"{mesh.axis_names[0]!r}, None)"
        )


def _option_problems(
    attention: AttentionConfig, is_causal: bool, sides: tuple[int, int] | None, heads: int, kv_heads: int, cut: _Cut
) -> Iterator[str]:
    """By the names of the config's keys, as its rules have them."""
    numbers = ("block_queries", "block_keys", "gather_groups")
    yield from less_than_1({name: getattr(attention, name) for name in numbers})
    if attention.prefix < 0:
        yield f"prefix={attention.prefix} must be at least 0"
    if attention.prefix > 0 and not is_causal:
        yield f"prefix={attention.prefix} has no use with is_causal=False, under which all is seen anyway; use prefix=0"
    pair = isinstance(sides, tuple) and len(sides) == 2
    if sides is not None and not (pair and all(isinstance(side, int) and side >= 0 for side in sides)):
        yield f"local_window_size={sides!r} must be one number or (left, right), each at least 0"
    yield from attention_problems(attention, heads, kv_heads)
    if heads % kv_heads == 0:
        yield from strategy_on_mesh(attention, heads, kv_heads, cut.mesh.shape[cut.seq], cut.size(cut.heads))
