"""Pre-norm transformer blocks over local activations; each parameter's spec stands beside the parameter.

A spec (metadata `spec`) names the mesh axes that cut the parameter. `P()` is replicated, as all weights are here.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from lss_jax.attention.lss import GATHERED
from lss_jax.config import ModelConfig
from lss_jax.embeddings import INIT_STDDEV

REPLICATED = {"spec": P()}

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q_BlHK, k_BlGK, v_BlGK -> o_BlHK
Rotate = Callable[[jax.Array], jax.Array]  # x_BlHK -> x_BlHK, by position


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
        self.query = _linear(config, E, (H, K), rngs)
        self.key = _linear(config, E, (G, K), rngs, use_bias=False)  # it would shift a query's scores alike
        self.value = _linear(config, E, (G, K), rngs)
        self.out = _linear(config, (H, K), E, rngs, axis=(-2, -1), stddev=_residual_stddev(config))

    def __call__(self, x_BlE: jax.Array, rotate: Rotate, attend: Attend) -> jax.Array:
        q_BlHK, k_BlGK = rotate(self.query(x_BlE)), rotate(self.key(x_BlE))
        return self.out(attend(q_BlHK, k_BlGK, self.value(x_BlE)))


class Mlp(nnx.Module):
    """Two linear maps and a GELU: `x_BlE` to `x_BlE`, through width `F`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.up = _linear(config, config.width, config.mlp_width, rngs)
        self.down = _linear(config, config.mlp_width, config.width, rngs, stddev=_residual_stddev(config))

    def __call__(self, x_BlE: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BlE)))


class Block(nnx.Module):
    """One pre-norm layer; only `attend` ever looks beyond this device's segment."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = layer_norm(config, rngs)
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x_BlE: jax.Array, rotate: Rotate, attend: Attend) -> jax.Array:
        x_BlE = x_BlE + self.attention(self.attention_norm(x_BlE), rotate, attend)
        return x_BlE + self.mlp(self.mlp_norm(x_BlE))


class Stack(nnx.Module):
    """`layers` blocks with their parameters stacked on a leading axis, applied by one scan.

    The program holds one block whatever the depth. `scan_layers=False` unrolls the scan, with the same parameters.
    `remat="block"` keeps a block's input and its gathered keys and values, and computes the rest again on the way
    back: what is kept there keeps the communication at one gather per layer.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.unroll = 1 if config.scan_layers else config.layers
        self.remat = config.remat == "block"

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.blocks = stacked(rngs)
        for _, parameter in nnx.iter_graph(self.blocks):
            if isinstance(parameter, nnx.Param):
                parameter.set_metadata(spec=P(None, *parameter.spec))

    def __call__(self, x_BlE: jax.Array, rotate: Rotate, attend: Attend) -> jax.Array:
        def apply(block: Block, x_BlE: jax.Array) -> jax.Array:
            return block(x_BlE, rotate, attend)

        if self.remat:
            apply = nnx.remat(apply, policy=jax.checkpoint_policies.save_only_these_names(GATHERED))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, unroll=self.unroll)
        def layers(x_BlE: jax.Array, block: Block) -> jax.Array:
            return apply(block, x_BlE)

        return layers(x_BlE, self.blocks)
