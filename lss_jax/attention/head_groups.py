"""LSS in groups of heads, one collective each: the next group's keys and values travel while one is computed.

Two groups of gathered keys and values are held at a time. With `regather` none is saved, and each group is gathered
once more in the backward pass. How one group is computed stands in `lss`; here is the order.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lss_jax.attention.collectives import all_gather
from lss_jax.attention.kernels.interface import Output, Queries, Residuals
from lss_jax.attention.mask import Intervals
from lss_jax.attention.setting import Setting
from lss_jax.parallel.dropout import Dropout


class Heads(NamedTuple):
    """All heads of a device's own segment."""

    q_BlHK: jax.Array
    kv_2BGlK: jax.Array
    mask: Intervals
    dropout: Dropout | None

    def groups(self, count: int) -> Iterator[tuple[Queries, jax.Array]]:
        """The queries of each group of heads, and their own keys and values."""
        arrays = (self.q_BlHK, self.kv_2BGlK, jnp.arange(self.q_BlHK.shape[2])[None, None])  # heads on axis 2
        for q_BlHK, kv_2BGlK, head in zip(*(jnp.split(x, count, axis=2) for x in arrays), strict=True):
            yield Queries(q_BlHK, self.mask, self.dropout and self.dropout.of_heads(head[0, 0])), kv_2BGlK


class OneGroup(NamedTuple):
    """How one group of heads is computed: `forward(queries, kv_2BGlK, setting)`, `backward(residuals, do, setting)`."""

    forward: Callable[..., Residuals]
    backward: Callable[..., tuple[jax.Array, jax.Array]]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def in_groups(heads: Heads, one_group: OneGroup, setting: Setting) -> jax.Array:
    """`o_BlHK` of all heads, in `setting.gather_groups` groups."""
    return _forward(heads, one_group, setting)[0]


def _forward(heads, one_group, setting):
    """A group's gather waits for the last but one group's output, so that two groups are held."""
    outputs: list[jax.Array] = []
    saved = []
    for group, (queries, kv_2BGlK) in enumerate(heads.groups(setting.gather_groups)):
        if group >= 2:
            kv_2BGlK = after(outputs[group - 2], kv_2BGlK)
        _, kv_N2BGlK, (o_BlHK, lse) = one_group.forward(queries, kv_2BGlK, setting)
        outputs.append(o_BlHK)
        saved.append((lse, None if setting.regather else kv_N2BGlK))
    o_BlHK = jnp.concatenate(outputs, axis=2)
    return o_BlHK, (heads, o_BlHK, saved)


def _backward(one_group, setting, residuals, do_BlHK):
    """Each group waits for the previous group's query gradients and scatter.

    Otherwise dense scores of several groups live at once, and XLA fuses the scatters on TPU and holds all of them.
    """
    heads, o_BlHK, saved = residuals
    dq: list[jax.Array] = []
    dkv: list[jax.Array] = []
    o_and_do = zip(*(jnp.split(x, setting.gather_groups, axis=2) for x in (o_BlHK, do_BlHK)), strict=True)
    groups = zip(heads.groups(setting.gather_groups), o_and_do, saved, strict=True)
    for group, ((queries, kv_2BGlK), (o, do), (lse, kv_N2BGlK)) in enumerate(groups):
        if setting.regather:
            kv_N2BGlK = all_gather(after(dkv[group - 2] if group >= 2 else do, kv_2BGlK), setting.axis)
        if group:
            do = after(dq[-1], after(dkv[-1], do))
        saved_of_group = Residuals(queries, kv_N2BGlK, Output(o, lse))
        dq_BlHK, dkv_2BGKl = one_group.backward(saved_of_group, do, setting)
        dq.append(dq_BlHK)
        dkv.append(dkv_2BGKl.swapaxes(3, 4).astype(kv_2BGlK.dtype))
    dq_BlHK, dkv_2BGlK = (jnp.concatenate(gradients, axis=2) for gradients in (dq, dkv))
    return (heads._replace(q_BlHK=dq_BlHK, kv_2BGlK=dkv_2BGlK, mask=None, dropout=None),)


in_groups.defvjp(_forward, _backward)


def after(done: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, but not before `done` has been computed.

    No number is greater than infinity, but XLA does not know it. (On CPU it forgets `optimization_barrier` before it
    decides on an order.)
    """
    never = done[(0,) * done.ndim] > jnp.inf
    return jnp.where(never, 0, x)
