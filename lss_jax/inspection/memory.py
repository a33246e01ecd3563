"""What a training step needs on each device, in bytes: state and batch by their specs, temporaries by counting arrays.

Temporaries are what the compiled program has beside its arguments: what layers keep for the way back, and what is in
work at the moment that needs most. How many arrays that is was read off the buffers that XLA assigns on CPU, where it
computes bfloat16 in float32, and so keeps it: every number below has four bytes. The sums are upper bounds: with them
nothing "fits" that the compiler says does not. How far they are from it `python -m experiments.planner.run` measures,
for a few configs on TPUs as well, whose compiler assigns buffers of its own.
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lss_jax.attention.placement import setting_on
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.attention.strategy import Held
from lss_jax.attention.traffic import sizes_of
from lss_jax.config.schema import Config
from lss_jax.models import Model
from lss_jax.parallel.mesh import MODEL, SEQ, cut_axes, over_cut_axes
from lss_jax.training.state import kept_specs, moment_specs

NUMBER = 4  # bytes
GAPS = 1.07  # temporaries over the largest sum of buffers that live at once: they do not lie side by side
COUNTERS = 3  # of steps, in the state


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: int
    moments: int  # Adam's two per parameter
    batch: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of them: this must fit."""
        return sum(self)


def shortfall(error: jax.errors.JaxRuntimeError) -> str:
    """What a compiler that knows its devices' memory says of a program that is too large; anything else is raised."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        raise error
    sizes = re.search(r"Used .*? of .*? hbm\. Exceeded hbm capacity by [\d.]+\w*", message)
    return sizes[0] if sizes else message.splitlines()[0]


class Arrays(NamedTuple):
    """Numbers on one device in the arrays of a layer and of the loss, for one microbatch."""

    part: int  # x_BpE, between regions
    region: int  # x_BlE, inside of them
    heads: int  # q_BlHK, o_BlHK
    rows: int  # the log-sum-exp, lse_BlH
    held: Held  # keys, values and what else the strategy needs
    hidden: int  # h_BlF
    scores: int  # s_BHlL, which the dense kernel alone has
    logits: int  # BpV, or BlV of this device's share


def memory_of(model: Model, mesh: Mesh | AbstractMesh) -> Memory:
    """Of the training step of this model on this mesh; the mesh may be abstract."""
    return Memory(
        parameters=NUMBER * _numbers(model, kept_specs(model, mesh), mesh),
        moments=2 * NUMBER * _numbers(model, moment_specs(model, mesh), mesh),
        batch=NUMBER * (_batch(model.config, mesh) + COUNTERS),
        temporaries=math.ceil(GAPS * NUMBER * max(peaks(model, mesh).values())),
    )


def peaks(model: Model, mesh: Mesh | AbstractMesh) -> dict[str, float]:
    """Numbers that live at once, at each moment of the step that may need most."""
    config, arrays = model.config, arrays_of(model.config, mesh)
    parameters = _numbers(model, kept_specs(model, mesh), mesh)
    layers = config.model.layers * _kept(config, arrays, mesh) + parameters  # and the gradients so far
    if config.optim.accumulate > 1:  # the sum over microbatches; and XLA has a second set of what is kept
        layers *= 2
    if config.model.remat == "none" and config.model.dtype == "bfloat16":  # the weights as they were rounded, turned
        layers += parameters
    of_layer = parameters / config.model.layers
    # a layer's weights as they were rounded; XLA holds them through the whole block where no keys are put in order
    rounded = of_layer if config.model.remat == "block" and config.model.dtype == "bfloat16" else 0
    contiguous = config.attention.layout == "contiguous" and config.attention.regather
    return {
        "back through a block": layers + _block(config, arrays) + of_layer + (rounded if contiguous else 0),
        "back through attention": layers + _attention(config, arrays) + (parameters if arrays.scores else rounded),
        "loss": layers + 2 * arrays.logits + 5 * arrays.part,
        "update": 2.21 * parameters,  # the gradient as one vector, and its leaves; they leave the largest gaps
    }


def arrays_of(config: Config, mesh: Mesh | AbstractMesh) -> Arrays:
    """The sizes of a config's arrays on this mesh."""
    sizes, setting, model, M = sizes_of(config, mesh), setting_on(config, mesh), config.model, mesh.shape[MODEL]
    N, tokens = mesh.shape[SEQ], sizes.B * sizes.l
    return Arrays(
        part=tokens * model.width // M,
        region=tokens * model.width,
        heads=tokens * sizes.H * sizes.K,
        rows=tokens * sizes.H,
        held=STRATEGIES[config.attention.strategy].held(sizes, setting),
        hidden=tokens * model.mlp_width // M,
        scores=tokens * sizes.H * sizes.l * N if setting.kernel == "dense" else 0,
        logits=tokens * model.vocab // M,
    )


def _kept(config: Config, arrays: Arrays, mesh: Mesh | AbstractMesh) -> int:
    """What a layer leaves for the way back (`layers.Stack`)."""
    part, region, heads, rows, hidden = arrays.part, arrays.region, arrays.heads, arrays.rows, arrays.hidden
    held = arrays.held
    if config.model.remat == "none":
        return 6 * hidden + 6 * part + 2 * region + 2 * heads + held.exchanged + rows + held.saved
    summed = part if MODEL in cut_axes(mesh) else 0
    return part + summed + heads + held.exchanged + rows + held.communicated


def _block(config: Config, arrays: Arrays) -> int:
    """What is in work before attention's turn: with remat the block anew; pairs have zeros for a gradient."""
    pairs = arrays.held.read + arrays.held.saved
    if config.model.remat == "none":
        return pairs + 3 * arrays.hidden + 6 * arrays.part + 4 * arrays.region
    parts, regions = arrays.held.in_work
    return pairs + 4 * arrays.hidden + parts * arrays.part + regions * arrays.region


def _attention(config: Config, arrays: Arrays) -> float:
    """What is in work in attention's turn: pairs, their gradients, and once more where they are put in order."""
    if arrays.scores:
        return (3.1 if config.model.dtype == "bfloat16" else 2.1) * arrays.scores + 10 * arrays.part
    held = arrays.held
    return held.copies * held.read + held.pair + 8 * arrays.heads


def _batch(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """Numbers in a batch, or two per token more with documents; rows have theirs for dropout alone."""
    sizes = sizes_of(config, mesh)
    rows = sizes.B * config.optim.accumulate
    per_token = 4 if config.data.separator else 2
    return per_token * rows * sizes.l + sizes.l + (rows if config.model.dropout else 0)


def _numbers(model: Model, specs: Any, mesh: Mesh | AbstractMesh) -> int:
    """On one device, in arrays like the parameters that lie by these specs."""

    def of_leaf(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> int:
        return math.prod(NamedSharding(mesh, over_cut_axes(spec, mesh)).shard_shape(leaf.shape))

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, model.shapes, specs)))
