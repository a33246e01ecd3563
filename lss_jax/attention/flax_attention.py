"""Sequence-parallel attention for the models of Flax: what `nnx.MultiHeadAttention` takes as its `attention_fn`."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lss_jax.attention.arguments import refuse
from lss_jax.attention.global_attention import dot_product_attention

OPTIONS = tuple(
    name
    for name, argument in inspect.signature(dot_product_attention).parameters.items()
    if argument.kind is argument.KEYWORD_ONLY and name != "mesh"
)
OF_FLAX = (
    *("bias", "mask", "broadcast_dropout", "dropout_rng", "dropout_rate", "deterministic", "dtype", "precision"),
    *("module", "is_causal"),
)


def attention_fn(mesh: Mesh, **options: Any) -> Callable[..., jax.Array]:
    """`dot_product_attention` on this mesh for `nnx.MultiHeadAttention`, in a model that is otherwise as it was.

    >>> from flax import nnx
    >>> mesh = jax.make_mesh((2, 4), ("data", "seq"))
    >>> layer = nnx.MultiHeadAttention(4, 32, decode=False, attention_fn=attention_fn(mesh), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 40, 32)), is_causal=True).shape
    (2, 40, 32)

    Args:
      mesh: any mesh with an axis for the sequence.
      **options: the other arguments of `dot_product_attention`. With `is_causal=True` here, every layer is causal;
        without, those are that are called so.

    Returns:
      A function of global `query [..., L, H, K]`, `key` and `value [..., L, G, K]` to `[..., L, H, K]`, with the
      arguments of `flax.nnx.dot_product_attention`. It raises a `ConfigError` for those that it cannot respect
      (dropout; a precision; weights to be sown), and where `dot_product_attention` does.

    Raises:
      ConfigError: an option is none of `dot_product_attention`.
    """
    refuse(_unknown("attention_fn", options, OPTIONS))

    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        **others: Any,
    ) -> jax.Array:
        refuse(_unknown("the function of attention_fn", others, OF_FLAX))
        rate = 0.0 if deterministic else dropout_rate
        refuse(_problems(dropout_rate=rate, precision=precision, module=module))
        mask = mask if mask is None else mask.astype(bool)
        dtype = dtype or jnp.result_type(query, key, value)
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        causal = is_causal or options.get("is_causal", False)
        return dot_product_attention(query, key, value, bias, mask, mesh=mesh, **{**options, "is_causal": causal})

    return attend


def _unknown(function: str, options: dict[str, Any], known: Sequence[str]) -> Iterator[str]:
    """Names of arguments that a function does not have."""
    for name in options.keys() - set(known):
        yield f"{name}={options[name]!r} is no argument of {function}, which takes {', '.join(known)}"


def _problems(*, dropout_rate: float, precision, module) -> Iterator[str]:
    """What Flax's own attention can do, and this cannot."""
    if dropout_rate:
        yield (
            f"dropout_rate={dropout_rate} is refused, since attention weights exist in blocks alone; use "
            f"dropout_rate=0.0 (or deterministic=True), and drop what attention puts out"
        )
    if precision is not None:
        yield (
            f"precision={precision} is refused, since the backward pass would not know it; use precision=None and "
            f"jax.config.update('jax_default_matmul_precision', ...)"
        )
    if module is not None:
        yield "sow_weights=True is refused, since attention weights exist in blocks alone; use sow_weights=False"
