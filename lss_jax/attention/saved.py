"""What attention over gathered keys and values saves for its backward pass: these, or only its own, to gather again."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax

from lss_jax.attention.collectives import after
from lss_jax.attention.kernels.interface import Attended, Queries, Residuals, cotangent_of_output
from lss_jax.attention.setting import Setting, at_precision


class Passes(NamedTuple):
    """`forward(queries, kv_2BGlK, setting)` to `Residuals`; `backward(residuals, do_BlHK, setting)` to gradients.

    `fetch(kv_2BGlK, setting)` gives the keys and values of the residuals.
    """

    forward: Callable[..., Residuals]
    backward: Callable[..., tuple[Queries, jax.Array]]
    fetch: Callable[[jax.Array, Setting], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def differentiable(queries: Queries, kv_2BGlK: jax.Array, passes: Passes, setting: Setting) -> jax.Array | Attended:
    """`o_BlHK` of the forward pass, with the backward pass as its gradient.

    With `regather` a device's own keys and values are saved, and fetched once more, but not before `do` is there.
    """
    return _forward(queries, kv_2BGlK, passes, setting)[0]


@at_precision
def _forward(queries, kv_2BGlK, passes, setting):
    saved = passes.forward(queries, kv_2BGlK, setting)
    return saved.output.given, saved._replace(kv_N2BGlK=kv_2BGlK) if setting.regather else saved


@at_precision
def _backward(passes, setting, saved, cotangent):
    do_BlHK = cotangent_of_output(cotangent)
    if setting.regather:
        saved = saved._replace(kv_N2BGlK=passes.fetch(after(do_BlHK, saved.kv_N2BGlK), setting))
    dqueries, dkv_2BGKl = passes.backward(saved, do_BlHK, setting)
    return dqueries, dkv_2BGKl.swapaxes(3, 4).astype(do_BlHK.dtype)


differentiable.defvjp(_forward, _backward)
