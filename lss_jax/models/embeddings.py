"""Token embeddings, position embeddings and the output head; positions are natural (global) in every layout."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lss_jax.config.schema import ModelConfig
from lss_jax.parallel.mesh import MODEL, SEQ
from lss_jax.parallel.scopes import REGIONS
from lss_jax.parallel.tensor_parallel import own_numbers, own_part, scatter_sequence

INIT_STDDEV = 0.02  # Radford et al. 2019 (GPT-2)
SINUSOID_BASE = 10_000.0  # Vaswani et al. 2017 (arXiv 1706.03762), Sec. 3.5


class TokenEmbedding(nnx.Module):
    """Embeds a segment's `tokens_Bl` (int) as this device's part `x_BpE`, in the compute dtype."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype, self.vocab_parallel = config.dtype, config.vocab_parallel
        spec = P(MODEL) if config.vocab_parallel else P()
        self.table_VE = nnx.Param(_normal(rngs, config.vocab, config.width), spec=spec)

    @jax.named_scope(REGIONS)
    def __call__(self, tokens_Bl: jax.Array, axis: str | None) -> jax.Array:
        table_VE = self.table_VE[...].astype(self.dtype)
        if axis is None or not self.vocab_parallel:
            return table_VE[own_part(tokens_Bl, axis, 1)]
        row_Bl, here_Bl = own_numbers(tokens_Bl, len(table_VE), axis)
        return scatter_sequence(jnp.where(here_Bl[..., None], table_VE[row_Bl], 0), axis)  # a row is on one device

    def logits(self, x_BlE: jax.Array) -> jax.Array:
        """The logits of a tied head, whose kernel is the transposed table."""
        return logits(x_BlE, self.table_VE[...].astype(self.dtype).T)


class Head(nnx.Module):
    """An untied output head: `x_BlE` to logits `BlV`, float32; of classes, which are not sharded, instead of `V`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype = config.dtype
        spec = P(None, MODEL) if config.vocab_parallel and not config.classes else P()
        self.kernel_EV = nnx.Param(_normal(rngs, config.width, config.classes or config.vocab), spec=spec)

    def logits(self, x_BlE: jax.Array) -> jax.Array:
        """The logits of these features."""
        return logits(x_BlE, self.kernel_EV[...].astype(self.dtype))


@jax.custom_vjp
def logits(x_BlE: jax.Array, kernel_EV: jax.Array) -> jax.Array:
    """Logits `BlV`, accumulated in float32 for a stable softmax; all three products are in the dtype of the factors."""
    return jnp.einsum("BlE,EV->BlV", x_BlE, kernel_EV, preferred_element_type=jnp.float32)


def _logits_forward(x_BlE, kernel_EV):
    return logits(x_BlE, kernel_EV), (x_BlE, kernel_EV)


def _logits_backward(factors, d_BlV):
    """Autodiff would multiply the float32 gradient in float32."""
    x_BlE, kernel_EV = factors
    d_BlV = d_BlV.astype(x_BlE.dtype)
    return jnp.einsum("BlV,EV->BlE", d_BlV, kernel_EV), jnp.einsum("BlE,BlV->EV", x_BlE, d_BlV)


logits.defvjp(_logits_forward, _logits_backward)


def without_padding(logits_BlV: jax.Array, vocab: int, axis: str) -> jax.Array:
    """This device's logits with those of the padding, by which `axis` divides the vocabulary, masked out."""
    V = logits_BlV.shape[2]
    if V * jax.lax.axis_size(axis) == vocab:
        return logits_BlV
    number_V = jax.lax.axis_index(axis) * V + jnp.arange(V)
    return jnp.where(number_V < vocab, logits_BlV, -jnp.inf)


class LearnedPositions(nnx.Module):
    """A learned embedding per position, sharded like the sequence: a device holds and trains only its own rows.

    Its spec names `seq`, so its gradient is summed over `data` alone (the paper's double gradient averaging). Inside
    `shard_map` the rows are those of this device's tokens; in the training state they are in natural order.
    """

    def __init__(self, config: ModelConfig, seq_len: int, rngs: nnx.Rngs):
        self.table_LE = nnx.Param(_normal(rngs, seq_len, config.width), spec=P((SEQ, MODEL)), row_per_position=True)

    def __call__(self, x_BpE: jax.Array) -> jax.Array:
        rows_pE = self.table_LE[...]
        assert rows_pE.shape == x_BpE.shape[1:], "the table is sharded like the sequence"
        return x_BpE + rows_pE.astype(x_BpE.dtype)


class RestartedPositions(nnx.Module):
    """The same table where positions restart in each document: any token may need any row, so it is replicated."""

    def __init__(self, config: ModelConfig, seq_len: int, rngs: nnx.Rngs):
        self.table_LE = nnx.Param(_normal(rngs, seq_len, config.width), spec=P())

    def __call__(self, x_BpE: jax.Array, positions_p: jax.Array) -> jax.Array:
        """Adds the rows of these positions, `[p]` or `[B, p]`; padding may lie beyond the last row."""
        table_LE = self.table_LE[...].astype(x_BpE.dtype)
        return x_BpE + table_LE[jnp.minimum(positions_p, len(table_LE) - 1)]


def sinusoidal(x_BpE: jax.Array, positions_p: jax.Array) -> jax.Array:
    """Adds sines (first half of `E`) and cosines of the positions (Vaswani et al. 2017, arXiv 1706.03762, Sec. 3.5).

    They are scaled by `INIT_STDDEV`, the size of the token embeddings that they are added to.
    """
    angle_pe = _angles(positions_p, x_BpE.shape[2] - x_BpE.shape[2] // 2, SINUSOID_BASE)
    waves_pE = jnp.concatenate((jnp.sin(angle_pe), jnp.cos(angle_pe)), axis=-1)[..., : x_BpE.shape[2]]
    return x_BpE + (INIT_STDDEV * waves_pE).astype(x_BpE.dtype)


def _angles(positions_l: jax.Array, count: int, base: float) -> jax.Array:
    """The angles `position * base^(-i/count)` for `i` below `count`: `[..., l, count]`, float32."""
    frequency = base ** (-jnp.arange(count, dtype=jnp.float32) / count)
    return positions_l[..., None].astype(jnp.float32) * frequency


def _normal(rngs: nnx.Rngs, rows: int, width: int) -> jax.Array:
    return nnx.initializers.normal(INIT_STDDEV)(rngs.params(), (rows, width), jnp.float32)
