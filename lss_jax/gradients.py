"""The gradient law (the paper's double gradient averaging).

A gradient is summed over exactly those mesh axes that its parameter's spec does not name: first `seq`, inside the
sequence group, then `data`, across the data groups. A learned position table is cut like the sequence, each device owns
the rows of its tokens, and so it takes part in the second sum alone, with no special case. Dividing by the global token
count afterwards makes the two sums the two averages. Where a segment is cut in turn, over `model`, a sum over its parts
comes before both, for the weights that the model group shares.

Inside `shard_map` with `check_vma=True` differentiating with respect to a parameter that does not vary over an axis
would insert a sum over that axis unasked. So the parameters are first made varying, and the sums below are all there
are; should one be missing, tracing fails.
"""

from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from lss_jax.mesh import DATA, MODEL, SEQ, cut_axes, named_axes


def varying(params: Any, specs: Any, mesh: Mesh) -> Any:
    """Local `params` as values that vary over every cut axis, so that their gradients stay local, partial sums."""

    def cast(param: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.pcast(param, _missing(spec, mesh), to="varying")

    return jax.tree.map(cast, params, specs)


def double_sum(partial: Any, specs: Any, mesh: Mesh) -> Any:
    """Local, partial gradients (and any sums that ride along) to finished ones: an all-reduce per axis.

    What has the same sums to take travels as one vector, since XLA combines many separate sums as it sees fit. The few
    vectors that take a sum together it makes one all-reduce.
    """
    leaves, treedef = jax.tree.flatten(partial)
    missing = [_missing(spec, mesh) for spec in jax.tree.leaves(specs)]
    groups = {axes: [leaf for leaf, a in zip(leaves, missing, strict=True) if a == axes] for axes in missing}
    vectors, unravel = zip(*map(ravel_pytree, groups.values()), strict=True)
    sums = dict(zip(groups, vectors, strict=True))
    sums = _summed(sums, MODEL)  # the parts of one segment
    sums = _summed(sums, SEQ)  # first average: the segments of one sequence
    sums = _summed(sums, DATA)  # second average: the sequences of one batch
    finished = {axes: iter(back(sums[axes])) for axes, back in zip(groups, unravel, strict=True)}
    return jax.tree.unflatten(treedef, [next(finished[axes]) for axes in missing])


def _summed(vectors: dict[tuple[str, ...], jax.Array], axis: str) -> dict[tuple[str, ...], jax.Array]:
    """The vectors, those of them summed that take the sum over `axis`."""
    return {axes: jax.lax.psum(vector, axis) if axis in axes else vector for axes, vector in vectors.items()}


def _missing(spec: PartitionSpec, mesh: Mesh) -> tuple[str, ...]:
    """The cut axes that a spec does not name: over these a gradient is summed."""
    return tuple(axis for axis in cut_axes(mesh) if axis not in named_axes(spec))
