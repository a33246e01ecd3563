"""The layers of a model as one scan: what is gathered for a layer, what it saves, and what waits in host memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lss_jax.attention.traffic import sizes_of
from lss_jax.config.schema import Config, ModelConfig
from lss_jax.models.blocks import Block
from lss_jax.models.layers import Segment, whole
from lss_jax.parallel.dropout import LAYER
from lss_jax.parallel.mesh import MODEL, has_host_memory
from lss_jax.parallel.residuals import ATTENDED, COMMUNICATED, GATHERED, LAYER_INPUT, REGION_OUTPUT

LARGEST_HOST_BUFFER = 2**37  # bytes, 128 GiB: libtpu takes no larger one


def repeats(model: ModelConfig) -> int:
    """How often a whole block, its attention included, is computed once more in the backward pass."""
    return 0 if model.remat != "offload" else 1 if model.remat_every == 1 else 2


def waiting(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Bytes per device of the layers' inputs that wait in host memory for the backward pass."""
    sizes, model = sizes_of(config, mesh), config.model
    if model.remat != "offload" or not has_host_memory(mesh):
        return 0
    part = sizes.B * sizes.l // mesh.shape[MODEL] * model.width
    return model.layers // model.remat_every * part * sizes.itemsize


class Stack(nnx.Module):
    """`layers` blocks whose parameters are stacked on a leading axis, applied by one scan.

    The program holds one block whatever the depth. `scan_layers=False` unrolls the scan, with the same parameters.

    `remat="block"` saves for the backward pass a block's input, attention's output before its projection (of the
    blockwise kernels), what attention received from other devices if the strategy saves that, and this device's part of
    the projected output. The rest is recomputed, for which both regions re-gather their input: saved, it would be as
    large as `M` parts, and Megatron re-gathers too. `remat="offload"` saves a block's input alone, in host memory; with
    `remat_every=k` that of every k-th block, from which k blocks are recomputed in turn.

    Weights that are sharded at rest are gathered for one block, and again in its backward pass.
    """

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        self.model = model

        @nnx.split_rngs(splits=model.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(model, rngs)

        self.blocks = stacked(rngs)
        for _, parameter in nnx.iter_graph(self.blocks):
            if isinstance(parameter, nnx.Param):
                parameter.set_metadata(spec=P(None, *parameter.spec), stacked=True)

    def __call__(self, x_BpE: jax.Array, segment: Segment, past: Any = None) -> tuple[jax.Array, Any]:
        """The residual stream `x_BpE` after all layers, and what each layer's attention adds to the cache.

        The latter, and the cache so far (`past`), are arrays with layers first, or None.
        """
        model = self.model
        graphdef, params = nnx.split(self.blocks)

        def apply(x_BpE: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            params, number, past = layer
            block = whole(nnx.merge(graphdef, params), model.dtype)
            of_layer = segment._replace(dropout=segment.dropout and segment.dropout.at(LAYER, number))
            return block(x_BpE, of_layer, past)

        layers = params, jnp.arange(model.layers), past
        if model.remat == "offload":
            return self._offloading(apply, x_BpE, layers)
        if model.remat == "block":
            policy = jax.checkpoint_policies.save_only_these_names(ATTENDED, COMMUNICATED, REGION_OUTPUT)
        elif any(
            "share" in leaf.get_metadata() for _, leaf in nnx.iter_graph(self.blocks) if isinstance(leaf, nnx.Param)
        ):
            policy = _all_but_gathered_weights
        else:
            return self._scan(apply, x_BpE, layers)
        return self._scan(jax.checkpoint(apply, policy=policy, prevent_cse=not model.scan_layers), x_BpE, layers)

    def _offloading(self, apply: Callable, x_BpE: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
        """The scan over every `remat_every` layers, whose input goes to host memory; within, only inputs are saved."""
        model, every = self.model, self.model.remat_every
        count = model.layers // every
        pieces = -(-count * x_BpE.nbytes // LARGEST_HOST_BUFFER)
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
        recomputed = partial(jax.checkpoint, prevent_cse=not model.scan_layers)

        def some_layers(x_BpE: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
            named = [checkpoint_name(x, LAYER_INPUT) for x in jnp.array_split(x_BpE, pieces, axis=1)]
            x_BpE = jnp.concatenate(named, axis=1) if pieces > 1 else named[0]
            if every == 1:
                return apply(x_BpE, layers)
            return self._scan(recomputed(apply), x_BpE, layers)

        if every > 1:
            layers = jax.tree.map(lambda leaf: leaf.reshape(count, every, *leaf.shape[1:]), layers)
        x_BpE, own = self._scan(recomputed(some_layers, policy=policy), x_BpE, layers)
        return x_BpE, jax.tree.map(lambda leaf: leaf.reshape(model.layers, *leaf.shape[2:]), own) if every > 1 else own

    def _scan(self, function: Callable, x_BpE: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
        count = len(jax.tree.leaves(layers)[0])
        return jax.lax.scan(function, x_BpE, layers, unroll=1 if self.model.scan_layers else count)


def _all_but_gathered_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy that saves everything but weights gathered from their shares, and what is as cheap as to read them."""
    if primitive.name == "all_gather":
        return MODEL in params["axis_name"]
    return primitive.name not in ("convert_element_type", "slice") and params.get("name") != GATHERED
