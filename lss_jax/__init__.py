"""Sequence-parallel transformer training in JAX: the LSS Transformer (arXiv 2311.02382)."""

from lss_jax.flax_attention import attention_fn
from lss_jax.global_attention import dot_product_attention

__all__ = ["attention_fn", "dot_product_attention"]
