"""Parameters with a row per position: sharded like their sequence, in its layout and with its padding.

In the training state they are in natural order and without padding; inside `shard_map` each device has the rows of its
own tokens. An encoder-decoder has two such tables, of two sequences with a length and a layout each.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from lss_jax.models import Model, Params
from lss_jax.parallel.layout import layout_on, length_of, padded_length
from lss_jax.parallel.mesh import sequence_axes
from lss_jax.parallel.scopes import POSITIONS


@jax.named_scope(POSITIONS)
def in_layout_order(params: Params, model: Model, mesh: Mesh | AbstractMesh) -> Params:
    """Local parameters with the rows of each table moved to the devices of their tokens."""
    axes = sequence_axes(mesh)

    def moved(table_pE: jax.Array, sequence: str) -> jax.Array:
        return layout_on(model.config, mesh, sequence).from_natural(table_pE, axes)

    return model.with_tables(moved, params)


@jax.named_scope(POSITIONS)
def in_natural_order(gradient: Params, model: Model, mesh: Mesh | AbstractMesh) -> Params:
    """A local gradient with the rows of each table back in natural order: the inverse of `in_layout_order`."""
    axes = sequence_axes(mesh)

    def moved_back(table_pE: jax.Array, sequence: str) -> jax.Array:
        return layout_on(model.config, mesh, sequence).to_natural(table_pE, axes)

    return model.with_tables(moved_back, gradient)


def padded(params: Params, model: Model, mesh: Mesh | AbstractMesh) -> Params:
    """Global parameters with rows of zeros added to each table that is sharded like a padded sequence."""

    def with_padding(table_LE: jax.Array, sequence: str) -> jax.Array:
        missing = _missing_rows(model, mesh, sequence)
        return jnp.pad(table_LE, ((0, missing), (0, 0))) if missing else table_LE

    return model.with_tables(with_padding, params)


@jax.named_scope(POSITIONS)
def cropped(gradient: Params, model: Model, mesh: Mesh | AbstractMesh) -> Params:
    """A local gradient without the rows that `padded` adds to the parameters.

    A table that the mesh does not divide is replicated in the state, so its gradient is first gathered: explicitly,
    since a gather that XLA inserts where `shard_map` ends has no name of its own from jax 0.12 on.
    """
    axes = sequence_axes(mesh)

    def without_padding(table_pE: jax.Array, sequence: str) -> jax.Array:
        missing = _missing_rows(model, mesh, sequence)
        if not missing:
            return table_pE
        table_LE = jax.lax.all_gather(table_pE, axes, tiled=True, to="invarying") if axes else table_pE
        return table_LE[:-missing]

    return model.with_tables(without_padding, gradient)


def _missing_rows(model: Model, mesh: Mesh | AbstractMesh, sequence: str) -> int:
    return padded_length(model.config, mesh, sequence) - length_of(model.config, sequence)
