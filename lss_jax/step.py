"""One training step and one evaluation step: each one `shard_map`, then ordinary code over global arrays."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lss_jax.attention import make_attend
from lss_jax.attention.mask import Intervals, bidirectional, documents, prefix_causal, window
from lss_jax.attention.setting import layout_on, setting_on
from lss_jax.config import Config
from lss_jax.data.loader import IGNORED, Batch, batch_specs
from lss_jax.dropout import Dropout, hashed
from lss_jax.gradients import double_sum, varying
from lss_jax.layers import Segment
from lss_jax.losses import LossSum, cross_entropy
from lss_jax.mesh import DATA, SEQ, named_axes, over_cut_axes
from lss_jax.models import Model, Params
from lss_jax.state import TrainState, state_shardings

SUM_SPECS = LossSum(P(), P())  # scalars: they ride along with the gradients, through the same two sums


def make_train_step(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted step: a state (donated) and a global batch to the next state and its `loss` and `grad_norm`.

    If one of these is not finite, parameters and optimizer stay as they are, and `step` goes on to the next batch. Both
    are known to every device anyway, so that this needs no collective.
    """
    loss_and_gradient = make_loss_and_gradient(model, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, gradient = loss_and_gradient(state.params, batch, state.step)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        updated = optax.apply_updates(state.params, updates), opt_state
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
        good = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(partial(jnp.where, good), updated, (state.params, state.opt_state))
        return TrainState(state.step + 1, *kept), metrics

    kept = state_shardings(model, optimizer, mesh)
    return jax.jit(train_step, out_shardings=(kept, None), donate_argnums=0)


LossAndGradient = Callable[[Params, Batch, jax.Array | int], tuple[jax.Array, Params]]


def make_loss_and_gradient(model: Model, mesh: Mesh) -> LossAndGradient:
    """Mean loss (nats per counted token of the global batch) and its gradient.

    From global parameters, a batch, and the number of the step, which with the seed decides what is dropped.
    """
    specs, of_batch = on_mesh(model.specs, mesh), batch_specs(bool(model.config.data.separator))

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, on_mesh(of_batch, mesh), P()), out_specs=(P(), specs))
    def on_segments(params: Params, batch: Batch, step: jax.Array) -> tuple[jax.Array, Params]:
        params = in_layout_order(varying(params, model.specs, mesh), model, mesh)

        def partial_sums(batch: Batch) -> tuple[LossSum, Params]:
            def nats(params: Params) -> tuple[jax.Array, LossSum]:
                sums = local_loss(model, mesh, params, batch, dropout_of(model.config, batch, step))
                return sums.nats, sums

            gradient, sums = jax.grad(nats, has_aux=True)(params)
            return sums, gradient

        sums, gradient = sum_over_microbatches(partial_sums, batch, of_batch, model.config.optim.accumulate)
        gradient = in_layout_order(gradient, model, mesh, back=True)
        sums, gradient = double_sum((sums, gradient), (SUM_SPECS, model.specs), mesh)
        return sums.mean(), jax.tree.map(lambda leaf: leaf / jnp.maximum(sums.tokens, 1.0), gradient)

    def loss_and_gradient(params: Params, batch: Batch, step: jax.Array | int) -> tuple[jax.Array, Params]:
        loss, gradient = on_segments(padded(params, model, mesh), batch, jnp.asarray(step, jnp.uint32))
        return loss, cropped(gradient, model, mesh)

    return loss_and_gradient


def make_eval_step(model: Model, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted evaluation: global parameters and batch to the batch's `LossSum`, to be added up over batches."""
    in_specs = on_mesh((model.specs, batch_specs(bool(model.config.data.separator))), mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=SUM_SPECS)
    def on_segments(params: Params, batch: Batch) -> LossSum:
        params = in_layout_order(params, model, mesh)
        return double_sum(local_loss(model, mesh, params, batch, None), SUM_SPECS, mesh)

    return jax.jit(lambda params, batch: on_segments(padded(params, model, mesh), batch))


def in_layout_order(params: Params, model: Model, mesh: Mesh, back: bool = False) -> Params:
    """Local parameters (or gradients) with the rows of cut tables where their tokens are, or `back` where they lie."""
    setting = setting_on(model.config, mesh)
    if setting.axis is None:
        return params
    move = setting.layout.to_natural if back else setting.layout.from_natural
    return jax.tree.map(lambda p, spec: move(p, SEQ) if SEQ in named_axes(spec) else p, params, model.specs)


def padded(params: Params, model: Model, mesh: Mesh) -> Params:
    """Global parameters with rows of zeros added where a table is cut like a padded sequence."""
    missing = _missing_rows(model, mesh)

    def with_rows(param: jax.Array, spec: P) -> jax.Array:
        return jnp.pad(param, ((0, missing), (0, 0))) if SEQ in named_axes(spec) else param

    return jax.tree.map(with_rows, params, model.specs) if missing else params


def cropped(gradient: Params, model: Model, mesh: Mesh) -> Params:
    """The inverse of `padded`. What the mesh does not divide is whole on every device, so it is first gathered."""
    missing = _missing_rows(model, mesh)

    def without_rows(leaf: jax.Array, spec: P) -> jax.Array:
        if SEQ not in named_axes(spec):
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P()))[:-missing]

    return jax.tree.map(without_rows, gradient, model.specs) if missing else gradient


def _missing_rows(model: Model, mesh: Mesh) -> int:
    seq_len = model.config.data.seq_len
    return layout_on(model.config, mesh).padded(seq_len) - seq_len


def local_loss(model: Model, mesh: Mesh, params: Params, batch: Batch, dropout: Dropout | None) -> LossSum:
    """This device's share of the loss: its own segment of its own sequences, attention apart."""
    config = model.config
    segment = Segment(
        positions_l=batch.positions_L,
        attend=make_attend(config.attention.strategy, mask_of(config, batch), setting_on(config, mesh)),
        dropout=dropout,
    )
    in_prefix_l = batch.positions_L < config.attention.prefix - 1  # their next token is in plain sight
    targets_Bl = jnp.where(in_prefix_l, IGNORED, batch.targets_BL)
    return cross_entropy(model.apply(params, batch.tokens_BL, segment), targets_Bl)


def mask_of(config: Config, batch: Batch) -> Intervals:
    """What each local query sees: causal, narrowed or widened as the config says."""
    positions_l, attention, seq_len = batch.positions_L, config.attention, config.data.seq_len
    mask = prefix_causal(positions_l, attention.prefix) & bidirectional(positions_l, seq_len)
    if attention.window:
        mask &= window(positions_l, attention.window)
    if batch.documents_2BL is not None:
        mask &= documents(batch.documents_2BL)
    return mask


def dropout_of(config: Config, batch: Batch, step: jax.Array) -> Dropout | None:
    """Dropout of a step for the rows and positions of a (local) batch, None if nothing is dropped."""
    if not config.model.dropout:
        return None
    return Dropout(config.model.dropout, hashed(jnp.uint32(config.seed), step), batch.row_B, batch.positions_L)


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
