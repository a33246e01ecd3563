"""Rotary positions (Su et al. 2021, arXiv 2104.09864) and their scalings, for contexts longer than those trained on."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lss_jax.config.schema import ModelConfig


class Rope(NamedTuple):
    """A rotation of the pairs `(x[i], x[i + K/2])` by the angles `position * frequency[i]`; `SCALINGS` scale these.

    Tokens of an image lie in rows of so many `columns`: the first half of the pairs rotates by a token's row and the
    second half by its column, each with the frequencies of a head of width `K/2` (Heo et al. 2024, arXiv 2403.13298,
    who call this axial). Scores then depend on how many rows and columns a key is away.
    """

    base: float
    scaling: str
    factor: float  # by which the context is extended
    original: int  # tokens of the context before that
    low: float  # pairs with fewer rotations than this over the original context are slowed down by the factor
    high: float  # and those with more are left alone; between the two lies a ramp
    attention_factor: float  # of rotated queries and keys; 0: as the scaling has it
    columns: int  # tokens per row of an image; 0: positions have one dimension

    def __call__(self, x_BlHK: jax.Array, positions_l: jax.Array) -> jax.Array:
        """Rotates in float32; positions are `[l]`, or `[B, l]` where rows differ in them."""
        angle_lk = self._angles(positions_l, x_BlHK.shape[-1])
        size = self.magnitude()
        cos, sin = size * jnp.cos(angle_lk)[..., None, :], size * jnp.sin(angle_lk)[..., None, :]
        first, second = jnp.split(x_BlHK.astype(jnp.float32), 2, axis=-1)
        rotated_BlHK = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
        return rotated_BlHK.astype(x_BlHK.dtype)

    def _angles(self, positions_l: jax.Array, width: int) -> jax.Array:
        """The angle of each pair of a head of this width at these positions: `[..., l, K/2]`, float32."""
        axes = [positions_l // self.columns, positions_l % self.columns] if self.columns else [positions_l]
        frequency = jnp.asarray(self.frequencies(width // len(axes)), jnp.float32)
        return jnp.concatenate([axis_l[..., None].astype(jnp.float32) * frequency for axis_l in axes], axis=-1)

    def frequencies(self, width: int) -> np.ndarray:
        """Radians per token of each pair of a head of this width, float64 `[K/2]`."""
        return SCALINGS[self.scaling](self, width)

    def magnitude(self) -> float:
        """What the length of rotated queries and keys is multiplied by.

        YaRN's softmax has the temperature `t` with `sqrt(1/t) = 0.1 ln(factor) + 1` (its equation 22).
        """
        if self.attention_factor:
            return self.attention_factor
        return 0.1 * math.log(max(self.factor, 1.0)) + 1.0 if self.scaling == "yarn" else 1.0


def rope_of(config: ModelConfig) -> Rope:
    """The rotation that a config asks for."""
    return Rope(
        config.rope_base,
        config.rope_scaling,
        config.rope_factor,
        config.rope_original,
        config.rope_low,
        config.rope_high,
        config.rope_attention_factor,
        config.rope_columns,
    )


def _none(rope: Rope, width: int) -> np.ndarray:
    """`base^(-2i/K)`."""
    return rope.base ** (-np.arange(0, width, 2) / width)


def _linear(rope: Rope, width: int) -> np.ndarray:
    """Positions divided by the factor (Chen et al. 2023, arXiv 2306.15595)."""
    return _none(rope, width) / rope.factor


def _ntk(rope: Rope, width: int) -> np.ndarray:
    """A larger base, by which the lowest frequency is divided by the factor and the highest is unchanged.

    Source: Peng et al. 2023, arXiv 2309.00071, Sec. 3.1.
    """
    return _none(rope._replace(base=rope.base * rope.factor ** (width / max(width - 2, 1))), width)


def _yarn(rope: Rope, width: int) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, Sec. 3.2), with a ramp over the pairs' numbers.

    So do its authors' code and all that follow it; the paper's ramp is over rotations.
    """

    def number_of_pair(rotations: float) -> float:
        """The pair (a real number) that rotates this often over the original context."""
        return width * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    first, last = max(math.floor(number_of_pair(rope.high)), 0), min(math.ceil(number_of_pair(rope.low)), width - 1)
    slowed_k = np.clip((np.arange(width // 2) - first) / max(last - first, 0.001), 0, 1)
    return _slowed(_none(rope, width), slowed_k, rope.factor)


def _llama3(rope: Rope, width: int) -> np.ndarray:
    """Llama 3.1's (Dubey et al. 2024, arXiv 2407.21783): a ramp over the number of rotations."""
    frequency_k = _none(rope, width)
    rotations_k = rope.original * frequency_k / (2 * math.pi)
    slowed_k = 1 - np.clip((rotations_k - rope.low) / (rope.high - rope.low), 0, 1)
    return _slowed(frequency_k, slowed_k, rope.factor)


def _slowed(frequency_k: np.ndarray, share_k: np.ndarray, factor: float) -> np.ndarray:
    """Frequencies of which a share is divided by the factor."""
    return frequency_k * (1 - share_k) + frequency_k / factor * share_k


SCALINGS: dict[str, Callable[[Rope, int], np.ndarray]] = {
    "none": _none,
    "linear": _linear,
    "ntk": _ntk,
    "yarn": _yarn,
    "llama3": _llama3,
}
