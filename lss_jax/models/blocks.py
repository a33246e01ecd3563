"""Pre-norm transformer blocks over local activations: attention and MLP, the only places that communicate."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lss_jax.attention.head_groups import over_head_groups
from lss_jax.config.schema import ModelConfig
from lss_jax.models.embeddings import INIT_STDDEV
from lss_jax.models.layers import Linear, Segment, drop, norm, rms_norm
from lss_jax.models.rope import rope_of
from lss_jax.models.tiles import in_tiles
from lss_jax.parallel.dropout import AFTER_ATTENTION, AFTER_MLP, ATTENTION_WEIGHTS, Dropout
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import REGIONS
from lss_jax.parallel.tensor_parallel import gather_sequence, scatter_sequence
from lss_jax.parallel.varying import varying_like

BY_OUTPUT, BY_INPUT = P(None, MODEL), P(MODEL)  # column-parallel and row-parallel kernels


def _residual_stddev(config: ModelConfig) -> float:
    """Initial stddev of output projections, by which the residual stream keeps its size at any depth (as in GPT-2)."""
    return INIT_STDDEV / (2 * config.layers) ** 0.5


class SelfAttention(nnx.Module):
    """Multi-head self-attention, `x_BpE` to `x_BpE`: norm, projections, a sequence-parallel strategy, projection.

    It works on one group of heads at a time (`Segment.head_groups`), from the norm to the sum of outputs, so that of
    queries, keys and values there is never more than one group's.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        E, H, G, K = config.width, config.heads, config.kv_heads, config.head_width
        self.rope, self.tile, self.heads = rope_of(config) if config.positions == "rope" else None, config.tile, H
        bias = P(MODEL) if config.bias or config.qkv_bias else None
        key_bias = P(MODEL) if config.qkv_bias else None  # unless keys are rotated it cancels in the softmax
        by_heads: dict[str, Any] = {"kernel_spec": BY_OUTPUT, "heads": 1}
        self.query = Linear(config, (E,), (H, K), rngs, bias_spec=bias, **by_heads)
        self.key = Linear(config, (E,), (G, K), rngs, bias_spec=key_bias, **by_heads)
        self.value = Linear(config, (E,), (G, K), rngs, bias_spec=bias, **by_heads)
        if config.qk_norm:
            self.query_norm, self.key_norm = rms_norm(config, K, rngs), rms_norm(config, K, rngs)
        self.out = Linear(
            config,
            (H, K),
            (E,),
            rngs,
            kernel_spec=BY_INPUT,
            bias_spec=P() if config.bias else None,
            stddev=_residual_stddev(config),
            heads=0,
        )

    @jax.named_scope(REGIONS)
    def __call__(self, x_BpE: jax.Array, before: Any, segment: Segment, past: Any) -> tuple[jax.Array, Any]:
        """Attention of the normalized (`before`) input, and what it adds to the cache."""
        axis = segment.model_axis
        # into the region once, for all groups; where there is none, the norm goes with the projections
        x_BlE, norms = (gather_sequence(before(x_BpE), axis), []) if axis else (x_BpE, [before])
        dropout = segment.dropout and segment.dropout.at(ATTENTION_WEIGHTS)._replace(position_l=segment.positions_l)

        def one_group(y_BlE: jax.Array, group: "SelfAttention", number: Any) -> tuple[jax.Array, Any]:
            modules = group, *norms
            q_BlHK, k_BlGK, v_BlGK = in_tiles(_projected, self.tile, modules, x_BlE, segment.embedded_l)
            of_group = dropout and dropout.of_group(number, q_BlHK.shape[2])
            o_BlHK, own = segment.attend(q_BlHK, k_BlGK, v_BlGK, of_group, past)
            return y_BlE + group.out.product(o_BlHK), own

        nothing_BlE = varying_like(jnp.zeros_like(x_BlE), (x_BlE, self.query.kernel[...]))
        if segment.head_groups == 1:
            y_BlE, own = one_group(nothing_BlE, self, 0)
        else:
            graphdef, by_heads, *others = nnx.split(self, _is_by_heads, ...)
            groups = jax.tree.map(partial(_in_groups, segment.head_groups), by_heads, is_leaf=_is_variable)
            y_BlE, own = over_head_groups(
                lambda y_BlE, group, number: one_group(y_BlE, nnx.merge(graphdef, group, *others), number),
                nothing_BlE,
                groups,
            )
        return self.out.biased(scatter_sequence(y_BlE, axis)), own


def _projected(modules: tuple, x_BtE: jax.Array, positions_t: jax.Array, _: None) -> tuple[jax.Array, ...]:
    """Queries, keys and values of some tokens, the first two normalized and rotated to their positions if need be."""
    attention, *norms = modules
    for before in norms:
        x_BtE = before(x_BtE)
    q_BtHK, k_BtGK = attention.query(x_BtE), attention.key(x_BtE)
    if hasattr(attention, "query_norm"):
        q_BtHK, k_BtGK = attention.query_norm(q_BtHK), attention.key_norm(k_BtGK)
    if attention.rope:
        q_BtHK, k_BtGK = (attention.rope(x, positions_t) for x in (q_BtHK, k_BtGK))
    return q_BtHK, k_BtGK, attention.value(x_BtE)


class Mlp(nnx.Module):
    """Two linear maps through width `F` with a GELU between them, or with a SiLU and a gate; `x_BpE` to `x_BpE`.

    The gate is that of SwiGLU (Shazeer 2020, arXiv 2002.05202).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        E, F = config.width, config.mlp_width
        bias = P(MODEL) if config.bias else None
        if config.mlp == "swiglu":
            self.gate = Linear(config, (E,), (F,), rngs, kernel_spec=BY_OUTPUT, bias_spec=bias)
        self.up = Linear(config, (E,), (F,), rngs, kernel_spec=BY_OUTPUT, bias_spec=bias)
        bias, stddev = P() if config.bias else None, _residual_stddev(config)
        self.down = Linear(config, (F,), (E,), rngs, kernel_spec=BY_INPUT, bias_spec=bias, stddev=stddev)

    @jax.named_scope(REGIONS)
    def __call__(self, x_BpE: jax.Array, axis: str | None) -> jax.Array:
        x_BlE = gather_sequence(x_BpE, axis)
        h_BlF = jax.nn.silu(self.gate(x_BlE)) * self.up(x_BlE) if hasattr(self, "gate") else jax.nn.gelu(self.up(x_BlE))
        return self.down.biased(scatter_sequence(self.down.product(h_BlF), axis))


class Block(nnx.Module):
    """One pre-norm layer over this device's part `x_BpE`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.tile = config.tile
        self.attention_norm = norm(config, rngs)
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = norm(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x_BpE: jax.Array, segment: Segment, past: Any) -> tuple[jax.Array, Any]:
        attended_BpE, own = self.attention(x_BpE, self.attention_norm, segment, past)
        x_BpE = x_BpE + drop(attended_BpE, segment.dropout, AFTER_ATTENTION)
        residual_mlp = partial(_residual_mlp, axis=segment.model_axis)
        modules = self.mlp_norm, self.mlp
        return in_tiles(residual_mlp, self.tile, modules, x_BpE, segment.positions_p, segment.dropout), own


def _residual_mlp(
    modules: tuple, x_BtE: jax.Array, positions_t: jax.Array, dropout: Dropout | None, axis: str | None
) -> jax.Array:
    """The residual stream of some tokens after the MLP."""
    before, mlp = modules
    dropout = dropout and dropout._replace(position_l=positions_t)
    return x_BtE + drop(mlp(before(x_BtE), axis), dropout, AFTER_MLP)


def _is_by_heads(_path: Any, leaf: Any) -> bool:
    return leaf.get_metadata().get("heads") is not None


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _in_groups(count: int, parameter: nnx.Variable) -> nnx.Variable:
    """A parameter by heads as groups of heads, stacked on a new leading axis."""
    return parameter.replace(jnp.stack(jnp.split(parameter[...], count, axis=parameter.get_metadata()["heads"])))
