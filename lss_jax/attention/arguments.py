"""What the arguments of attention on global arrays must be: a line per problem, before anything is compiled."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from lss_jax.attention.seen import Seen, is_traced
from lss_jax.attention.strategies import EXACT, STRATEGIES, strategy_problems
from lss_jax.attention.strategy import Shards
from lss_jax.config.rules import attention_problems, less_than_1
from lss_jax.config.schema import AttentionConfig, ConfigError
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, axes_of

Names = str | tuple[str, ...] | None  # of the mesh axes that shard one dimension
DTYPES = ("float32", "bfloat16", "float16")
IMPLEMENTATIONS = (None, "xla")  # of JAX: what these compute is what ours must


def refuse(problems: Iterable[str]) -> None:
    """Raises a `ConfigError` if there are any."""
    if text := "\n".join(problems):
        raise ConfigError(text)


def array_problems(query: jax.Array, key: jax.Array, value: jax.Array) -> Iterator[str]:
    """Shapes that do not go together, or a dtype that is none of ours; arrays that are promoted to one dtype."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not all(isinstance(size, int) for x in (query, key, value) for size in x.shape):
        yield f"{shapes}: a size that is a symbol is refused, since blocks have sizes; export one program per size"
        return
    if min(query.ndim, key.ndim, value.ndim) < 3:
        yield f"{shapes}: each is [..., L, heads, K], of three dimensions at least"
    elif key.shape != value.shape or (*query.shape[:-3], query.shape[-1]) != (*key.shape[:-3], key.shape[-1]):
        yield (
            f"{shapes}: queries may differ from keys in length and heads alone, and values in nothing; values "
            f"of another width can be padded with zeros"
        )
    elif 0 in query.shape or 0 in key.shape:
        yield f"{shapes}: nothing to attend to; every dimension must be at least 1"
    if str(query.dtype) not in DTYPES:
        yield f"query, key and value are of dtype {query.dtype} together; give {' or '.join(DTYPES)}"


def implementation_problems(implementation: Any) -> Iterator[str]:
    """Another of JAX's implementations, none of which knows of a sharded sequence."""
    if implementation not in IMPLEMENTATIONS:
        yield (
            f"implementation={implementation!r} is refused, since it would see one device's keys alone; use "
            f"implementation=None, and kernel= for a fused kernel"
        )


def precision_named(precision: Any) -> str | None:
    """A precision as Flax has it, by its name in `jax.default_matmul_precision`.

    Raises:
      ConfigError: two factors of a product have different ones.
    """
    if isinstance(precision, tuple) and len(set(precision)) == 1:
        precision = precision[0]
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return precision.name
    if precision is None or isinstance(precision, str):
        return precision
    raise ConfigError(f"precision={precision!r} must be one for both factors of a product; give one name, as 'highest'")


def dropout_problems(rate: Any, rng: Any) -> Iterator[str]:
    """A rate that leaves nothing, or no key."""
    if not is_traced(rate) and not 0 <= rate < 1:
        yield f"dropout_rate={rate} must be at least 0 and below 1"
    elif rng is None and (is_traced(rate) or rate):
        yield f"dropout_rate={rate} needs a key; give dropout_rng=jax.random.key(...), another one for each step"


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


def placement_problems(mesh: Mesh, arrays: dict[str, Any]) -> Iterator[str]:
    """Arrays that are on other devices, or whose types name another mesh; tracers of automatic axes say neither."""
    if not isinstance(mesh, Mesh):
        return
    arrays = {name: x for name, x in arrays.items() if isinstance(x, jax.Array)}
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
