"""Pre-norm transformer blocks over local activations; each parameter's spec stands beside the parameter.

A spec (metadata `spec`) names the mesh axes that cut the parameter. `P()` is replicated, as all weights are here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lss_jax.attention import Attend
from lss_jax.attention.setting import ATTENDED, COMMUNICATED
from lss_jax.config import ModelConfig
from lss_jax.dropout import AFTER_ATTENTION, AFTER_MLP, ATTENTION, LAYER, Dropout
from lss_jax.embeddings import INIT_STDDEV, Rope

REPLICATED = {"spec": P()}


class Segment(NamedTuple):
    """What a device must know of the whole to work on its segment."""

    positions_l: jax.Array  # natural
    attend: Attend
    dropout: Dropout | None


def layer_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over `E`, statistics in float32."""
    return nnx.LayerNorm(
        config.width, dtype=config.dtype, scale_metadata=REPLICATED, bias_metadata=REPLICATED, rngs=rngs
    )


def _linear(
    config: ModelConfig, inputs, outputs, rngs: nnx.Rngs, *, axis=-1, stddev=INIT_STDDEV, use_bias=True
) -> nnx.LinearGeneral:
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=axis,
        use_bias=use_bias,
        dtype=config.dtype,
        kernel_init=nnx.initializers.normal(stddev),
        kernel_metadata=REPLICATED,
        bias_metadata=REPLICATED,
        rngs=rngs,
    )


def _residual_stddev(config: ModelConfig) -> float:
    """As in GPT-2 (Radford et al. 2019): the sum of all layers' outputs keeps its size whatever the depth."""
    return INIT_STDDEV / (2 * config.layers) ** 0.5


class SelfAttention(nnx.Module):
    """Projections around a strategy: `x_BlE` to `x_BlE`, all local."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        E, H, G, K = config.width, config.heads, config.kv_heads, config.width // config.heads
        self.rope = Rope(config.rope_base, config.rope_scaling, config.rope_factor)
        self.turned = config.positions == "rope"
        self.query = _linear(config, E, (H, K), rngs)
        self.key = _linear(config, E, (G, K), rngs, use_bias=False)  # it would shift a query's scores alike
        self.value = _linear(config, E, (G, K), rngs)
        self.out = _linear(config, (H, K), E, rngs, axis=(-2, -1), stddev=_residual_stddev(config))

    def __call__(self, x_BlE: jax.Array, segment: Segment) -> jax.Array:
        q_BlHK, k_BlGK = self.query(x_BlE), self.key(x_BlE)
        if self.turned:
            q_BlHK, k_BlGK = (self.rope(x_BlHK, segment.positions_l) for x_BlHK in (q_BlHK, k_BlGK))
        dropout = segment.dropout and segment.dropout.at(ATTENTION)
        return self.out(segment.attend(q_BlHK, k_BlGK, self.value(x_BlE), dropout))


class Mlp(nnx.Module):
    """Two linear maps and a GELU: `x_BlE` to `x_BlE`, through width `F`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.up = _linear(config, config.width, config.mlp_width, rngs)
        self.down = _linear(config, config.mlp_width, config.width, rngs, stddev=_residual_stddev(config))

    def __call__(self, x_BlE: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BlE)))


class Block(nnx.Module):
    """One pre-norm layer; only `segment.attend` ever looks beyond this device's segment."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = layer_norm(config, rngs)
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x_BlE: jax.Array, segment: Segment) -> jax.Array:
        attended_BlE = self.attention(self.attention_norm(x_BlE), segment)
        x_BlE = x_BlE + drop(attended_BlE, segment.dropout, AFTER_ATTENTION)
        return x_BlE + drop(self.mlp(self.mlp_norm(x_BlE)), segment.dropout, AFTER_MLP)


def drop(x_BlE: jax.Array, dropout: Dropout | None, place: int) -> jax.Array:
    """Dropout at one place of the model, if there is any."""
    return x_BlE if dropout is None else dropout.at(place)(x_BlE)


class Stack(nnx.Module):
    """`layers` blocks with their parameters stacked on a leading axis, applied by one scan.

    The program holds one block whatever the depth. `scan_layers=False` unrolls the scan, with the same parameters.
    `remat="block"` keeps a block's input, its (blockwise) rows of attention and what came from other devices for them,
    if attention keeps that at all, and computes the rest again on the way back.
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

    def __call__(self, x_BlE: jax.Array, segment: Segment) -> jax.Array:
        def apply(block: Block, x_BlE: jax.Array, layer: jax.Array) -> jax.Array:
            return block(x_BlE, segment._replace(dropout=segment.dropout and segment.dropout.at(LAYER, layer)))

        if self.remat:
            kept = jax.checkpoint_policies.save_only_these_names(ATTENDED, COMMUNICATED)
            apply = nnx.remat(apply, policy=kept)

        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry, unroll=self.unroll)
        def layers(x_BlE: jax.Array, block: Block, layer: jax.Array) -> jax.Array:
            return apply(block, x_BlE, layer)

        return layers(x_BlE, self.blocks, jnp.arange(self.layers))
