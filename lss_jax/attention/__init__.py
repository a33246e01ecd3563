"""Sequence-parallel attention: the strategies (`lss`, `ring`, `ulysses`), the masks, and the kernels below them."""
