"""One training step and one evaluation step: each one `shard_map`, then ordinary code over global arrays."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.attention import STRATEGIES
from lss_jax.attention.mask import causal
from lss_jax.data.loader import BATCH_SPECS, Batch
from lss_jax.gradients import double_sum, varying
from lss_jax.losses import LossSum, cross_entropy
from lss_jax.mesh import SEQ, cut_axes, over_cut_axes
from lss_jax.models import Model, Params
from lss_jax.state import TrainState, state_shardings

SUM_SPECS = LossSum(P(), P())  # scalars: they ride along with the gradients, through the same two sums


def make_train_step(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted step: a state (donated) and a global batch to the next state and its `loss` and `grad_norm`."""
    loss_and_gradient = make_loss_and_gradient(model, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, gradient = loss_and_gradient(state.params, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, opt_state), metrics

    kept = state_shardings(model, optimizer, mesh)
    return jax.jit(train_step, out_shardings=(kept, None), donate_argnums=0)


def make_loss_and_gradient(model: Model, mesh: Mesh) -> Callable[[Params, Batch], tuple[jax.Array, Params]]:
    """Mean loss (nats per counted token of the global batch) and its gradient, from global parameters and batch."""
    specs = on_mesh(model.specs, mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, on_mesh(BATCH_SPECS, mesh)), out_specs=(P(), specs))
    def loss_and_gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        params = varying(params, model.specs, mesh)

        def partial_sums(batch: Batch) -> tuple[LossSum, Params]:
            def nats(params: Params) -> tuple[jax.Array, LossSum]:
                sums = local_loss(model, mesh, params, batch)
                return sums.nats, sums

            gradient, sums = jax.grad(nats, has_aux=True)(params)
            return sums, gradient

        sums, gradient = sum_over_microbatches(partial_sums, batch, model.config.optim.accumulate)
        sums, gradient = double_sum((sums, gradient), (SUM_SPECS, model.specs), mesh)
        return sums.mean(), jax.tree.map(lambda leaf: leaf / jnp.maximum(sums.tokens, 1.0), gradient)

    return loss_and_gradient


def make_eval_step(model: Model, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted evaluation: global parameters and batch to the batch's `LossSum`, to be added up over batches."""

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(on_mesh(model.specs, mesh), on_mesh(BATCH_SPECS, mesh)), out_specs=SUM_SPECS
    )
    def eval_step(params: Params, batch: Batch) -> LossSum:
        return double_sum(local_loss(model, mesh, params, batch), SUM_SPECS, mesh)

    return jax.jit(eval_step)


def local_loss(model: Model, mesh: Mesh, params: Params, batch: Batch) -> LossSum:
    """This device's share of the loss: its own segment of its own sequences, attention apart."""
    strategy = STRATEGIES[model.config.attention.strategy]
    axis = SEQ if SEQ in cut_axes(mesh) else None
    attend = partial(strategy, mask=causal(batch.positions_L), axis=axis)
    return cross_entropy(model.apply(params, batch.tokens_BL, batch.positions_L, attend), batch.targets_BL)


def sum_over_microbatches(function: Callable[[Batch], Any], batch: Batch, count: int) -> Any:
    """`function` of the local batch, as the sum of `function` over `count` equal parts of its rows."""
    if count == 1:
        return function(batch)

    def micro(index: jax.Array | int) -> Batch:
        def rows(array_BL: jax.Array) -> jax.Array:
            size = array_BL.shape[0] // count
            return jax.lax.dynamic_slice_in_dim(array_BL, index * size, size)

        return batch._replace(tokens_BL=rows(batch.tokens_BL), targets_BL=rows(batch.targets_BL))

    def add(index: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, function(micro(index)))

    return jax.lax.fori_loop(1, count, add, function(micro(0)))


def on_mesh(specs: Any, mesh: Mesh) -> Any:
    """The specs, for `shard_map` on this mesh: without the axes that cut nothing."""
    return jax.tree.map(lambda spec: over_cut_axes(spec, mesh), specs)
