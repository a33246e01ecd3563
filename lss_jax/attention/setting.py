"""What the strategies share: the static side of attention, and names for what they leave to the backward pass."""

import dataclasses

import jax
import jax.numpy as jnp

from lss_jax.parallel.layout import Layout

COMMUNICATED = "attention_communicated"  # keys and values from other devices: kept, or moved again on the way back
ATTENDED = "attention_rows"  # rows and their log-sum-exp: with these kept, no score is computed again but in blocks


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of attention at compile time.

    `axis` is the mesh axis that cuts the sequence, None if nothing does.
    """

    axis: str | None
    layout: Layout
    kernel: str
    block_queries: int
    block_keys: int
    gather_groups: int
    regather: bool
    interpret: bool  # fused kernels step by step, as on CPUs

    @property
    def uncut(self) -> "Setting":
        """The same for whole sequences in natural order, as a device has them after an exchange of heads."""
        return dataclasses.replace(self, axis=None, layout=Layout("contiguous", 1))


def stacked(k_BlGK: jax.Array, v_BlGK: jax.Array) -> jax.Array:
    """The pair as one array for one collective, in the kernels' order: `kv_2BGlK`."""
    return jnp.stack((k_BlGK, v_BlGK)).swapaxes(2, 3)


def after(done: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, but not before `done` has been computed.

    No number is greater than infinity, but XLA does not know it. (On CPU it forgets `optimization_barrier` before it
    decides on an order.)
    """
    never = done[(0,) * done.ndim] > jnp.inf
    return jnp.where(never, 0, x)
