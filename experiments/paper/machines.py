"""The modelled time of a step on a machine that is not at hand, from its public figures and one formula.

    step = max(operations / peak, bytes of memory moved / memory rate) + communication

No communication overlaps with compute, and compute runs at its peak, so that the modelled share of communication is an
upper bound. A collective of `n` devices takes ring steps: `n - 1` to gather or to scatter, twice that to
all-reduce, one to permute. Each costs the link's latency and its share of the bytes over the link's rate.
"""

import math
from typing import NamedTuple

from lss_jax.attention.placement import setting_on
from lss_jax.attention.traffic import sizes_of
from lss_jax.inspection.contract import SENT, Contract
from lss_jax.inspection.memory import arguments_of
from lss_jax.inspection.operations import outside_attention
from lss_jax.models import Model
from lss_jax.parallel.mesh import MODEL, SEQ


class Machine(NamedTuple):
    """Figures per device: bfloat16 operations per second, bytes per second of its memory and of one ring of links."""

    name: str
    peak: float
    memory_rate: float
    link_rate: float
    latency: float  # in seconds per ring step


# Google Cloud's page on TPU v5p: 459 TFLOPS, 2,765 GB/s, 4,800 Gbit/s over 6 links, of which a ring uses two. The
# latency is an assumption of ours: nobody publishes it.
V5P = Machine("TPU v5p", 459e12, 2765e9, 2 * 4800e9 / 8 / 6, 1e-6)

HOPS = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1),
    "scalars": lambda n: 2 * (n - 1),
    "collective-permute": lambda n: 1,
}
PRODUCTS = 7  # matrix products in attention: 2 forward, 5 backward
SCORES = 10  # times that dense scores are written or read, in float32: 4 forward, 6 backward


class StepTime(NamedTuple):
    """The modelled seconds of a step."""

    compute: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        """Compute or memory, whichever takes longer, then communication."""
        return max(self.compute, self.memory) + self.communication


def step_time(machine: Machine, model: Model, mesh, operations: int, collectives: Contract) -> StepTime:
    """The time of a step with these operations and collectives per device, compiled or predicted."""
    return StepTime(
        compute=operations / machine.peak,
        memory=bytes_moved(model, mesh) / machine.memory_rate,
        communication=communication(machine, collectives, mesh),
    )


def communication(machine: Machine, collectives: Contract, mesh) -> float:
    """Seconds in collectives that run one after the other."""
    seconds = 0.0
    for line, total in collectives.items():
        n = math.prod(mesh.shape[axis] for axis in line.axes)
        seconds += total.times * HOPS[line.kind](n) * machine.latency
        seconds += SENT[line.kind](n) * total.bytes / machine.link_rate
    return seconds


def bytes_moved(model: Model, mesh) -> float:
    """Bytes read and written in a device's memory, counted: parameters and moments, activations, dense scores or keys.

    Parameters are read three times; their gradients, moments and new values are written and read once. A layer reads
    and writes ten arrays of the size `part`, `x_BpE`, and four of the size `hidden`, `h_BlF`, once forward and twice
    backward. Every block of queries reads all keys and values that reach its device, as with LSS.
    """
    config, sizes, setting = model.config, sizes_of(model.config, mesh), setting_on(model.config, mesh)
    parameters, moments, *_ = arguments_of(model, mesh)
    tokens, parts = sizes.B * sizes.l, mesh.shape[MODEL]
    part, hidden = tokens * config.model.width // parts, tokens * config.model.mlp_width // parts
    state = 6 * parameters + 2 * moments
    activations = 3 * sizes.itemsize * (10 * part + 4 * hidden)
    if setting.kernel == "dense":
        attention = 4 * SCORES * tokens * sizes.H * sizes.l * mesh.shape[SEQ]
    else:
        blocks = math.ceil(sizes.l / setting.block_queries)
        attention = 3 * sizes.itemsize * blocks * sizes.pair * mesh.shape[SEQ]
    return state + config.optim.accumulate * config.model.layers * (activations + attention)


def algorithmic_operations(model: Model, mesh, scores: float) -> int:
    """Operations per device and step that the algorithm needs, without what a kernel computes in vain.

    `scores` is the share of scores that count: all (1) in the paper, half (0.5) in balanced causal attention.
    """
    config, sizes = model.config, sizes_of(model.config, mesh)
    counted = scores * sizes.B * sizes.H * sizes.l * sizes.l * mesh.shape[SEQ]
    attention = 2 * sizes.K * PRODUCTS * counted * config.model.layers * config.optim.accumulate
    return outside_attention(model, mesh) + round(attention)


def groups(mesh) -> str:
    """The mesh as text: data x seq x model."""
    return " x ".join(str(size) for size in mesh.shape.values())
