"""What the arguments of attention on global arrays must be: a line per problem, before anything is compiled."""

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from lss_jax.attention.mask import Intervals, bidirectional, neighbours, prefix_causal
from lss_jax.attention.strategies import EXACT, STRATEGIES, strategy_problems
from lss_jax.attention.strategy import Shards
from lss_jax.config.rules import attention_problems, less_than_1
from lss_jax.config.schema import AttentionConfig, ConfigError
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, axes_of

Names = str | tuple[str, ...] | None  # of the mesh axes that shard one dimension
DTYPES = ("float32", "bfloat16")


def refuse(problems: Iterable[str]) -> None:
    """Raises a `ConfigError` if there are any."""
    if text := "\n".join(problems):
        raise ConfigError(text)


class Seen(NamedTuple):
    """What each query sees, by the arguments of `dot_product_attention`."""

    is_causal: bool
    local_window_size: Any  # a number, a pair (left, right), or None
    prefix: int
    intervals: tuple[Any, Any] | None

    @property
    def sides(self) -> tuple[int, ...] | None:
        """The window as (left, right), of whatever integers it was given."""
        size = self.local_window_size
        if size is None:
            return None
        return tuple(map(operator.index, (size, size) if np.ndim(size) == 0 else size))

    def traced(self) -> Iterator[str]:
        """Arguments that are known only when the program runs, but for the intervals, which may be."""
        of_program = {name: getattr(self, name) for name in ("is_causal", "local_window_size", "prefix")}
        for name, value in of_program.items():
            if is_traced(value):
                yield (
                    f"{name} is traced, and decides what is compiled; give a Python value (static_argnames={name!r} of "
                    f"jax.jit), or intervals, which may be traced"
                )

    def problems(self) -> Iterator[str]:
        """What is wrong with the arguments, a line each; errors in the intervals are raised by `mask`."""
        if self.prefix < 0:
            yield f"prefix={self.prefix} must be at least 0"
        if self.prefix > 0 and not self.is_causal:
            yield f"prefix={self.prefix} has no use with is_causal=False, under which all is seen anyway; use prefix=0"
        try:
            wrong = self.sides is not None and (len(self.sides) != 2 or min(self.sides) < 0)
        except TypeError:  # no integers
            wrong = True
        if wrong:
            yield (
                f"local_window_size={self.local_window_size!r} must be one number or (left, right), each at least 0; "
                f"for a side without a bound, give the length of the sequence"
            )

    def mask(self, shape_BL: tuple[int, ...]) -> Intervals:
        """The keys that each query sees, `[L]`, or `[..., L]` if the user's intervals differ between rows.

        Raises:
          ConfigError: the intervals are not integers, or of another shape.
        """
        length = shape_BL[-1]
        position_L = jnp.arange(length, dtype=jnp.int32)
        mask = bidirectional(position_L, length)
        if self.is_causal:
            mask &= prefix_causal(position_L, self.prefix)
        if self.sides is not None:
            left, right = (min(side, length) for side in self.sides)
            mask &= neighbours(position_L, left, right)
        return mask if self.intervals is None else mask & _intervals(self.intervals, shape_BL)


def is_traced(tree: Any) -> bool:
    """Whether any value is known only when the program runs."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _intervals(bounds: tuple[Any, Any], shape_BL: tuple[int, ...]) -> Intervals:
    """The user's intervals, `[L]` or `[..., L]`, checked and broadcast."""
    arrays = [jnp.asarray(bound) for bound in bounds]
    shapes = [array.shape for array in arrays]
    for name, array in zip(("start", "end"), arrays, strict=True):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ConfigError(f"intervals: {name} is of dtype {array.dtype}; give positions as integers")
        if array.size > 1 and array.shape == shape_BL[-1:] == shape_BL[-2:-1]:
            raise ConfigError(
                f"intervals: {name} of shape {array.shape} could be of the {array.size} queries or of the {array.size} "
                f"rows of the batch; give [1, L] for queries, or [B, 1] for rows"
            )
    try:
        shared = all(array.shape[:-1] == (1,) * len(array.shape[:-1]) for array in arrays)
        whole = jnp.broadcast_shapes(*shapes, shape_BL)
    except ValueError:
        whole = ()
    if whole != shape_BL:
        raise ConfigError(
            f"intervals: start and end of shapes {shapes[0]} and {shapes[1]} do not broadcast to {shape_BL}, which the "
            f"queries have before their heads; give [L] for all rows, or [..., L]"
        )
    if shared:
        arrays, shape_BL = [array.reshape(array.shape[-1:]) for array in arrays], shape_BL[-1:]
    return Intervals(*(jnp.broadcast_to(array, shape_BL).astype(jnp.int32) for array in arrays))


def array_problems(query: jax.Array, key: jax.Array, value: jax.Array) -> Iterator[str]:
    """Shapes or dtypes that do not go together."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    dtypes = [str(x.dtype) for x in (query, key, value)]
    if not all(isinstance(size, int) for x in (query, key, value) for size in x.shape):
        yield f"{shapes}: a size that is a symbol is refused, since blocks have sizes; export one program per size"
        return
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


def mesh_problems(mesh: Mesh, axes: tuple[Names, str, Names]) -> Iterator[str]:
    """No mesh, a call inside `shard_map`, or names that the mesh does not have (but for the usual two)."""
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
            f"names for the axes that shard batch, sequence and heads, each once and None for none, as axes=(None, "
            f"{mesh.axis_names[0]!r}, None)"
        )


def placement_problems(mesh: Mesh, arrays: dict[str, jax.Array]) -> Iterator[str]:
    """Arrays that are on other devices, or whose types name another mesh; tracers of automatic axes say neither."""
    if not isinstance(mesh, Mesh):
        return
    meshes = {name: jax.typeof(x).sharding.mesh for name, x in arrays.items()}
    meshes["jax.set_mesh"] = jax.sharding.get_abstract_mesh()
    for name, other in meshes.items():
        if AxisType.Explicit in other.axis_types and dict(other.shape) != dict(mesh.shape):
            yield (
                f"{name} is on a mesh of {dict(other.shape)}, and mesh is of {dict(mesh.shape)}; give the same to both"
            )
    for name, x in arrays.items():
        devices = set() if is_traced(x) or not x.committed else x.sharding.device_set
        if devices and devices != set(mesh.devices.flat):
            yield (
                f"{name} is on {len(devices)} device(s), {min(map(str, devices))} for one, which are not the "
                f"{mesh.size} of the mesh; place it there first, as by jax.device_put({name}, NamedSharding(mesh, P()))"
            )


@contextmanager
def said_clearly() -> Iterator[None]:
    """What JAX refuses of the transformations around a call, said with its remedy.

    Raises:
      ConfigError: in place of JAX's own error.
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise ConfigError(
            "forward-mode differentiation (jvp, jacfwd, linearize) is refused, since the backward pass is written by "
            "hand; use jax.grad or jax.vjp, of which a jvp may be taken (jax.hessian)"
        ) from error
    except ValueError as error:
        if not any(words in str(error) for words in ("spmd_axis_name", "shard_map in_specs", "varying manual axes")):
            raise
        raise ConfigError(
            "vmap maps over an axis that the mesh shards (spmd_axis_name, or an Explicit axis), which axes= names too "
            "or cannot leave out; call it without vmap, since all leading axes are the batch, or on an Explicit mesh "
            "give None for that axis, as axes=(None, 'seq', 'model')"
        ) from error


def option_problems(attention: AttentionConfig, seen: Seen, shards: Shards) -> Iterator[str]:
    """Options that do not go together, by the names of the config's keys, as its rules have them."""
    numbers = ("block_queries", "block_keys", "head_groups")
    yield from less_than_1({name: getattr(attention, name) for name in numbers})
    yield from seen.problems()
    yield from attention_problems(attention, shards.heads, shards.kv_heads)
    if shards.heads % shards.kv_heads:
        shards = shards._replace(seq=1, model=1)  # on no mesh would they do
    yield from strategy_problems(attention, shards)
    if attention.strategy in STRATEGIES and attention.strategy not in EXACT:
        yield (
            f"attention.strategy={attention.strategy!r} is not exact, which these arrays are promised; use one of "
            f"{', '.join(map(repr, EXACT))}, or train a model with it (docs/alternatives.md)"
        )
