"""Sequence-parallel attention for the models of Flax: what `nnx.MultiHeadAttention` takes as its `attention_fn`."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import Mesh

from lss_jax.attention.arguments import refuse
from lss_jax.attention.global_attention import dot_product_attention

OF_CALL = ("dropout_rate", "dropout_rng", "broadcast_dropout", "precision")  # which a layer says itself
OPTIONS = tuple(
    name
    for name, argument in inspect.signature(dot_product_attention).parameters.items()
    if argument.kind is argument.KEYWORD_ONLY and name not in ("mesh", "return_residual", *OF_CALL)
)
OF_FLAX = tuple(inspect.signature(nnx.dot_product_attention).parameters)


def attention_fn(mesh: Mesh, **options: Any) -> Callable[..., jax.Array]:
    """`dot_product_attention` on this mesh for `nnx.MultiHeadAttention`, in a model that is otherwise as it was.

    >>> from flax import nnx
    >>> mesh = jax.make_mesh((2, 4), ("data", "seq"))
    >>> layer = nnx.MultiHeadAttention(4, 32, decode=False, attention_fn=attention_fn(mesh), rngs=nnx.Rngs(0))
    >>> layer(jax.numpy.ones((2, 40, 32)), is_causal=True).shape
    (2, 40, 32)

    Args:
      mesh: any mesh with an axis for the sequence.
      **options: the other arguments of `dot_product_attention`. With `is_causal=True` here, every layer is causal;
        without, those are that are called so.

    Returns:
      A function of global `query [..., L, H, K]`, `key` and `value [..., S, G, K]` to `[..., L, H, K]`, with the
      arguments of `flax.nnx.dot_product_attention`. Dropout is by global positions, and so other weights become zero
      than with Flax's. It raises a `ConfigError` if weights are to be sown, and where `dot_product_attention` does.

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
        promote_dtype: Callable[..., Any] = promote_dtype,
        is_causal: bool = False,
        **others: Any,
    ) -> jax.Array:
        refuse((*_unknown("the function of attention_fn", others, OF_FLAX[3:]), *_sown(module)))
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        of_call = {
            "is_causal": is_causal or options.get("is_causal", False),
            "dropout_rate": 0.0 if deterministic else dropout_rate,
            "dropout_rng": dropout_rng,
            "broadcast_dropout": broadcast_dropout,
            "precision": precision,
        }
        mask = mask if mask is None else mask.astype(bool)
        return dot_product_attention(query, key, value, bias, mask, mesh=mesh, **{**options, **of_call})

    return attend


def _unknown(function: str, options: dict[str, Any], known: Sequence[str]) -> Iterator[str]:
    """Names of arguments that a function does not have."""
    for name in options.keys() - set(known):
        yield f"{name}={options[name]!r} is no argument of {function}, which takes {', '.join(known)}"


def _sown(module: Any) -> Iterator[str]:
    if module is not None:
        yield "sow_weights=True is refused, since attention weights exist in blocks alone; use sow_weights=False"
