"""What of the decoder's training step is live at once: residuals of its blocks, and the arrays in work.

How many arrays those are was read off the buffers that XLA assigns on CPU. They are counted in elements of four bytes:
a bfloat16 is half of one, or a whole one up to jaxlib 0.11.1, which multiplies bfloat16 in float32 on CPU, and so
stores it.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from lss_jax.attention.placement import setting_on
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.strategy import Held
from lss_jax.attention.traffic import sizes_of
from lss_jax.config.schema import Config
from lss_jax.parallel.mesh import MODEL, SEQ, sharded_axes

BFLOAT16 = 0.5 if jax.__version_info__ >= (0, 11, 2) else 1.0  # of an element: XLA on CPU now multiplies bfloat16


class Arrays(NamedTuple):
    """Elements per device of the arrays of a layer and of the loss, for one microbatch."""

    part: int  # x_BpE, between regions
    region: int  # x_BlE, inside of them
    heads: int  # q_BlHK, o_BlHK
    lse: int  # of attention: the log-sum-exp, lse_BlH
    held: Held  # keys, values and what else the strategy needs
    hidden: int  # h_BlF
    scores: int  # s_BHlL, of the dense kernel alone
    logits: int  # BpV, or BlV of this device's vocabulary shard


def peaks(config: Config, mesh: Mesh | AbstractMesh, parameters: int) -> dict[str, float]:
    """Elements per device that are live at each of the moments of the step that may need most."""
    arrays, narrow = arrays_of(config, mesh), _narrow(config)
    layers = config.model.layers * _residuals(config, arrays, mesh) + parameters  # and the gradients so far
    if config.optim.accumulate > 1:  # the summed gradient; and XLA has a second set of residuals
        layers *= 2
    if config.model.remat == "none" and config.model.dtype == "bfloat16":  # the rounded weights, transposed
        layers += narrow * parameters
    layer_parameters = parameters / config.model.layers
    # a layer's rounded weights; XLA holds them through the whole block where keys need no reordering
    rounded = narrow * layer_parameters if config.model.remat == "block" and config.model.dtype == "bfloat16" else 0
    contiguous = config.attention.layout == "contiguous" and config.attention.regather
    return {
        "backward pass of a block": layers + _block(config, arrays) + layer_parameters + (rounded if contiguous else 0),
        "backward pass of attention": layers
        + _attention(config, arrays)
        + (narrow * parameters if arrays.scores else rounded),
        "loss": layers + 2 * arrays.logits + 5 * arrays.part,
        "update": 2.21 * parameters,  # the gradient as one vector, and its leaves, which fragment the heap most
    }


def arrays_of(config: Config, mesh: Mesh | AbstractMesh) -> Arrays:
    """The sizes of a config's arrays on this mesh, in elements per device."""
    sizes, setting, model, M = sizes_of(config, mesh), setting_on(config, mesh), config.model, mesh.shape[MODEL]
    N, tokens = mesh.shape[SEQ], sizes.B * sizes.l
    return Arrays(
        part=tokens * model.width // M,
        region=tokens * model.width,
        heads=tokens * sizes.H * sizes.K,
        lse=tokens * sizes.H,
        held=STRATEGIES[config.attention.strategy].held(sizes, setting),
        hidden=tokens * model.mlp_width // M,
        scores=tokens * sizes.H * sizes.l * N if setting.kernel == "dense" else 0,
        logits=tokens * model.vocab // M,
    )


def _narrow(config: Config) -> float:
    """The size of an element in the compute dtype, relative to one in float32."""
    return BFLOAT16 if config.model.dtype == "bfloat16" else 1.0


@cache
def _gelu_residuals() -> int:
    """Arrays that JAX saves to differentiate a GELU: 5 where it saves `tanh` and `1 - tanh` (up to 0.11.1), else 4."""
    saved = jax.eval_shape(lambda x: jax.vjp(jax.nn.gelu, x)[1], jax.ShapeDtypeStruct((2,), jnp.float32))
    return sum(leaf.shape == (2,) for leaf in jax.tree.leaves(saved))


def _residuals(config: Config, arrays: Arrays, mesh: Mesh | AbstractMesh) -> float:
    """Elements that a layer saves for the backward pass (`layers.Stack`): for norms, and of a softmax, in float32."""
    narrow, held = _narrow(config), arrays.held
    part, region, heads, lse, hidden = arrays.part, arrays.region, arrays.heads, arrays.lse, arrays.hidden
    if config.model.remat == "none":
        in_dtype = (_gelu_residuals() + 1) * hidden + 2 * region + 2 * heads + held.exchanged + held.saved
        return narrow * in_dtype + 6 * part + lse
    summed = part if MODEL in sharded_axes(mesh) else 0
    return narrow * (part + summed + heads + held.exchanged + held.communicated) + lse


def _block(config: Config, arrays: Arrays) -> float:
    """Live elements before attention's backward pass: pairs with zeros for gradients; with remat a recomputed block."""
    narrow, of_gelu, held = _narrow(config), _gelu_residuals(), arrays.held
    pairs = held.read + narrow * held.saved
    if config.model.remat == "none":
        return pairs + narrow * ((of_gelu - 2) * arrays.hidden + 4 * arrays.region) + 6 * arrays.part
    parts, regions = held.in_work
    hidden = (narrow * (of_gelu - 2) + 1) * arrays.hidden  # one of them in float32
    return pairs + hidden + parts * arrays.part + narrow * regions * arrays.region


def _attention(config: Config, arrays: Arrays) -> float:
    """Live elements in attention's backward pass: pairs, their gradients, and a copy where keys are reordered.

    Collectives carry float32 (on CPU), so narrow pairs exist twice: as they arrived, and rounded.
    """
    narrow, held = _narrow(config), arrays.held
    if arrays.scores:  # of bfloat16 three times in float32, and from jaxlib 0.11.2 on the mask beside them, a byte each
        times = 2.1 if config.model.dtype != "bfloat16" else 3.1 if narrow == 1 else 3.25
        return times * arrays.scores + 10 * arrays.part
    copies = held.copies if held.copies > 2 or narrow == 1 else held.copies + narrow
    return copies * held.read + held.pair + 8 * arrays.heads
