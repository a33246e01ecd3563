"""One training step and one evaluation step: each one `shard_map`, then ordinary code over global arrays."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.attention import make_attend
from lss_jax.attention.mask import Intervals, bidirectional, documents, prefix_causal, window
from lss_jax.attention.setting import layout_on, setting_on
from lss_jax.checkpoint import like
from lss_jax.config import Config
from lss_jax.data.loader import IGNORED, Batch, batch_like, batch_specs
from lss_jax.dropout import Dropout, hashed
from lss_jax.gradients import double_sum, varying
from lss_jax.hlo import OPTIMIZER, POSITIONS
from lss_jax.layers import Segment
from lss_jax.losses import LossSum, cross_entropy, cross_entropy_of_shares
from lss_jax.mesh import DATA, MODEL, SEQ, axes_of, cut_axes, if_cut, named_axes, over_cut_axes
from lss_jax.models import Model, Params
from lss_jax.optimizer import make_optimizer
from lss_jax.state import TrainState, init_state, kept_specs, state_shardings
from lss_jax.tensor_parallel import own_part

SUM_SPECS = LossSum(P(), P())  # scalars: they ride along with the gradients, through the same two sums
POSITION_SPECS = LossSum(P((SEQ, MODEL)), P((SEQ, MODEL)))  # one of each position: cut like a position table


def make_train_step(model: Model, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted step: a state (donated) and a global batch to the next state and its `loss` and `grad_norm`.

    If one of these is not finite, parameters and optimizer stay as they are, and `step` goes on to the next batch. Both
    are known to every device anyway, so that this needs no collective.
    """
    loss_and_gradient = make_loss_and_gradient(model, mesh)
    placed = state_shardings(model, optimizer, mesh)

    def updated(state: TrainState, gradient: Params, norm: jax.Array) -> tuple[Params, Any]:
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, norm=norm)
        return optax.apply_updates(state.params, updates), opt_state

    def unchanged(state: TrainState, _gradient: Params, _norm: jax.Array) -> tuple[Params, Any]:
        return state.params, state.opt_state

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, gradient = loss_and_gradient(state.params, batch, state.step)
        with jax.named_scope(OPTIMIZER):
            metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
            good = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            # A choice between programs, not between results: then the update happens in place, without a second state.
            kept = jax.lax.cond(good, updated, unchanged, state, gradient, metrics["grad_norm"])
            kept = jax.lax.with_sharding_constraint(kept, (placed.params, placed.opt_state))
        return TrainState(state.step + 1, *kept), metrics

    return jax.jit(train_step, out_shardings=(placed, None), donate_argnums=0)


def trace_train_step(model: Model, mesh: Mesh) -> jax.stages.Traced:
    """The training step for a state and a batch of which there are shapes alone: to be compiled and looked at."""
    config, optimizer = model.config, make_optimizer(model.config.optim)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, mesh, config.seed))
    state = like(shapes, state_shardings(model, optimizer, mesh))
    layout, packed = layout_on(config, mesh), bool(config.data.separator)
    batch = batch_like(config.data.batch_size, config.data.seq_len, mesh, layout, packed)
    return make_train_step(model, optimizer, mesh).trace(state, batch)


LossAndGradient = Callable[[Params, Batch, jax.Array | int], tuple[jax.Array, Params]]


def make_loss_and_gradient(model: Model, mesh: Mesh) -> LossAndGradient:
    """Mean loss (nats per counted token of the global batch) and its gradient.

    From global parameters, a batch, and the number of the step, which with the seed decides what is dropped.
    """
    specs, kept = on_mesh(model.specs, mesh), on_mesh(kept_specs(model, mesh), mesh)
    of_batch = batch_specs(bool(model.config.data.separator))

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, on_mesh(of_batch, mesh), P()), out_specs=(P(), kept))
    def on_segments(params: Params, batch: Batch, step: jax.Array) -> tuple[jax.Array, Params]:
        params = in_layout_order(varying(params, model.specs, mesh), model, mesh)

        def partial_sums(batch: Batch) -> tuple[LossSum, Params]:
            def nats(params: Params) -> tuple[jax.Array, LossSum]:
                sums = local_loss(model, mesh, params, batch, dropout_of(model.config, mesh, batch, step))
                return sums.nats, sums

            gradient, sums = jax.grad(nats, has_aux=True)(params)
            return sums, gradient

        sums, gradient = sum_over_microbatches(partial_sums, batch, of_batch, model.config.optim.accumulate)
        gradient = in_layout_order(gradient, model, mesh, back=True)
        sums, gradient = double_sum((sums, gradient), (SUM_SPECS, model.specs), mesh)
        gradient = jax.tree.map(lambda leaf: leaf / jnp.maximum(sums.tokens, 1.0), gradient)
        return sums.mean(), cropped(gradient, model, mesh)

    def loss_and_gradient(params: Params, batch: Batch, step: jax.Array | int) -> tuple[jax.Array, Params]:
        return on_segments(padded(params, model, mesh), batch, jnp.asarray(step, jnp.uint32))

    return loss_and_gradient


def make_eval_step(model: Model, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted evaluation: global parameters and batch to the batch's `LossSum`, to be added up over batches."""
    return _sums(model, mesh, SUM_SPECS, over=None)


def make_position_step(model: Model, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted evaluation by position: the same to sums over the sequences alone, `[L]`, padded, in layout order.

    What is cut like the sequence stays so: by the gradient law such sums are taken over `data`.
    """
    return _sums(model, mesh, POSITION_SPECS, over=0)


def _sums(model: Model, mesh: Mesh, specs: LossSum, over: int | None) -> jax.stages.Wrapped:
    """Losses of a batch, summed `over` a dimension or both (`local_loss`), and over the axes not in `specs`."""
    in_specs = on_mesh((model.specs, batch_specs(bool(model.config.data.separator))), mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=on_mesh(specs, mesh))
    def on_segments(params: Params, batch: Batch) -> LossSum:
        params = in_layout_order(params, model, mesh)
        return double_sum(local_loss(model, mesh, params, batch, None, over), specs, mesh)

    return jax.jit(lambda params, batch: on_segments(padded(params, model, mesh), batch))


@jax.named_scope(POSITIONS)
def in_layout_order(params: Params, model: Model, mesh: Mesh, back: bool = False) -> Params:
    """Local parameters (or gradients) with the rows of cut tables where their tokens are, or `back` where they lie."""
    layout, axes = layout_on(model.config, mesh), tuple(axis for axis in cut_axes(mesh) if axis != DATA)
    move = layout.to_natural if back else layout.from_natural
    return jax.tree.map(lambda p, spec: move(p, axes) if SEQ in named_axes(spec) else p, params, model.specs)


def padded(params: Params, model: Model, mesh: Mesh) -> Params:
    """Global parameters with rows of zeros added where a table is cut like a padded sequence."""
    missing = _missing_rows(model, mesh)

    def with_rows(param: jax.Array, spec: P) -> jax.Array:
        return jnp.pad(param, ((0, missing), (0, 0))) if SEQ in named_axes(spec) else param

    return jax.tree.map(with_rows, params, model.specs) if missing else params


@jax.named_scope(POSITIONS)
def cropped(gradient: Params, model: Model, mesh: Mesh) -> Params:
    """The inverse of `padded`, for local gradients: a table that the mesh does not divide is whole on every device.

    The gather is explicit: one that XLA inserts where `shard_map` ends has no name of its own from jax 0.12 on.
    """
    missing = _missing_rows(model, mesh)

    def without_rows(rows: jax.Array, spec: P) -> jax.Array:
        if SEQ not in named_axes(spec):
            return rows
        axes = axes_of(over_cut_axes(spec, mesh)[0])
        whole = jax.lax.all_gather(rows, axes, tiled=True, to="invarying") if axes else rows
        return whole[:-missing]

    return jax.tree.map(without_rows, gradient, model.specs) if missing else gradient


def _missing_rows(model: Model, mesh: Mesh) -> int:
    seq_len = model.config.data.seq_len
    return layout_on(model.config, mesh).padded(seq_len) - seq_len


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


def sum_over_microbatches(function: Callable[[Batch], Any], batch: Batch, specs: Batch, count: int) -> Any:
    """`function` of the local batch, as the sum of `function` over `count` equal parts of its rows."""
    if count == 1:
        return function(batch)

    def micro(index: jax.Array | int) -> Batch:
        def rows(array: jax.Array, spec: P) -> jax.Array:
            if DATA not in spec:
                return array
            axis = tuple(spec).index(DATA)
            size = array.shape[axis] // count
            return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)

        return jax.tree.map(rows, batch, specs)

    def add(index: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, function(micro(index)))

    return jax.lax.fori_loop(1, count, add, function(micro(0)))


def on_mesh(specs: Any, mesh: Mesh) -> Any:
    """The specs, for `shard_map` on this mesh: without the axes that cut nothing."""
    return jax.tree.map(lambda spec: over_cut_axes(spec, mesh), specs)
