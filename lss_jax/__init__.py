"""Sequence-parallel transformer training in JAX: the LSS Transformer (arXiv 2311.02382)."""
