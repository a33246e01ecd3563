"""The gradient law (the paper's double gradient averaging).

A gradient is summed over exactly those mesh axes that its parameter's spec does not name: first `seq`, inside the
sequence group, then `data`, across the data groups. A learned position table has the spec `P("seq")`, each device owns
the rows of its segment, and so it takes part in the second sum alone, with no special case. Dividing by the global
token count afterwards makes the two sums the two averages.

Inside `shard_map` with `check_vma=True` differentiating with respect to a parameter that does not vary over an axis
would insert a sum over that axis unasked. So the parameters are first made varying, and the sums below are all there
are; should one be missing, tracing fails.
"""

from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from lss_jax.mesh import DATA, SEQ, cut_axes, named_axes


def varying(params: Any, specs: Any, mesh: Mesh) -> Any:
    """Local `params` as values that vary over every cut axis, so that their gradients stay local, partial sums."""

    def cast(param: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.pcast(param, tuple(set(cut_axes(mesh)) - named_axes(spec)), to="varying")

    return jax.tree.map(cast, params, specs)


def double_sum(partial: Any, specs: Any, mesh: Mesh) -> Any:
    """Local, partial gradients (and any sums that ride along) to finished ones: two all-reduces for the whole tree."""
    owned, shared = _split(partial, specs)  # rows of one segment; everything else
    if SEQ in cut_axes(mesh):
        shared = _fused_psum(shared, SEQ)  # first average: the segments of one sequence
    if DATA in cut_axes(mesh):
        owned, shared = _fused_psum(owned, DATA), _fused_psum(shared, DATA)  # second: the sequences of one batch
    return jax.tree.map(lambda a, b: b if a is None else a, owned, shared, is_leaf=lambda leaf: leaf is None)


def _split(tree: Any, specs: Any) -> tuple[Any, Any]:
    """The leaves whose spec names `seq`, and all others; both like `tree`, with None in the gaps."""
    owned = jax.tree.map(lambda leaf, spec: leaf if SEQ in named_axes(spec) else None, tree, specs)
    shared = jax.tree.map(lambda leaf, spec: None if SEQ in named_axes(spec) else leaf, tree, specs)
    return owned, shared


def _fused_psum(tree: Any, axis: str) -> Any:
    """The sum of every leaf, in one collective: as one vector, since XLA combines separate sums as it sees fit."""
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.psum(vector, axis)) if vector.size else tree
