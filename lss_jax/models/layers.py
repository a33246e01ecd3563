"""Pre-norm transformer blocks over local activations; each parameter's spec stands beside the parameter.

A spec (metadata `spec`) names the mesh axes over which a parameter is sharded. Kernels are sharded over `model` by
heads and columns, so that inside `shard_map` `H`, `G` and `F` count those of this device. `P()` means replicated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lss_jax.attention.residuals import ATTENDED, COMMUNICATED
from lss_jax.attention.strategies import Attend
from lss_jax.config.schema import ModelConfig
from lss_jax.models.embeddings import INIT_STDDEV, Rope
from lss_jax.parallel.dropout import AFTER_ATTENTION, AFTER_MLP, ATTENTION_WEIGHTS, LAYER, Dropout
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import REGIONS
from lss_jax.parallel.tensor_parallel import REGION_OUTPUT, gather_sequence, scatter_sequence

REPLICATED = {"spec": P()}

# (q_BlHK, k_BlGK, v_BlGK, dropout, past) -> (o_BlHK, own): `past` is the layer's part of the cache, None in training;
# `own` is what the layer adds to the cache, None if nothing.
AttendWithPast = Callable[..., tuple[jax.Array, Any]]


class Segment(NamedTuple):
    """The context of a device's segment that layers need: positions, attention, dropout and the model axis."""

    positions_l: jax.Array  # natural, of the segment
    positions_p: jax.Array  # natural, of this device's part of the segment
    attend: AttendWithPast
    dropout: Dropout | None  # for the part's activations; None if nothing is dropped
    model_axis: str | None  # the mesh axis over which parts, heads and columns are sharded; None if they are not


def without_past(attend: Attend) -> AttendWithPast:
    """Adapts a strategy to training and evaluation, where there is no cache to read or to fill."""

    def attend_without_past(q_BlHK, k_BlGK, v_BlGK, dropout, past):
        assert past is None
        return attend(q_BlHK, k_BlGK, v_BlGK, dropout), None

    return attend_without_past


def layer_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over `E`, statistics in float32."""
    return nnx.LayerNorm(
        config.width, dtype=config.dtype, scale_metadata=REPLICATED, bias_metadata=REPLICATED, rngs=rngs
    )


class Linear(nnx.Module):
    """A linear map of the last axes of its input, `inputs`, to `outputs`, in the compute dtype; the bias is optional.

    A kernel sharded over its outputs gives this device's outputs. One sharded over its inputs gives a partial sum: call
    `product`, sum over the devices, then add the bias (`biased`).
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        rngs: nnx.Rngs,
        *,
        kernel_spec: P,
        bias_spec: P | None,
        stddev: float = INIT_STDDEV,
    ):
        self.dtype, self.contracted = config.dtype, len(inputs)
        kernel = nnx.initializers.normal(stddev)(rngs.params(), (*inputs, *outputs), jnp.float32)
        self.kernel = nnx.Param(kernel, spec=kernel_spec)
        if bias_spec is not None:
            self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), outputs, jnp.float32), spec=bias_spec)

    def __call__(self, x: jax.Array) -> jax.Array:
        product = self.product(x)
        return self.biased(product) if hasattr(self, "bias") else product

    def product(self, x: jax.Array) -> jax.Array:
        """The product with the kernel, without the bias."""
        return jnp.tensordot(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.contracted)

    def biased(self, x: jax.Array) -> jax.Array:
        """Adds the bias to a finished product."""
        return x + self.bias[...].astype(self.dtype)


def _residual_stddev(config: ModelConfig) -> float:
    """Initial stddev of output projections, by which the residual stream keeps its size at any depth (as in GPT-2)."""
    return INIT_STDDEV / (2 * config.layers) ** 0.5


class SelfAttention(nnx.Module):
    """Multi-head self-attention, `x_BpE` to `x_BpE`: projections around a sequence-parallel strategy."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        E, H, G, K = config.width, config.heads, config.kv_heads, config.width // config.heads
        self.rope = Rope(config.rope_base, config.rope_scaling, config.rope_factor)
        self.rotary = config.positions == "rope"
        by_output, by_input = P(None, MODEL), P(MODEL)  # column-parallel and row-parallel
        self.query = Linear(config, (E,), (H, K), rngs, kernel_spec=by_output, bias_spec=P(MODEL))
        self.key = Linear(config, (E,), (G, K), rngs, kernel_spec=by_output, bias_spec=None)  # would cancel in softmax
        self.value = Linear(config, (E,), (G, K), rngs, kernel_spec=by_output, bias_spec=P(MODEL))
        stddev = _residual_stddev(config)
        self.out = Linear(config, (H, K), (E,), rngs, kernel_spec=by_input, bias_spec=P(), stddev=stddev)

    @jax.named_scope(REGIONS)
    def __call__(self, x_BpE: jax.Array, segment: Segment, past: Any) -> tuple[jax.Array, Any]:
        x_BlE = gather_sequence(x_BpE, segment.model_axis)
        q_BlHK, k_BlGK = self.query(x_BlE), self.key(x_BlE)
        if self.rotary:
            q_BlHK, k_BlGK = (self.rope(x_BlHK, segment.positions_l) for x_BlHK in (q_BlHK, k_BlGK))
        dropout = segment.dropout and segment.dropout.at(ATTENTION_WEIGHTS)._replace(position_l=segment.positions_l)
        o_BlHK, own = segment.attend(q_BlHK, k_BlGK, self.value(x_BlE), dropout, past)
        return self.out.biased(scatter_sequence(self.out.product(o_BlHK), segment.model_axis)), own


class Mlp(nnx.Module):
    """Two linear maps with a GELU between them, `x_BpE` to `x_BpE` through width `F`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        E, F = config.width, config.mlp_width
        self.up = Linear(config, (E,), (F,), rngs, kernel_spec=P(None, MODEL), bias_spec=P(MODEL))
        stddev = _residual_stddev(config)
        self.down = Linear(config, (F,), (E,), rngs, kernel_spec=P(MODEL), bias_spec=P(), stddev=stddev)

    @jax.named_scope(REGIONS)
    def __call__(self, x_BpE: jax.Array, axis: str | None) -> jax.Array:
        h_BlF = jax.nn.gelu(self.up(gather_sequence(x_BpE, axis)))
        return self.down.biased(scatter_sequence(self.down.product(h_BlF), axis))


class Block(nnx.Module):
    """One pre-norm layer over this device's part `x_BpE`; only attention and MLP communicate."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = layer_norm(config, rngs)
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x_BpE: jax.Array, segment: Segment, past: Any) -> tuple[jax.Array, Any]:
        attended_BpE, own = self.attention(self.attention_norm(x_BpE), segment, past)
        x_BpE = x_BpE + drop(attended_BpE, segment.dropout, AFTER_ATTENTION)
        return x_BpE + drop(self.mlp(self.mlp_norm(x_BpE), segment.model_axis), segment.dropout, AFTER_MLP), own


def drop(x_BpE: jax.Array, dropout: Dropout | None, site: int) -> jax.Array:
    """Applies dropout at one site of the model; the identity if `dropout` is None."""
    return x_BpE if dropout is None else dropout.at(site)(x_BpE)


class Stack(nnx.Module):
    """`layers` blocks whose parameters are stacked on a leading axis, applied by one scan.

    The program holds one block whatever the depth. `scan_layers=False` unrolls the scan, with the same parameters.

    `remat="block"` saves for the backward pass a block's input, attention's output before its projection (of the
    blockwise kernels), what attention received from other devices if the strategy saves that, and this device's part of
    the projected output. The rest is recomputed, for which both regions re-gather their input: saved, it would be as
    large as `M` parts, and Megatron re-gathers too.
    """

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        self.layers = model.layers
        self.unroll = 1 if model.scan_layers else model.layers
        self.remat = model.remat == "block"

        @nnx.split_rngs(splits=model.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(model, rngs)

        self.blocks = stacked(rngs)
        for _, parameter in nnx.iter_graph(self.blocks):
            if isinstance(parameter, nnx.Param):
                parameter.set_metadata(spec=P(None, *parameter.spec))

    def __call__(self, x_BpE: jax.Array, segment: Segment, past: Any = None) -> tuple[jax.Array, Any]:
        """The residual stream `x_BpE` after all layers, and what each layer's attention adds to the cache.

        The latter, and the cache so far (`past`), are arrays with layers first, or None.
        """

        def apply(block: Block, x_BpE: jax.Array, layer: jax.Array, past: Any) -> tuple[jax.Array, Any]:
            layer_segment = segment._replace(dropout=segment.dropout and segment.dropout.at(LAYER, layer))
            return block(x_BpE, layer_segment, past)

        if self.remat:
            saved = jax.checkpoint_policies.save_only_these_names(ATTENDED, COMMUNICATED, REGION_OUTPUT)
            apply = nnx.remat(apply, policy=saved)

        @nnx.scan(in_axes=(nnx.Carry, 0, 0, 0), out_axes=(nnx.Carry, 0), unroll=self.unroll)
        def layers(x_BpE: jax.Array, block: Block, layer: jax.Array, past: Any) -> tuple[jax.Array, Any]:
            return apply(block, x_BpE, layer, past)

        return layers(x_BpE, self.blocks, jnp.arange(self.layers), past)
