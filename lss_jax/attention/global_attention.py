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
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lss_jax.attention.arguments import (
    Names,
    array_problems,
    dropout_problems,
    implementation_problems,
    mesh_problems,
    option_problems,
    placement_problems,
    precision_named,
    refuse,
    said_clearly,
)
from lss_jax.attention.on_mesh import Dropped, How, Sharded, attention_on_mesh, in_two_programs
from lss_jax.attention.pair_arrays import as_pairs, pair_problems
from lss_jax.attention.placement import setting_of
from lss_jax.attention.seen import Seen, is_traced
from lss_jax.attention.setting import Scores
from lss_jax.attention.strategy import Shards
from lss_jax.config.schema import AttentionConfig, ConfigError, typed
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, axes_of

SECTION = re.compile(r"\b(attention|model|mesh)\.")  # of a config's key: an argument is called the same without it


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
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
    dropout_rate: float = 0.0,
    dropout_rng: Any = None,
    broadcast_dropout: bool = False,
    precision: Any = None,
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
      bias: added to the scaled scores; broadcasts to `[..., H, L, S]`.
      mask: booleans of that shape: which keys a query sees. Key axes are whole on each device, query axes sharded.
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
      dropout_rate: of the attention weights that become zero, the same on every mesh.
      dropout_rng: a key of `jax.random`, if any do.
      broadcast_dropout: the same weights become zero in all rows of the batch and all heads.
      precision: of matrix products, as in Flax; "dense" and "blockwise" kernels alone have a use for it.
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
    mask, bias = (x if x is None or hasattr(x, "dtype") else jnp.asarray(x) for x in (mask, bias))
    arrays = {"query": query, "key": key, "value": value, "mask": mask, "bias": bias}
    seen = Seen(is_causal, local_window_size, prefix, query_seq_lengths, key_value_seq_lengths, intervals, None)
    problems = (array_problems(query, key, value), mesh_problems(mesh, axes), placement_problems(mesh, arrays))
    refuse(itertools.chain(*problems, seen.traced(), implementation_problems(implementation)))
    shape, (*rows, _, heads, _), (*_, keys, kv_heads, _) = query.shape, query.shape, key.shape
    of_pairs = pair_problems(mask, bias, kernel, shape, keys)
    refuse(itertools.chain(of_pairs, dropout_problems(dropout_rate, dropout_rng)))

    pairs, of_mask = as_pairs(mask, bias, shape, keys)
    seen = seen._replace(of_mask=of_mask)
    if pairs and kernel == "auto":
        kernel = "blockwise"
    options = dict(strategy=strategy, layout=layout, kernel=kernel, block_queries=block_queries, block_keys=block_keys)
    options |= dict(head_groups=head_groups, regather=regather, prefix=prefix, window=0, source_layout=layout)
    options |= dict(global_tokens=0, features=0)
    sharded = _sharded(mesh, axes, math.prod(rows), math.gcd(heads, kv_heads))
    how = _how(options, seen, (heads, kv_heads), sharded)

    if is_traced(scale):
        query, scale = _scaled(query, scale), None
    scores = Scores(None if scale is None else float(scale), return_residual, precision_named(precision))
    setting = dataclasses.replace(how.setting, scores=scores, reach=seen.reach)
    if shape[-3] != keys:
        key_layout = Layout("contiguous", setting.layout.devices)
        setting = dataclasses.replace(setting, key_layout=key_layout, reach=None)
    how = how._replace(setting=setting, shared_dropout=broadcast_dropout)
    drops = is_traced(dropout_rate) or dropout_rate > 0
    dropped = Dropped(dropout_rate, jax.random.bits(dropout_rng, (), jnp.uint32)) if drops else None
    attend = in_two_programs if jax.config.jax_disable_jit else attention_on_mesh  # type: ignore[attr-defined]
    with said_clearly():
        return attend((query, key, value), seen.mask(shape[:-2], keys), pairs, dropped, how)


def _sharded(mesh: Mesh, axes: tuple[Names, str, Names], batch: int, heads: int) -> Sharded:
    """What there is of `axes` in this mesh and divides the batch and the heads."""

    def dividing(names: Names, size: int) -> tuple[str, ...]:
        there = tuple(name for name in axes_of(names) if name in mesh.axis_names)
        return () if size % math.prod(mesh.shape[name] for name in there) else there

    return Sharded(mesh, dividing(axes[0], batch), axes[1], dividing(axes[2], heads))


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
        return How(sharded, attention.strategy, setting, attention.head_groups, shared_dropout=False)
    except ConfigError as error:
        raise ConfigError(SECTION.sub("", str(error))) from None


def _promoted(*arrays: Any) -> list[jax.Array]:
    """Arrays of one dtype, by JAX's rules."""
    arrays = tuple(map(jnp.asarray, arrays))
    return [x.astype(jnp.result_type(*arrays)) for x in arrays]


def _scaled(query: jax.Array, scale: Any) -> jax.Array:
    """Queries with a scale that is traced, and may be differentiated, for kernels that divide by the root of `K`."""
    return (query.astype(jnp.float32) * (scale * query.shape[-1] ** 0.5)).astype(query.dtype)
