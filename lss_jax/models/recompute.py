"""Layers of which the input alone waits for the backward pass, on the device or in host memory: both passes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.setting import Between
from lss_jax.attention.traffic import sizes_of
from lss_jax.config.schema import Config, ModelConfig
from lss_jax.parallel.host_memory import empty_on_host, is_on_host, to_device, to_host
from lss_jax.parallel.layout import SEQUENCE, SOURCE
from lss_jax.parallel.mesh import MODEL, has_host_memory
from lss_jax.parallel.varying import varying_like

LARGEST_HOST_BUFFER = 2**37  # bytes, 128 GiB: libtpu takes no larger one, and at present no more in all, state apart

# Of `x_BpE`, of what all layers share, and of a layer's own parameters and other arrays.
Layer = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]


def waiting(config: Config, mesh: Mesh | AbstractMesh, sequence: str = SEQUENCE) -> int:
    """Bytes per device of the inputs of a sequence's layers that wait in host memory for the backward pass."""
    sizes, model = sizes_of(config, mesh, Between(sequence, sequence)), config.model
    if model.remat != "offload" or not has_host_memory(mesh):
        return 0
    layers = {SEQUENCE: model.layers, SOURCE: model.encoder_layers}[sequence]
    part = sizes.B * sizes.l // mesh.shape[MODEL] * model.width
    return layers // model.remat_every * part * sizes.itemsize


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recomputed(
    layer: Layer, model: ModelConfig, x_BpE: jax.Array, shared: Any, params: Any, others: Any
) -> tuple[jax.Array, Any]:
    """Applies `layer(x_BpE, shared, (params, others))` for each layer; returns what is left, and their other results.

    In the backward pass there are no gradients of `others`, and no other results. Of every `remat_every` layers the
    input is saved, with `remat="offload"` in host memory, and these layers are recomputed from it in turn.

    Args:
      layer: may close over arrays that have no gradient.
      model: of `layers` layers.
      x_BpE: the residual stream of this device's part.
      shared: a tree of arrays that every layer reads, whose gradient is the sum over layers; or None.
      params: a tree of arrays with the layers first, on the device or on the host; so are their gradients.
      others: a tree of arrays with the layers first.
    """

    def some_layers(x_BpE: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        return _some_layers(layer, model, x_BpE, shared, _layers_of((params, others), start, model))

    x_BpE, own = _over_layers(some_layers, model, x_BpE)
    return x_BpE, jax.tree.map(lambda leaf: leaf.reshape(model.layers, *leaf.shape[2:]), own)


def _forward(layer, model, x_BpE, shared, params, others):
    def some_layers(x_BpE: jax.Array, start: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        y_BpE, own = _some_layers(layer, model, x_BpE, shared, _layers_of((params, others), start, model))
        assert not jax.tree.leaves(own), "the backward pass knows no gradient of other results"
        return y_BpE, _saved(x_BpE, model)

    y_BpE, inputs = _over_layers(some_layers, model, x_BpE)
    return (y_BpE, None), (inputs, shared, params, others)


def _backward(layer, model, saved, cotangents):
    (inputs, shared, params, others), (dx_BpE, _) = saved, cotangents

    def some_layers(carry: Any, start: jax.Array, pieces: list[jax.Array]) -> tuple[Any, None]:
        dx_BpE, d_shared, d_params = carry
        x_BpE = jnp.concatenate([to_device(piece) for piece in pieces], axis=1)
        of_params, of_others = _layers_of((params, others), start, model)

        def from_input(x_BpE: jax.Array, shared: Any, of_params: Any) -> jax.Array:
            return _some_layers(layer, model, x_BpE, shared, (of_params, of_others))[0]

        _, pullback = jax.vjp(from_input, x_BpE, shared, of_params)
        dx_BpE, more, d_of_params = pullback(dx_BpE)
        d_shared = jax.tree.map(jnp.add, d_shared, more)
        return (dx_BpE, d_shared, jax.tree.map(partial(_put, start=start), d_params, d_of_params)), None

    nothing = varying_like(jax.tree.map(jnp.zeros_like, shared), (shared, dx_BpE))
    start = dx_BpE, nothing, jax.tree.map(_empty, params)
    (dx_BpE, d_shared, d_params), _ = _over_layers(some_layers, model, start, inputs)
    return dx_BpE, d_shared, d_params, None


recomputed.defvjp(_forward, _backward)


def _saved(x_BpE: jax.Array, model: ModelConfig) -> list[jax.Array]:
    """The input as it is saved: with `remat="offload"` in host memory, in as many pieces as its stack needs buffers."""
    if model.remat != "offload":
        return [x_BpE]
    pieces = -(-model.layers // model.remat_every * x_BpE.nbytes // LARGEST_HOST_BUFFER)
    return [to_host(piece) for piece in jnp.array_split(x_BpE, pieces, axis=1)]


def _over_layers(some_layers: Callable, model: ModelConfig, carry: Any, inputs: Any = None) -> tuple[Any, Any]:
    """A scan over every `remat_every` layers; backwards, if there are their `inputs`."""
    starts = jnp.arange(0, model.layers, model.remat_every)
    turns = starts if inputs is None else (starts, inputs)
    body = some_layers if inputs is None else lambda carry, turn: some_layers(carry, *turn)
    return jax.lax.scan(body, carry, turns, reverse=inputs is not None, unroll=1 if model.scan_layers else len(starts))


def _some_layers(layer: Layer, model: ModelConfig, x_BpE: jax.Array, shared: Any, layers: Any) -> tuple[jax.Array, Any]:
    """`remat_every` layers from `x_BpE`; in their own backward pass each is recomputed, if they are several."""
    if model.remat_every == 1:
        y_BpE, own = layer(x_BpE, shared, jax.tree.map(lambda leaf: leaf[0], layers))
        return y_BpE, jax.tree.map(lambda leaf: leaf[None], own)
    once_more = jax.checkpoint(layer, prevent_cse=not model.scan_layers)

    def one_layer(x_BpE: jax.Array, of_layer: Any) -> tuple[jax.Array, Any]:
        return once_more(x_BpE, shared, of_layer)

    return jax.lax.scan(one_layer, x_BpE, layers, unroll=1 if model.scan_layers else model.remat_every)


def _layers_of(stacks: Any, start: jax.Array, model: ModelConfig) -> Any:
    """`remat_every` layers of stacked arrays, on the device."""
    every = model.remat_every
    return jax.tree.map(lambda stack: to_device(jax.lax.dynamic_slice_in_dim(stack, start, every)), stacks)


def _put(stack: jax.Array, layers: jax.Array, start: jax.Array) -> jax.Array:
    layers = to_host(layers) if is_on_host(stack) else layers  # nothing in between, or libtpu lets the host compute it
    return jax.lax.dynamic_update_slice_in_dim(stack, layers, start, axis=0)


def _empty(stack: jax.Array) -> jax.Array:
    """A stack for gradients, where this one of parameters is."""
    zero = varying_like(jnp.zeros((), stack.dtype), stack)
    return empty_on_host(stack.shape, zero) if is_on_host(stack) else jnp.broadcast_to(zero, stack.shape)
