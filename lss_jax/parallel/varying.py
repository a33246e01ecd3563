"""What loops inside `shard_map` ask for: values that vary over the mesh axes that their successors will vary over."""

from typing import Any

import jax
import jax.numpy as jnp


def varying_like(tree: Any, reference: Any) -> Any:
    """Inside `shard_map`: the arrays of `tree`, varying over all axes that any array of `reference` varies over.

    A loop's carry must vary from the start as all that goes into it.
    """
    zero = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(reference):
        zero = zero + jnp.zeros_like(leaf, shape=(), dtype=jnp.int32)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)
