"""Heads in groups: one group's queries, keys and values exist at a time, in the forward and in the backward pass.

What UPipe does for Ulysses (arXiv 2602.21196), for every strategy: a group's collectives move its own heads alone. In
the backward pass a group is recomputed but for its attention, whose output is saved.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lss_jax.attention.pairs import Pairs
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.residuals import ATTENDED, COMMUNICATED

SAVED = jax.checkpoint_policies.save_only_these_names(ATTENDED, COMMUNICATED)


def over_head_groups(one_group: Callable[..., tuple[Any, Any]], init: Any, groups: Any) -> tuple[Any, Any]:
    """Scans `one_group(carry, group, number) -> (carry, output)` over a tree of arrays with the groups on axis 0.

    Returns the last carry, and the outputs of all groups on a new leading axis.
    """
    count = len(jax.tree.leaves(groups)[0])
    body = jax.checkpoint(one_group, policy=SAVED, prevent_cse=False)
    return jax.lax.scan(lambda carry, group: body(carry, *group), init, (groups, jnp.arange(count)))


def in_head_groups(attend: Callable[..., jax.Array], count: int) -> Callable[..., jax.Array]:
    """Attention on its own, `(q_BlHK, k_BlGK, v_BlGK, dropout, pairs) -> o_BlHK`, for groups of heads in turn."""
    if count == 1:
        return attend

    def attend_in_groups(
        q_BlHK: jax.Array,
        k_BlGK: jax.Array,
        v_BlGK: jax.Array,
        dropout: Dropout | None = None,
        pairs: Pairs | None = None,
    ) -> jax.Array:
        heads = q_BlHK.shape[2] // count

        def one_group(_: None, group: Any, number: jax.Array) -> tuple[None, jax.Array]:
            of_group = (whole and whole.of_group(number, heads) for whole in (dropout, pairs))
            return None, attend(*group, *of_group)

        groups = tuple(jnp.stack(jnp.split(x, count, axis=2)) for x in (q_BlHK, k_BlGK, v_BlGK))
        _, of_groups = over_head_groups(one_group, None, groups)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(*q_BlHK.shape[:3], *x.shape[4:]), of_groups)

    return attend_in_groups
