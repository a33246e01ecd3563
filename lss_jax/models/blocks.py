"""Pre-norm transformer blocks over local activations: attention and MLP, the only places that communicate."""

from collections.abc import Callable
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
from lss_jax.parallel.dropout import (
    AFTER_ATTENTION,
    AFTER_CROSS,
    AFTER_MLP,
    ATTENTION_WEIGHTS,
    CROSS_WEIGHTS,
    Dropout,
)
from lss_jax.parallel.mesh import MODEL
from lss_jax.parallel.scopes import REGIONS
from lss_jax.parallel.tensor_parallel import gather_sequence, scatter_sequence
from lss_jax.parallel.varying import varying_like

BY_OUTPUT, BY_INPUT = P(None, MODEL), P(MODEL)  # column-parallel and row-parallel kernels


def _residual_stddev(config: ModelConfig) -> float:
    """Initial stddev of output projections, by which the residual stream keeps its size at any depth (as in GPT-2)."""
    return INIT_STDDEV / (2 * config.layers) ** 0.5


class Attention(nnx.Module):
    """The projections of multi-head attention, and its groups of heads; what attends to what is a subclass.

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

    def _over_groups(self, x_BlE: jax.Array, attended: Callable[..., tuple[jax.Array, Any]], segment: Segment):
        """The sum of the groups' outputs, `y_BpE`, and what they add to the cache.

        `attended(group, number)` is `o_BlHK` of a group of heads, and what it adds.
        """

        def one_group(y_BlE: jax.Array, group: "Attention", number: Any) -> tuple[jax.Array, Any]:
            o_BlHK, own = attended(group, number)
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
        return self.out.biased(scatter_sequence(y_BlE, segment.model_axis)), own


class SelfAttention(Attention):
    """Multi-head self-attention, `x_BpE` to `x_BpE`: norm, projections, a sequence-parallel strategy, projection."""

    @jax.named_scope(REGIONS)
    def __call__(self, x_BpE: jax.Array, before: Any, segment: Segment, past: Any) -> tuple[jax.Array, Any]:
        """Attention of the normalized (`before`) input, and what it adds to the cache."""
        x_BlE, norms = _into_region(x_BpE, before, segment)
        dropout = segment.dropout and segment.dropout.at(ATTENTION_WEIGHTS)._replace(position_l=segment.positions_l)

        def attended(group: Attention, number: Any) -> tuple[jax.Array, Any]:
            q_BlHK, k_BlGK, v_BlGK = in_tiles(_projected, self.tile, (group, *norms), x_BlE, segment.embedded_l)
            of_group = dropout and dropout.of_group(number, q_BlHK.shape[2])
            return segment.attend(q_BlHK, k_BlGK, v_BlGK, of_group, past)

        return self._over_groups(x_BlE, attended, segment)


class CrossAttention(Attention):
    """Multi-head attention of a sequence to a source, `x_BpE` to `x_BpE`: only queries are of the sequence.

    Keys and values are projected from this device's segment of the encoder's output, so that a strategy moves them as
    it moves those of self-attention: LSS gathers them once, and scatters their gradient once.

    With `model.positions="rope"` queries and keys are rotated by their natural positions, each in its own sequence. So
    a score knows how far a source token's position is from the query's own, as a copy, or the summary of a text that
    keeps its order, wants to know.
    """

    @jax.named_scope(REGIONS)
    def __call__(
        self, x_BpE: jax.Array, source_BsE: jax.Array | None, before: Any, segment: Segment, past: Any
    ) -> jax.Array:
        """Attention of the normalized (`before`) input to the encoder's output `source_BsE`, all of its segment.

        In generation it is None, and its keys and values are in the cache (`past`).
        """
        assert segment.source, "the family declares that it reads pairs"
        x_BlE, norms = _into_region(x_BpE, before, segment)
        dropout = segment.dropout and segment.dropout.at(CROSS_WEIGHTS)._replace(position_l=segment.positions_l)
        source, attend = segment.source

        def attended(group: Attention, number: Any) -> tuple[jax.Array, Any]:
            q_BlHK = in_tiles(_queries, self.tile, (group, *norms), x_BlE, segment.embedded_l)
            kv = (None, None) if source_BsE is None else keys_and_values_of(group, source_BsE, source)
            return attend(q_BlHK, *kv, dropout and dropout.of_group(number, q_BlHK.shape[2]), past)

        return self._over_groups(x_BlE, attended, segment)[0]


def keys_and_values_of(attention: Attention, source_BsE: jax.Array, segment: Segment) -> tuple[jax.Array, jax.Array]:
    """`k_BsGK` and `v_BsGK` of this device's segment of the encoder's output."""
    return in_tiles(_keys_and_values, attention.tile, (attention,), source_BsE, segment.embedded_l)


def _into_region(x_BpE: jax.Array, before: Any, segment: Segment) -> tuple[jax.Array, list[Any]]:
    """The input of a region, once for all groups of heads, and the norms that are left to do.

    Without a model axis the norm goes with the projections.
    """
    axis = segment.model_axis
    return (gather_sequence(before(x_BpE), axis), []) if axis else (x_BpE, [before])


def _projected(modules: tuple, x_BtE: jax.Array, positions_t: jax.Array, _: None) -> tuple[jax.Array, ...]:
    """Queries, keys and values of some tokens, from attention and the norms before it."""
    attention, *norms = modules
    x_BtE = _normalized(norms, x_BtE)
    q_BtHK = _queries((attention,), x_BtE, positions_t, None)
    return q_BtHK, *_keys_and_values((attention,), x_BtE, positions_t, None)


def _queries(modules: tuple, x_BtE: jax.Array, positions_t: jax.Array, _: None) -> jax.Array:
    """Queries of some tokens, themselves normalized and rotated to their positions if need be."""
    attention, *norms = modules
    q_BtHK = attention.query(_normalized(norms, x_BtE))
    q_BtHK = attention.query_norm(q_BtHK) if hasattr(attention, "query_norm") else q_BtHK
    return attention.rope(q_BtHK, positions_t) if attention.rope else q_BtHK


def _normalized(norms: list[Any], x_BtE: jax.Array) -> jax.Array:
    for before in norms:
        x_BtE = before(x_BtE)
    return x_BtE


def _keys_and_values(modules: tuple, x_BtE: jax.Array, positions_t: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    """Keys and values of some tokens, the keys normalized and rotated if need be."""
    (attention,) = modules
    k_BtGK = attention.key(x_BtE)
    k_BtGK = attention.key_norm(k_BtGK) if hasattr(attention, "key_norm") else k_BtGK
    return attention.rope(k_BtGK, positions_t) if attention.rope else k_BtGK, attention.value(x_BtE)


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

    def __call__(self, x_BpE: jax.Array, shared: Any, segment: Segment, past: Any) -> tuple[jax.Array, Any]:
        x_BpE, own = self._attended(x_BpE, segment, past)
        return self._transformed(x_BpE, segment), own

    def _attended(self, x_BpE: jax.Array, segment: Segment, past: Any) -> tuple[jax.Array, Any]:
        """The residual stream after self-attention, and what that adds to the cache."""
        attended_BpE, own = self.attention(x_BpE, self.attention_norm, segment, past)
        return x_BpE + drop(attended_BpE, segment.dropout, AFTER_ATTENTION), own

    def _transformed(self, x_BpE: jax.Array, segment: Segment) -> jax.Array:
        """The residual stream after the MLP."""
        residual_mlp = partial(_residual_mlp, axis=segment.model_axis)
        modules = self.mlp_norm, self.mlp
        return in_tiles(residual_mlp, self.tile, modules, x_BpE, segment.positions_p, segment.dropout)


class CrossBlock(Block):
    """One pre-norm layer of the decoder of an encoder-decoder: attention to its own sequence, to the source, MLP."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.cross_norm = norm(config, rngs)
        self.cross_attention = CrossAttention(config, rngs)

    def __call__(
        self, x_BpE: jax.Array, shared: jax.Array | None, segment: Segment, past: Any
    ) -> tuple[jax.Array, Any]:
        """The residual stream after the layer; `shared` is the encoder's output of this device's segment, `BsE`.

        In generation it is None, and `past` is a pair, of what is cached of the sequence and of the source.
        """
        past, past_of_source = (None, None) if past is None else past
        x_BpE, own = self._attended(x_BpE, segment, past)
        attended_BpE = self.cross_attention(x_BpE, shared, self.cross_norm, segment, past_of_source)
        x_BpE = x_BpE + drop(attended_BpE, segment.dropout, AFTER_CROSS)
        return self._transformed(x_BpE, segment), own


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
