"""One training step and one evaluation step: each one `shard_map`, then ordinary code over global arrays."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.config.schema import Config
from lss_jax.models import Model, Params
from lss_jax.models.outputs import PerToken, Pooled
from lss_jax.parallel.dropout import Dropout
from lss_jax.parallel.gradients import double_sum, varying
from lss_jax.parallel.hashing import hashed
from lss_jax.parallel.host_memory import elementwise, is_on_host, zeros_on_host
from lss_jax.parallel.mesh import DATA, MODEL, SEQ, axis_if_sharded, named_axes, sharded_axes, without_unsharded
from lss_jax.parallel.scopes import OPTIMIZER
from lss_jax.tasks import make_task
from lss_jax.tasks.task import Means, count_of, means_of
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.segments import segment_of
from lss_jax.training.state import TrainState, param_specs, state_like, state_shardings
from lss_jax.training.tables import cropped, in_layout_order, in_natural_order, padded
from lss_jax.training.update import make_norm, make_update


def make_train_step(
    model: Model, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh | AbstractMesh
) -> jax.stages.Wrapped:
    """The jitted training step: from a state (donated) and a global batch to the next state and metrics.

    The metrics are the task's means and `grad_norm`. If the loss or the norm is not finite, parameters and optimizer
    state stay as they are, and `step` still counts. Every device knows both numbers, so this needs no collective.
    """
    means_and_gradient, placed = make_means_and_gradient(model, mesh), state_shardings(model, optimizer, mesh)
    norm, update = make_norm(model, mesh), make_update(model, optimizer, mesh)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        means, gradient = means_and_gradient(state.params, batch, state.step)
        with jax.named_scope(OPTIMIZER):
            metrics = {**means, "grad_norm": norm(gradient)}
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            new = update(state, gradient, metrics["grad_norm"], finite)
            new = jax.lax.with_sharding_constraint(new, (placed.params, placed.opt_state))
        return TrainState(state.step + 1, *new), metrics

    return jax.jit(train_step, out_shardings=(placed, None), donate_argnums=0)


def trace_train_step(model: Model, mesh: Mesh | AbstractMesh) -> jax.stages.Traced:
    """The training step, traced from shapes alone: to be compiled and inspected."""
    config, optimizer = model.config, make_optimizer(model.config.optim)
    state, batch = state_like(model, optimizer, mesh), make_task(config).batch_like(mesh)
    return make_train_step(model, optimizer, mesh).trace(state, batch)


MeansAndGradient = Callable[[Params, Any, jax.Array | int], tuple[Means, Params]]


def make_means_and_gradient(model: Model, mesh: Mesh | AbstractMesh) -> MeansAndGradient:
    """The function that returns a batch's means (`loss`, per counted item, and the task's others) and its gradient.

    Its arguments are global parameters, a global batch, and the step's number, which with the seed decides what is
    dropped. The gradient is that of the trained parameters alone (`Model.only_trained`). Sums over the mesh become
    means here: all are divided by the global count, once, after both sums.
    """
    task = make_task(model.config)
    specs, batch_specs = on_mesh(model.specs, mesh), task.batch_specs()
    trained_specs, stored = map(model.only_trained, (model.specs, on_mesh(param_specs(model, mesh), mesh)))

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, on_mesh(batch_specs, mesh), P()), out_specs=(P(), stored))
    def on_segments(params: Params, batch: Any, step: jax.Array) -> tuple[Means, Params]:
        params = in_layout_order(varying(params, model.specs, mesh), model, mesh)

        def partial_sums(batch: Any) -> tuple[Any, Params]:
            def loss(trained: Params) -> tuple[jax.Array, Any]:
                dropout = dropout_of(model.config, mesh, batch, step)
                losses = local_losses(model, mesh, model.with_part(trained, params), batch, dropout)
                sums = jax.tree.map(partial(jnp.sum, axis=(0, 1)), losses)
                return sums[0], sums

            gradient, sums = jax.grad(loss, has_aux=True)(model.only_trained(params))
            return sums, gradient

        sums, gradient = sum_over_microbatches(partial_sums, batch, batch_specs, model.config.optim.accumulate, mesh)
        gradient = in_natural_order(gradient, model, mesh)
        sums, gradient = double_sum((sums, gradient), (jax.tree.map(lambda _: P(), sums), trained_specs), mesh)
        count = count_of(sums)
        gradient = jax.tree.map(partial(elementwise, lambda leaf: leaf / count), gradient)
        return means_of(sums), cropped(gradient, model, mesh)

    def means_and_gradient(params: Params, batch: Any, step: jax.Array | int) -> tuple[Means, Params]:
        return on_segments(padded(params, model, mesh), batch, jnp.asarray(step, jnp.uint32))

    return means_and_gradient


def make_eval_step(model: Model, mesh: Mesh | AbstractMesh) -> jax.stages.Wrapped:
    """The jitted evaluation step: from global parameters and a global batch to the task's sums."""
    return _sums(model, mesh, over=(0, 1), spec=P())


def make_position_step(model: Model, mesh: Mesh | AbstractMesh) -> jax.stages.Wrapped:
    """The jitted evaluation step by position: the task's sums over sequences alone, `[L]` each.

    They are global, padded and in layout order. They stay sharded like the sequence, so that by the gradient law they
    are summed over `data` alone.
    """
    return _sums(model, mesh, over=0, spec=P((SEQ, MODEL)))


def _sums(model: Model, mesh: Mesh | AbstractMesh, over: int | tuple[int, int], spec: P) -> jax.stages.Wrapped:
    """The jitted sums of the task's losses over dimensions `over`, and the mesh axes that `spec` omits."""
    task = make_task(model.config)
    in_specs = on_mesh((model.specs, task.batch_specs()), mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=without_unsharded(spec, mesh))
    def on_segments(params: Params, batch: Any) -> Any:
        losses = local_losses(model, mesh, in_layout_order(params, model, mesh), batch, None)
        sums = jax.tree.map(lambda losses_Bp: jnp.sum(losses_Bp, over), losses)
        return double_sum(sums, jax.tree.map(lambda _: spec, sums), mesh)

    return jax.jit(lambda params, batch: on_segments(padded(params, model, mesh), batch))


def make_prediction_step(
    model: Model, mesh: Mesh | AbstractMesh, predict: Callable[[jax.Array], jax.Array]
) -> jax.stages.Wrapped:
    """The jitted step from global parameters and a global batch to what `predict` makes of each token's outputs.

    Predictions, `[B, L]` or `[B, L, ...]`, are global, padded and in layout order, and stay sharded like the tokens.
    """
    in_specs, spec = on_mesh((model.specs, make_task(model.config).batch_specs()), mesh), P(DATA, (SEQ, MODEL))

    @partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=without_unsharded(spec, mesh))
    def on_segments(params: Params, batch: Any) -> jax.Array:
        local, segment = in_layout_order(params, model, mesh), segment_of(model.config, mesh, batch, None)
        outputs = model.apply(local, make_task(model.config).inputs(batch), segment)
        assert isinstance(outputs, PerToken), "the task predicts something for each token"
        return outputs.reduced(lambda outputs, _tokens, _context: predict(outputs), None, None)

    return jax.jit(lambda params, batch: on_segments(padded(params, model, mesh), batch))


def local_losses(model: Model, mesh: Mesh | AbstractMesh, params: Params, batch: Any, dropout: Dropout | None) -> Any:
    """The task's losses on this device's part of its segment, `[B, p]` each, from local parameters and batch.

    Those of whole sequences are `[B, 1]`, and zero but on the first device of those that share a sequence.
    """
    axis, task = axis_if_sharded(MODEL, mesh), make_task(model.config)
    segment = segment_of(model.config, mesh, batch, dropout)
    outputs = model.apply(params, task.inputs(batch), segment)
    if isinstance(outputs, Pooled):
        first = jnp.array([jax.lax.axis_index(axis) == 0 for axis in segment.sequence_axes]).all()
        whole = task.losses(outputs.logits_BC, batch, axis)
        return jax.tree.map(lambda losses_B1: jnp.where(first, losses_B1, 0.0), whole)
    if not isinstance(outputs, PerToken):
        return task.losses(outputs, batch, axis)
    # What has tokens goes with them in tiles, and all else to each.
    batch, specs = map(task.counted_part, (batch, task.batch_specs()))
    of_tokens = jax.tree.map(lambda array, spec: array if SEQ in named_axes(spec) else None, batch, specs)
    others = jax.tree.map(lambda array, spec: None if SEQ in named_axes(spec) else array, batch, specs)

    def losses(outputs: Any, of_tile: Any, others: Any) -> Any:
        tile = type(batch)(*(a if b is None else b for a, b in zip(others, of_tile, strict=True)))
        return task.losses(outputs, tile, axis)

    return outputs.reduced(losses, of_tokens, others)


def dropout_of(config: Config, mesh: Mesh | AbstractMesh, batch: Any, step: jax.Array) -> Dropout | None:
    """The dropout of a step for the rows and positions of a local batch, None if nothing is dropped."""
    if not config.model.dropout:
        return None
    axis = axis_if_sharded(MODEL, mesh)
    first_head = jax.lax.axis_index(axis) * (config.model.heads // mesh.shape[MODEL]) if axis else 0
    key = hashed(jnp.uint32(config.seed), step)
    return Dropout(config.model.dropout, key, row_B=batch.rows, position_l=batch.positions, first_head=first_head)


def sum_over_microbatches(
    function: Callable[[Any], Any], batch: Any, specs: Any, count: int, mesh: Mesh | AbstractMesh
) -> Any:
    """Sums `function` over `count` equal parts of a local batch's rows (gradient accumulation)."""
    if count == 1:
        return function(batch)

    def micro(index: jax.Array | int) -> Any:
        def micro_rows(array: jax.Array, spec: P) -> jax.Array:
            if DATA not in spec:
                return array
            axis = tuple(spec).index(DATA)
            size = array.shape[axis] // count
            return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)

        return jax.tree.map(micro_rows, batch, specs)

    def add(index: jax.Array, total: Any) -> Any:
        return jax.tree.map(partial(elementwise, jnp.add), total, function(micro(index)))

    def nothing(aval: Any) -> jax.Array:
        zero = jax.lax.pcast(jnp.zeros((), aval.dtype), sharded_axes(mesh), to="varying")
        return zeros_on_host(aval.shape, zero) if is_on_host(aval) else jnp.broadcast_to(zero, aval.shape)

    traced, shapes = jax.make_jaxpr(lambda: function(micro(0)), return_shape=True)()  # with the arrays' memory
    start = jax.tree.unflatten(jax.tree.structure(shapes), map(nothing, traced.out_avals))
    return jax.lax.fori_loop(0, count, add, start)


def on_mesh(specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The specs for `shard_map` on this mesh: without its axes of size 1."""
    return jax.tree.map(lambda spec: without_unsharded(spec, mesh), specs)
