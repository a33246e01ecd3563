"""The layers of a model as one scan: what is fetched for a layer, and what it saves for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lss_jax.config.schema import ModelConfig
from lss_jax.models.blocks import Block
from lss_jax.models.layers import Segment, is_trained, whole
from lss_jax.models.recompute import recomputed
from lss_jax.parallel.dropout import LAYER
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.residuals import ATTENDED, COMMUNICATED, GATHERED, REGION_OUTPUT


def repeats(model: ModelConfig) -> int:
    """How often a whole block, its attention included, is computed once more in the backward pass."""
    return 0 if model.remat in ("none", "block") else 1 if model.remat_every == 1 else 2


class Stack(nnx.Module):
    """`layers` blocks whose parameters are stacked on a leading axis, applied by one scan.

    The program holds one block whatever the depth. `scan_layers=False` unrolls the scan, with the same parameters.

    `remat="block"` saves for the backward pass a block's input, attention's output before its projection (of the
    blockwise kernels), what attention received from other devices if the strategy saves that, and this device's part of
    the projected output. The rest is recomputed, for which both regions re-gather their input: saved, it would be as
    large as `M` parts, and Megatron re-gathers too. `remat="input"` saves a block's input alone, and `remat="offload"`
    saves it in host memory; with `remat_every=k` that of every k-th block, from which k blocks are recomputed in turn.

    Weights that are sharded, or on the host, are fetched for one block, and again in its backward pass. Frozen ones
    have no gradient.
    """

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs, block: Callable[..., nnx.Module] = Block):
        self.model = model

        @nnx.split_rngs(splits=model.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> nnx.Module:
            return block(model, rngs)

        self.blocks = stacked(rngs)
        for _, parameter in nnx.iter_graph(self.blocks):
            if isinstance(parameter, nnx.Param):
                parameter.set_metadata(spec=P(None, *parameter.spec), stacked=True)

    def __call__(
        self, x_BpE: jax.Array, segment: Segment, past: Any = None, shared: Any = None
    ) -> tuple[jax.Array, Any]:
        """The residual stream `x_BpE` after all layers, and what each layer's attention adds to the cache.

        The latter, and the cache so far (`past`), are arrays with layers first, or None. `shared` is what blocks read
        beside the stream, the same for all: arrays, or None.
        """
        model = self.model
        graphdef, trained, *frozen = nnx.split(self.blocks, is_trained, ...)

        def apply(x_BpE: jax.Array, shared: Any, layer: Any) -> tuple[jax.Array, Any]:
            trained, (frozen, number, past) = layer
            block = whole(nnx.merge(graphdef, trained, *frozen), model.dtype)
            of_layer = segment._replace(dropout=segment.dropout and segment.dropout.at(LAYER, number))
            return block(x_BpE, shared, of_layer, past)

        layers = trained, (frozen, jnp.arange(model.layers), past)
        if model.remat in ("input", "offload"):
            return recomputed(apply, model, x_BpE, shared, *layers)
        if model.remat == "block":
            policy = jax.checkpoint_policies.save_only_these_names(ATTENDED, COMMUNICATED, REGION_OUTPUT)
        elif any(
            "share" in leaf.get_metadata() for _, leaf in nnx.iter_graph(self.blocks) if isinstance(leaf, nnx.Param)
        ):
            policy = _all_but_fetched_weights
        else:
            return self._scan(apply, x_BpE, shared, layers)
        checkpointed = jax.checkpoint(apply, policy=policy, prevent_cse=not model.scan_layers)
        return self._scan(checkpointed, x_BpE, shared, layers)

    def over_blocks(self, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of each block, layers first."""
        graphdef, state = nnx.split(self.blocks)

        def one_layer(_: None, layer: Any) -> tuple[None, Any]:
            return None, read(whole(nnx.merge(graphdef, layer), self.model.dtype))

        return jax.lax.scan(one_layer, None, state)[1]

    def _scan(self, function: Callable, x_BpE: jax.Array, shared: Any, layers: Any) -> tuple[jax.Array, Any]:
        def one_layer(x_BpE: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            return function(x_BpE, shared, layer)

        count = len(jax.tree.leaves(layers)[0])
        return jax.lax.scan(one_layer, x_BpE, layers, unroll=1 if self.model.scan_layers else count)


def _all_but_fetched_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy that saves everything but weights fetched from where they rest, and what is as cheap as to read them."""
    if primitive.name == "all_gather":
        return MODEL in params["axis_name"]
    return primitive.name not in ("convert_element_type", "device_put", "slice") and params.get("name") != GATHERED
