"""How long a step would take on a machine that is not there: its public figures, and one formula in the open.

    step = max(operations / peak, bytes of memory moved / memory rate) + communication

Nothing of the communication hides behind work, and work runs at its peak: so the share of communication is an upper
bound, and the step a lower one. A collective of `n` devices takes ring steps: `n - 1` to gather or to scatter, twice
that to sum, one to pass on. Each costs the link's latency and its share of the bytes over the link's rate.
"""

import math
from typing import NamedTuple

from lss_jax.attention.placement import setting_on
from lss_jax.attention.traffic import sizes_of
from lss_jax.inspection.contract import SENT, Contract
from lss_jax.inspection.memory import arrays_of, memory_of
from lss_jax.inspection.operations import outside_attention
from lss_jax.models import Model
from lss_jax.parallel.mesh import SEQ


class Machine(NamedTuple):
    """Of one device: operations per second in bfloat16, bytes per second of its memory and of one ring of links."""

    name: str
    peak: float
    memory_rate: float
    link_rate: float
    latency: float  # seconds per ring step


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
PRODUCTS = 7  # of matrices in attention: two forward, five on the way back
SCORES = 10  # times that dense scores are written or read, float32: forward 4, on the way back 6


class StepTime(NamedTuple):
    """Seconds of a step, modelled."""

    compute: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        """Work at its peak, then communication."""
        return max(self.compute, self.memory) + self.communication


def step_time(machine: Machine, model: Model, mesh, operations: int, collectives: Contract) -> StepTime:
    """Of `operations` and `collectives` per device, as compiled or as predicted."""
    return StepTime(
        compute=operations / machine.peak,
        memory=bytes_moved(model, mesh) / machine.memory_rate,
        communication=communication(machine, collectives, mesh),
    )


def communication(machine: Machine, collectives: Contract, mesh) -> float:
    """Seconds in collectives, one after the other."""
    seconds = 0.0
    for line, total in collectives.items():
        n = math.prod(mesh.shape[axis] for axis in line.axes)
        seconds += total.times * HOPS[line.kind](n) * machine.latency
        seconds += SENT[line.kind](n) * total.bytes / machine.link_rate
    return seconds


def bytes_moved(model: Model, mesh) -> float:
    """In and out of a device's memory, counted: weights and moments, activations, and dense scores or keys.

    Weights are read three times and their gradients, moments and new values written and read once. Of activations each
    layer writes and reads what `memory.arrays_of` names ten (parts) and four (hidden) times, forward and twice back.
    """
    config, arrays, memory = model.config, arrays_of(model.config, mesh), memory_of(model, mesh)
    sizes, setting = sizes_of(config, mesh), setting_on(config, mesh)
    state = 6 * memory.parameters + 2 * memory.moments
    activations = 3 * sizes.itemsize * (10 * arrays.part + 4 * arrays.hidden)
    if setting.kernel == "dense":
        attention = 4 * SCORES * arrays.scores
    else:
        blocks = math.ceil(sizes.l / setting.block_queries)
        attention = 3 * sizes.itemsize * blocks * arrays.held.read
    return state + config.optim.accumulate * config.model.layers * (activations + attention)


def algorithmic_operations(model: Model, mesh, scores: float) -> int:
    """Of a step on each device, whatever a kernel computes in vain; `scores` is the share of scores that count.

    All of them in the paper, 1; half of them, 0.5, in causal attention that is balanced.
    """
    config, sizes = model.config, sizes_of(model.config, mesh)
    counted = scores * sizes.B * sizes.H * sizes.l * sizes.l * mesh.shape[SEQ]
    attention = 2 * sizes.K * PRODUCTS * counted * config.model.layers * config.optim.accumulate
    return outside_attention(model, mesh) + round(attention)


def groups(mesh) -> str:
    """A mesh in words: data x seq x model."""
    return " x ".join(str(size) for size in mesh.shape.values())
