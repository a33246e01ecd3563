"""The gradient law (the paper's double gradient averaging).

A gradient is summed over exactly those mesh axes that its parameter's spec does not name: first `seq`, inside the
sequence group, then `data`, across the data groups. A learned position table is sharded like the sequence, each device
owns the rows of its tokens, and so it takes part in the second sum alone, with no special case. Where a segment is
sharded in turn, over `model`, a sum over its parts comes before both, for the weights that the model group shares.

The division that makes averages of sums is in the training step (`training/step.py`): by the global number of counted
tokens, after both sums. That number goes through the same sums, with the gradients.

Inside `shard_map` with `check_vma=True` differentiating with respect to a parameter that does not vary over an axis
would insert a sum over that axis unasked. So the parameters are first made varying, and the sums below are all there
are; should one be missing, tracing fails.

Weights that are sharded at rest keep the same law in another form: `weights`.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lss_jax.parallel.buckets import in_buckets
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, named_axes, sharded_axes
from lss_jax.parallel.scopes import GRADIENTS


def reduction_axes(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes over which a gradient is summed: those that shard the step, but not its parameter."""
    return tuple(axis for axis in sharded_axes(mesh) if axis not in named_axes(spec))


def finished(partial: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A device's partial gradient summed over `axes`, one all-reduce each, in the order of the law."""
    if MODEL in axes:
        partial = jax.lax.psum(partial, MODEL)  # before the averages: the parts of one segment
    if SEQ in axes:
        partial = jax.lax.psum(partial, SEQ)  # first average: the segments of one sequence
    if DATA in axes:
        partial = jax.lax.psum(partial, DATA)  # second average: the sequences of one batch
    return partial


@jax.named_scope(GRADIENTS)
def double_sum(partial: Any, specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Local, partial gradients (and any sums that ride along) to finished ones, a few vectors at a time."""
    return in_buckets(finished, partial, [reduction_axes(spec, mesh) for spec in jax.tree.leaves(specs)])


def varying(params: Any, specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Local `params` as values that vary over the axes of their sums: their gradients stay local, partial sums."""

    def cast(param: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.pcast(param, reduction_axes(spec, mesh), to="varying")

    return jax.tree.map(cast, params, specs)
