"""Pre-norm transformer blocks over local activations; each parameter's spec stands beside the parameter.

A spec (metadata `spec`) names the mesh axes that cut the parameter: kernels by heads and columns over `model`, so that
`H`, `G` and `F` are here what this device has of them. `P()` is replicated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lss_jax.attention.residuals import ATTENDED, COMMUNICATED
from lss_jax.attention.strategies import Attend
from lss_jax.config.schema import ModelConfig
from lss_jax.models.embeddings import INIT_STDDEV, Rope
from lss_jax.parallel.dropout import AFTER_ATTENTION, AFTER_MLP, ATTENTION, LAYER, Dropout
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import REGIONS
from lss_jax.parallel.tensor_parallel import SCATTERED, gather_sequence, scatter_sequence

REPLICATED = {"spec": P()}


class Segment(NamedTuple):
    """What a device must know of the whole to work on its segment, and on its part of that."""

    positions_l: jax.Array  # natural, of the segment
    positions_p: jax.Array  # of this device's part
    attend: Attend
    dropout: Dropout | None  # of the part's activations
    model_axis: str | None  # of the mesh: cuts the segment, the heads and the columns; None if nothing does


def layer_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over `E`, statistics in float32."""
    return nnx.LayerNorm(
        config.width, dtype=config.dtype, scale_metadata=REPLICATED, bias_metadata=REPLICATED, rngs=rngs
    )


class Linear(nnx.Module):
    """A kernel from the last axes of its input, `inputs`, to `outputs`, and a bias, in the compute dtype.

    Of a kernel that is cut over its outputs a device computes its own ones; of one that is cut over its inputs, a term
    of the sum over devices, to which the bias comes last.
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
        """Without the bias."""
        return jnp.tensordot(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.contracted)

    def biased(self, x: jax.Array) -> jax.Array:
        """The bias added to a finished product."""
        return x + self.bias[...].astype(self.dtype)


def _residual_stddev(config: ModelConfig) -> float:
    """As in GPT-2 (Radford et al. 2019): the sum of all layers' outputs keeps its size whatever the depth."""
    return INIT_STDDEV / (2 * config.layers) ** 0.5


class SelfAttention(nnx.Module):
    """Projections around a strategy, by heads: `x_BpE` to `x_BpE`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        E, H, G, K = config.width, config.heads, config.kv_heads, config.width // config.heads
        self.rope = Rope(config.rope_base, config.rope_scaling, config.rope_factor)
        self.turned = config.positions == "rope"
        heads, rows = P(None, MODEL), P(MODEL)
        self.query = Linear(config, (E,), (H, K), rngs, kernel_spec=heads, bias_spec=P(MODEL))
        self.key = Linear(config, (E,), (G, K), rngs, kernel_spec=heads, bias_spec=None)  # it would shift scores alike
        self.value = Linear(config, (E,), (G, K), rngs, kernel_spec=heads, bias_spec=P(MODEL))
        stddev = _residual_stddev(config)
        self.out = Linear(config, (H, K), (E,), rngs, kernel_spec=rows, bias_spec=P(), stddev=stddev)

    @jax.named_scope(REGIONS)
    def __call__(self, x_BpE: jax.Array, segment: Segment) -> jax.Array:
        x_BlE = gather_sequence(x_BpE, segment.model_axis)
        q_BlHK, k_BlGK = self.query(x_BlE), self.key(x_BlE)
        if self.turned:
            q_BlHK, k_BlGK = (self.rope(x_BlHK, segment.positions_l) for x_BlHK in (q_BlHK, k_BlGK))
        dropout = segment.dropout and segment.dropout.at(ATTENTION)._replace(position_l=segment.positions_l)
        cached = (self.cache,) if hasattr(self, "cache") else ()  # there when a text is generated, see Model.recall
        o_BlHK = segment.attend(q_BlHK, k_BlGK, self.value(x_BlE), dropout, *cached)
        return self.out.biased(scatter_sequence(self.out.product(o_BlHK), segment.model_axis))


class Mlp(nnx.Module):
    """Two linear maps and a GELU: `x_BpE` to `x_BpE`, through width `F`."""

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
    """One pre-norm layer on this device's part of the sequence; attention and MLP look beyond it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = layer_norm(config, rngs)
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x_BpE: jax.Array, segment: Segment) -> jax.Array:
        attended_BpE = self.attention(self.attention_norm(x_BpE), segment)
        x_BpE = x_BpE + drop(attended_BpE, segment.dropout, AFTER_ATTENTION)
        return x_BpE + drop(self.mlp(self.mlp_norm(x_BpE), segment.model_axis), segment.dropout, AFTER_MLP)


def drop(x_BpE: jax.Array, dropout: Dropout | None, place: int) -> jax.Array:
    """Dropout at one place of the model, if there is any."""
    return x_BpE if dropout is None else dropout.at(place)(x_BpE)


class Stack(nnx.Module):
    """`layers` blocks with their parameters stacked on a leading axis, applied by one scan.

    The program holds one block whatever the depth. `scan_layers=False` unrolls the scan, with the same parameters.
    `remat="block"` keeps a block's input, its (blockwise) rows of attention, what came from other devices for them if
    attention keeps that at all, and this device's part of what attention adds. The rest it computes again on the way
    back, for which both regions gather their input once more (as Megatron's do; kept, it would be `M` times a part).
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

    def __call__(self, x_BpE: jax.Array, segment: Segment) -> jax.Array:
        def apply(block: Block, x_BpE: jax.Array, layer: jax.Array) -> jax.Array:
            return block(x_BpE, segment._replace(dropout=segment.dropout and segment.dropout.at(LAYER, layer)))

        if self.remat:
            kept = jax.checkpoint_policies.save_only_these_names(ATTENDED, COMMUNICATED, SCATTERED)
            apply = nnx.remat(apply, policy=kept)

        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry, unroll=self.unroll)
        def layers(x_BpE: jax.Array, block: Block, layer: jax.Array) -> jax.Array:
            return apply(block, x_BpE, layer)

        return layers(x_BpE, self.blocks, jnp.arange(self.layers))
