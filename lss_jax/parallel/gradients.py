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

from lss_jax.parallel.mesh import DATA, MODEL, SEQ, cut_axes, named_axes
from lss_jax.parallel.scopes import GRADIENTS


def varying(params: Any, specs: Any, mesh: Mesh) -> Any:
    """Local `params` as values that vary over every cut axis, so that their gradients stay local, partial sums."""

    def cast(param: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.pcast(param, _missing(spec, mesh), to="varying")

    return jax.tree.map(cast, params, specs)


@jax.named_scope(GRADIENTS)
def double_sum(partial: Any, specs: Any, mesh: Mesh) -> Any:
    """Local, partial gradients (and any sums that ride along) to finished ones: an all-reduce per axis.

    What has the same sums to take travels as one vector, since XLA combines many separate sums as it sees fit. The few
    vectors that are left, two or three, it combines where they take the same sum.
    """
    leaves, treedef = jax.tree.flatten(partial)
    missing = [_missing(spec, mesh) for spec in jax.tree.leaves(specs)]
    for axes in dict.fromkeys(missing):
        group = [index for index, others in enumerate(missing) if others == axes]
        vector, unravel = ravel_pytree([leaves[index] for index in group])
        if MODEL in axes:
            vector = jax.lax.psum(vector, MODEL)  # before the averages: the parts of one segment
        if SEQ in axes:
            vector = jax.lax.psum(vector, SEQ)  # first average: the segments of one sequence
        if DATA in axes:
            vector = jax.lax.psum(vector, DATA)  # second average: the sequences of one batch
        for index, leaf in zip(group, unravel(vector), strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(treedef, leaves)


def _missing(spec: PartitionSpec, mesh: Mesh) -> tuple[str, ...]:
    """The cut axes that a spec does not name: over these a gradient is summed."""
    return tuple(axis for axis in cut_axes(mesh) if axis not in named_axes(spec))
