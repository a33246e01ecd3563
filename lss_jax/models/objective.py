"""The mask, the dropout and the loss of a local batch."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lss_jax.attention.mask import Intervals, bidirectional, documents, prefix_causal, window
from lss_jax.attention.placement import setting_on
from lss_jax.attention.strategies import make_attend
from lss_jax.config.schema import Config
from lss_jax.data.batch import IGNORED, Batch
from lss_jax.models import Model, Params
from lss_jax.models.layers import Segment
from lss_jax.models.losses import LossSum, cross_entropy, cross_entropy_of_shares
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.hashing import hashed
from lss_jax.parallel.mesh import MODEL, if_cut
from lss_jax.parallel.tensor_parallel import own_part


def local_loss(
    model: Model, mesh: Mesh, params: Params, batch: Batch, dropout: Dropout | None, over: int | None = None
) -> LossSum:
    """This device's share of the loss: its own part of the segment, of its own sequences, summed `over` 0, or both."""
    config, axis = model.config, if_cut(MODEL, mesh)
    mask = mask_of(config, batch.positions_L, batch.documents_2BL)
    positions_p = own_part(batch.positions_L, axis, 0)
    segment = Segment(
        positions_l=batch.positions_L,
        positions_p=positions_p,
        attend=make_attend(config.attention.strategy, mask, setting_on(config, mesh)),
        dropout=dropout and dropout._replace(position_l=positions_p),
        model_axis=axis,
    )
    in_prefix_l = batch.positions_L < config.attention.prefix - 1  # their next token is in plain sight
    targets_Bl = jnp.where(in_prefix_l, IGNORED, batch.targets_BL)
    logits = model.apply(params, batch.tokens_BL, segment)
    if axis and config.model.vocab_parallel:
        return cross_entropy_of_shares(logits, targets_Bl, axis, over)
    return cross_entropy(logits, own_part(targets_Bl, axis, 1), over)


def mask_of(config: Config, positions_l: jax.Array, documents_2Bl: jax.Array | None) -> Intervals:
    """What each local query sees: causal, narrowed or widened as the config says, its own document alone."""
    attention, seq_len = config.attention, config.data.seq_len
    mask = prefix_causal(positions_l, attention.prefix) & bidirectional(positions_l, seq_len)
    if attention.window:
        mask &= window(positions_l, attention.window)
    if documents_2Bl is not None:
        mask &= documents(documents_2Bl)
    return mask


def dropout_of(config: Config, mesh: Mesh, batch: Batch, step: jax.Array) -> Dropout | None:
    """Dropout of a step for the rows and positions of a (local) batch, None if nothing is dropped."""
    if not config.model.dropout:
        return None
    axis = if_cut(MODEL, mesh)
    first_head = jax.lax.axis_index(axis) * (config.model.heads // mesh.shape[MODEL]) if axis else 0
    key = hashed(jnp.uint32(config.seed), step)
    return Dropout(config.model.dropout, key, batch.row_B, batch.positions_L, first_head)
