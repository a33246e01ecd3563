"""The memory of a training step, in bytes per device: state and batch by their specs, temporaries by counting arrays.

Temporaries are what the compiled program allocates beside its arguments: the residuals that layers save for the
backward pass, and the arrays that are live at the moment that needs most. How many those are was read off the buffers
that XLA assigns on CPU. They are counted in elements of four bytes: a bfloat16 is half of one, or a whole one up to
jaxlib 0.11.1, which multiplies bfloat16 in float32 on CPU, and so stores it. The sums bound the compiler's from above,
so that nothing "fits" that the compiler says does not. How close they are is measured by
`python -m experiments.planner.run`, for a few configs also on TPUs, whose compiler assigns buffers differently.
"""

import math
import re
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lss_jax.attention.placement import setting_on
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.strategy import Held
from lss_jax.attention.traffic import sizes_of
from lss_jax.config.schema import Config
from lss_jax.models import Model, costs_of
from lss_jax.parallel.mesh import MODEL, SEQ, sharded_axes, without_unsharded
from lss_jax.tasks import make_task
from lss_jax.training.optimizer import moments_of
from lss_jax.training.state import moment_specs, param_specs

NUMBER = 4  # bytes
GAPS = 1.07  # temporaries over the largest sum of live buffers: the heap is fragmented
COUNTERS = {"adamw": 3, "muon": 8}  # of steps, in the state; and three coefficients of Muon's
BFLOAT16 = 0.5 if jax.__version_info__ >= (0, 11, 2) else 1.0  # of a number: XLA on CPU now has products of bfloat16


class Memory(NamedTuple):
    """The memory of a training step, in bytes per device."""

    parameters: int
    moments: int  # two per parameter, but one where Muon updates it
    batch: int
    temporaries: int

    @property
    def total(self) -> int:
        """The sum, which must fit a device's memory."""
        return sum(self)


def shortfall(error: jax.errors.JaxRuntimeError) -> str:
    """The compiler's message on a program that exceeds its devices' memory; any other error is raised again."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        raise error
    sizes = re.search(r"Used .*? of .*? hbm\. Exceeded hbm capacity by [\d.]+\w*", message)
    return sizes[0] if sizes else message.splitlines()[0]


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


def memory_of(model: Model, mesh: Mesh | AbstractMesh) -> Memory:
    """Predicts the memory of this model's training step on this mesh, which may be abstract.

    Temporaries are those of a stack of blocks (`models.layers`) and of logits.

    Raises:
      ConfigError: the model's family declares no costs.
    """
    costs_of(model)
    return Memory(
        parameters=NUMBER * _numbers(model, param_specs(model, mesh), mesh),
        moments=NUMBER * _numbers(model, moment_specs(model, mesh), mesh, moments_of(model.config.optim, model.shapes)),
        batch=NUMBER * (_batch(model.config, mesh) + COUNTERS[model.config.optim.name]),
        temporaries=math.ceil(GAPS * NUMBER * max(peaks(model, mesh).values())),
    )


def peaks(model: Model, mesh: Mesh | AbstractMesh) -> dict[str, float]:
    """Elements per device that are live at each of the moments of the step that may need most."""
    config, arrays = model.config, arrays_of(model.config, mesh)
    parameters, narrow = _numbers(model, param_specs(model, mesh), mesh), _narrow(config)
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


def _batch(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Elements per device of a batch; the numbers of its rows are an argument for dropout alone."""
    batch = make_task(config).batch_like(mesh)
    used = batch if config.model.dropout else batch._replace(rows=None)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(used))


def _numbers(model: Model, specs: Any, mesh: Mesh | AbstractMesh, copies: Any = None) -> int:
    """Elements per device of arrays like the parameters, sharded by these specs; or of so many `copies` of each."""
    copies = copies or jax.tree.map(lambda _: 1, model.shapes)

    def of_leaf(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec, copies: int) -> int:
        return copies * math.prod(NamedSharding(mesh, without_unsharded(spec, mesh)).shard_shape(leaf.shape))

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, model.shapes, specs, copies)))
