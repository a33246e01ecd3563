"""Few sums instead of many: leaves that are summed over the same axes travel as one vector.

XLA combines many separate sums as it sees fit. The two or three vectors that are left it combines where they take the
same sum.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
from jax.flatten_util import ravel_pytree

Key = TypeVar("Key", bound=Hashable)


def in_buckets(function: Callable[[jax.Array, Key], jax.Array], tree: Any, keys: Sequence[Key]) -> Any:
    """`function(vector, key)` of the leaves of `tree` with the same key, as one vector, and taken apart again.

    Leaves with an empty key are left as they are.
    """
    leaves, treedef = jax.tree.flatten(tree)
    for key in filter(None, dict.fromkeys(keys)):
        bucket = [index for index, other in enumerate(keys) if other == key]
        vector, unravel = ravel_pytree([leaves[index] for index in bucket])
        for index, leaf in zip(bucket, unravel(function(vector, key)), strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(treedef, leaves)
