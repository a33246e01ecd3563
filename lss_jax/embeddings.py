"""Tokens in, positions, logits out; positions are natural (global) wherever the token lies."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lss_jax.config import ModelConfig
from lss_jax.mesh import SEQ

INIT_STDDEV = 0.02  # Radford et al. 2019 (GPT-2)
ROPE_BASE = 10_000.0  # Su et al. 2021 (arXiv 2104.09864), Sec. 3.2


class TokenEmbedding(nnx.Module):
    """`tokens_Bl` (integers) to `x_BlE` in the compute dtype."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype = config.dtype
        self.table_VE = nnx.Param(_normal(rngs, config.vocab, config.width), spec=P())

    def __call__(self, tokens_Bl: jax.Array) -> jax.Array:
        return self.table_VE[...].astype(self.dtype)[tokens_Bl]

    def kernel_EV(self) -> jax.Array:
        """The table as the kernel of a tied head."""
        return self.table_VE[...].astype(self.dtype).T


class Head(nnx.Module):
    """Logits `BlV` from `x_BlE`, with a kernel of its own."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype = config.dtype
        self.kernel_EV = nnx.Param(_normal(rngs, config.width, config.vocab), spec=P())

    def __call__(self, x_BlE: jax.Array) -> jax.Array:
        return logits(x_BlE, self.kernel_EV[...].astype(self.dtype))


def logits(x_BlE: jax.Array, kernel_EV: jax.Array) -> jax.Array:
    """`BlV` in float32 for a stable softmax, products in the inputs' dtype."""
    return jnp.einsum("BlE,EV->BlV", x_BlE, kernel_EV, preferred_element_type=jnp.float32)


class LearnedPositions(nnx.Module):
    """A row per position. Cut by segment like the sequence itself: a device holds, and trains, its own rows alone.

    By its spec the gradient is summed over `data` and never over `seq` (the paper's double gradient averaging).
    """

    def __init__(self, config: ModelConfig, seq_len: int, rngs: nnx.Rngs):
        self.table_LE = nnx.Param(_normal(rngs, seq_len, config.width), spec=P(SEQ))

    def __call__(self, x_BlE: jax.Array) -> jax.Array:
        rows_lE = self.table_LE[...]
        assert rows_lE.shape == x_BlE.shape[1:], "the table is cut like the sequence"
        return x_BlE + rows_lE.astype(x_BlE.dtype)


def rope(x_BlHK: jax.Array, positions_l: jax.Array) -> jax.Array:
    """Rotary positions: pairs `(x[i], x[i + K/2])` turned by `position * base^(-2i/K)`, in float32.

    Source: Su et al. 2021 (arXiv 2104.09864), with the two halves of a head as the pairs.
    """
    half = x_BlHK.shape[-1] // 2
    frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_lk = positions_l[:, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle_lk)[:, None, :], jnp.sin(angle_lk)[:, None, :]
    first, second = jnp.split(x_BlHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x_BlHK.dtype)


def _normal(rngs: nnx.Rngs, rows: int, width: int) -> jax.Array:
    return nnx.initializers.normal(INIT_STDDEV)(rngs.params(), (rows, width), jnp.float32)
