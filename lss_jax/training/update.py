"""The optimizer's update: of global arrays under `jit`, and a slice at a time of those that rest in host memory.

Such arrays are updated on their own devices, inside `shard_map`. An optimizer that treats every element by itself,
once it knows the gradient's norm, does not see the difference.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.models import Model, Params
from lss_jax.parallel.host_memory import streamed, streamed_sum
from lss_jax.parallel.mesh import sharded_axes, without_unsharded
from lss_jax.training.state import TrainState, of_moments

COUNTS = ""  # the name of what an optimizer counts, which belongs to no parameter


def make_norm(model: Model, mesh: Mesh | AbstractMesh) -> Callable[[Params], jax.Array]:
    """The function from a gradient (global arrays) to its global norm, float32."""
    names, axes = _names(model), sharded_axes(mesh)
    on_host = _on_host(model, mesh)

    def norm(gradient: Params) -> jax.Array:
        on_device = optax.tree.norm(_without(on_host, gradient, names))
        if not on_host:
            return on_device

        def squares(shards: list[jax.Array]) -> jax.Array:
            total = jax.lax.pcast(jnp.float32(0), axes, to="varying")
            for shard in shards:
                total = streamed_sum(lambda part: jnp.sum(jnp.square(part)), shard, total)
            return jax.lax.psum(total, axes)

        shards = [leaf for name in on_host for leaf in jax.tree.leaves(_only([name], gradient, names))]
        sharded = jax.shard_map(squares, mesh=mesh, in_specs=(list(on_host.values()),), out_specs=P())
        return jnp.sqrt(jnp.square(on_device) + sharded(shards))

    return norm


Update = Callable[[TrainState, Params, jax.Array, jax.Array], tuple[Params, Any]]


def make_update(model: Model, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh | AbstractMesh) -> Update:
    """The function from state, gradient, its norm, and whether both are finite, to the next parameters and moments.

    If they are not finite, parameters and moments stay as they are. What is not trained has no gradient, and stays.
    """
    names, on_host = _names(model), _on_host(model, mesh)
    owners = of_moments(optimizer, model, names, of_others=lambda _: COUNTS)

    def updated(params: Params, opt_state: Any, gradient: Params, norm: jax.Array) -> tuple[Params, Any]:
        updates, opt_state = optimizer.update(gradient, opt_state, params, norm=norm)
        return optax.apply_updates(params, updates), opt_state

    def unchanged(params: Params, opt_state: Any, _gradient: Params, _norm: jax.Array) -> tuple[Params, Any]:
        return params, opt_state

    def update_on_host(name: str, state: TrainState, gradient: Params, norm: jax.Array, finite: jax.Array) -> Any:
        """One parameter and its moments after the update."""

        def of_shards(old: Any, gradient: Params, counts: Any, norm: jax.Array, finite: jax.Array) -> Any:
            def of_slices(old: tuple[Params, Any], gradient: Params) -> tuple[Params, Any]:
                params, moments = old
                params, opt_state = updated(params, _together(moments, counts), gradient, norm)
                new = params, _only([name], opt_state, owners)
                return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

            return streamed(of_slices, old, gradient)

        spec = on_host[name]
        sharded = jax.shard_map(of_shards, mesh=mesh, in_specs=(spec, spec, P(), P(), P()), out_specs=spec)
        old = _only([name], state.params, names), _only([name], state.opt_state, owners)
        counts = _only([COUNTS], state.opt_state, owners)
        return sharded(old, _only([name], gradient, names), counts, norm, finite)

    def update(state: TrainState, gradient: Params, norm: jax.Array, finite: jax.Array) -> tuple[Params, Any]:
        all_params = state.params
        state = state._replace(params=model.only_trained(all_params))
        params, grads = (_without(on_host, tree, names) for tree in (state.params, gradient))
        opt_state = _without(on_host, state.opt_state, owners)
        # `cond` rather than `where`: the update is then in place, without a second copy of the state.
        new = jax.lax.cond(finite, updated, unchanged, params, opt_state, grads, norm)
        for name in on_host:
            new = _together(new, update_on_host(name, state, gradient, norm, finite))
        trained, opt_state = new
        return model.with_part(trained, all_params), opt_state

    return update


def _names(model: Model) -> Params:
    """The trained parameters' names, such as `stack/blocks/mlp/up/kernel`, in a tree like them."""
    return model.only_trained(model.names)


def _on_host(model: Model, mesh: Mesh | AbstractMesh) -> dict[str, P]:
    """The specs, by name, of the trained parameters that rest in host memory."""
    trees = map(model.only_trained, (model.names, model.specs, model.on_host))
    leaves = zip(*map(jax.tree.leaves, trees), strict=True)
    return {name: without_unsharded(spec, mesh) for name, spec, on_host in leaves if on_host}


def _only(kept: Collection[str], tree: Any, names: Any) -> Any:
    """The tree with None, which JAX and Optax pass over, in the place of everything with another name."""
    return jax.tree.map(lambda leaf, name: leaf if name in kept else None, tree, names, is_leaf=_is_none)


def _without(left_out: Collection[str], tree: Any, names: Any) -> Any:
    return jax.tree.map(lambda leaf, name: None if name in left_out else leaf, tree, names)


def _together(one: Any, other: Any) -> Any:
    """Two trees in one: each has None where the other has something."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None
