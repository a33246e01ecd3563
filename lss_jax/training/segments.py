"""The context that layers have of a device's segment: positions, masks and attention, dropout, and the source."""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.mask import Intervals, of_patches
from lss_jax.attention.placement import setting_on
from lss_jax.attention.setting import CROSS, IN_SOURCE, SELF, Between
from lss_jax.attention.strategies import make_attend
from lss_jax.config.schema import Config
from lss_jax.models.layers import AttendWithPast, Segment, Source, without_past
from lss_jax.parallel.dropout import OF_SOURCE, Dropout
from lss_jax.parallel.mesh import MODEL, axis_if_sharded, sequence_axes
from lss_jax.parallel.scopes import ATTENTION, CROSS_ATTENTION
from lss_jax.parallel.tensor_parallel import own_part
from lss_jax.tasks import make_task


def segment_of(config: Config, mesh: Mesh | AbstractMesh, batch: Any, dropout: Dropout | None) -> Segment:
    """The context of this device's segment of a local batch, and of its segment of the source, if the task has one."""
    task = make_task(config)
    source_s = task.source_positions(batch)

    def attend(between: Between, mask: Intervals, scope: str) -> AttendWithPast:
        over = of_patches(mask, config.model.patch) if config.model.patch else mask
        setting = setting_on(config, mesh, between, task.mask_kind)
        return without_past(make_attend(config.attention.strategy, over, setting, scope))

    def within(between: Between, positions_l: jax.Array, embedded_l: jax.Array, dropout: Dropout | None) -> Segment:
        axis, mask = axis_if_sharded(MODEL, mesh), task.mask_between(between, positions_l, batch)
        positions_p, sees_l = own_part(positions_l, axis, 0), mask.start < mask.end
        return Segment(
            positions_l=positions_l,
            positions_p=positions_p,
            embedded_l=embedded_l,
            is_token_p=own_part(sees_l, axis, sees_l.ndim - 1),
            attend=attend(between, mask, ATTENTION),
            head_groups=config.attention.head_groups,
            dropout=dropout and dropout._replace(position_l=positions_p),
            model_axis=axis,
            sequence_axes=sequence_axes(mesh),
            source=None,
        )

    segment = within(SELF, batch.positions, task.positions(batch), dropout)
    if source_s is None:
        return segment
    of_source = within(IN_SOURCE, source_s, source_s, dropout and dropout.at(OF_SOURCE))
    seen = task.mask_between(CROSS, batch.positions, batch)
    return segment._replace(source=Source(of_source, attend(CROSS, seen, CROSS_ATTENTION)))
