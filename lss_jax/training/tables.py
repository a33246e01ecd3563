"""Parameters with a row per position: sharded like the sequence, in its layout and with its padding.

In the training state they are in natural order and without padding; inside `shard_map` each device has the rows of its
own tokens.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from lss_jax.models import Model, Params
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import DATA, sharded_axes
from lss_jax.parallel.scopes import POSITIONS


@jax.named_scope(POSITIONS)
def in_layout_order(params: Params, model: Model, mesh: Mesh | AbstractMesh) -> Params:
    """Local parameters with the rows of each table moved to the devices of their tokens."""
    layout, axes = layout_on(model.config, mesh), _sequence_axes(mesh)
    return model.with_tables(lambda table_pE: layout.from_natural(table_pE, axes), params)


@jax.named_scope(POSITIONS)
def in_natural_order(gradient: Params, model: Model, mesh: Mesh | AbstractMesh) -> Params:
    """A local gradient with the rows of each table back in natural order: the inverse of `in_layout_order`."""
    layout, axes = layout_on(model.config, mesh), _sequence_axes(mesh)
    return model.with_tables(lambda table_pE: layout.to_natural(table_pE, axes), gradient)


def padded(params: Params, model: Model, mesh: Mesh | AbstractMesh) -> Params:
    """Global parameters with rows of zeros added to each table that is sharded like a padded sequence."""
    missing = _missing_rows(model, mesh)
    return model.with_tables(lambda table: jnp.pad(table, ((0, missing), (0, 0))), params) if missing else params


@jax.named_scope(POSITIONS)
def cropped(gradient: Params, model: Model, mesh: Mesh | AbstractMesh) -> Params:
    """A local gradient without the rows that `padded` adds to the parameters.

    A table that the mesh does not divide is replicated in the state, so its gradient is first gathered: explicitly,
    since a gather that XLA inserts where `shard_map` ends has no name of its own from jax 0.12 on.
    """
    missing, axes = _missing_rows(model, mesh), _sequence_axes(mesh)

    def without_padding(table_pE: jax.Array) -> jax.Array:
        table_LE = jax.lax.all_gather(table_pE, axes, tiled=True, to="invarying") if axes else table_pE
        return table_LE[:-missing]

    return model.with_tables(without_padding, gradient) if missing else gradient


def _sequence_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(axis for axis in sharded_axes(mesh) if axis != DATA)


def _missing_rows(model: Model, mesh: Mesh | AbstractMesh) -> int:
    seq_len = model.config.data.seq_len
    return layout_on(model.config, mesh).padded(seq_len) - seq_len
