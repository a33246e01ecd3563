"""The memory of a training step, in bytes per device: state and batch by their specs, temporaries by counting arrays.

Temporaries are what the compiled program allocates beside its arguments. They are counted on the traced step, whatever
model, task and options it is made of (`liveness`), and enlarged by a margin, so that nothing "fits" that the compiler
says does not. How close this is to the compiler's own numbers is measured by `python -m experiments.planner.run`, for a
few configs also on TPUs, whose compiler assigns buffers differently.
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from lss_jax.config.schema import Config
from lss_jax.inspection.liveness import Liveness, liveness
from lss_jax.models import Model
from lss_jax.parallel.host_memory import HOST
from lss_jax.parallel.mesh import has_host_memory, shard_bytes
from lss_jax.tasks import make_task
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.state import state_like
from lss_jax.training.step import trace_train_step

MARGIN = 1.05  # of what is counted: the compiler's schedule and packing differ a little from `liveness`


class Memory(NamedTuple):
    """The memory of a training step, in bytes per device: on the device, but for `host`."""

    parameters: int
    moments: int  # the whole state of the optimizer
    batch: int
    temporaries: int
    host: int  # in the host's memory: layers' inputs that wait there, and state that rests there

    @property
    def total(self) -> int:
        """The bytes that must fit a device's memory."""
        return self.parameters + self.moments + self.batch + self.temporaries


def shortfall(error: jax.errors.JaxRuntimeError) -> str:
    """The compiler's message on a program that exceeds its devices' memory; any other error is raised again."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        raise error
    sizes = re.search(r"Used .*? of .*? hbm\. Exceeded hbm capacity by [\d.]+\w*", message)
    return sizes[0] if sizes else message.splitlines()[0]


def memory_of(model: Model, mesh: Mesh | AbstractMesh, traced: jax.stages.Traced | None = None) -> Memory:
    """Predicts the memory of this model's training step on this mesh, which may be abstract; traces it if need be."""
    live = live_arrays(model, mesh, traced)
    parameters, moments, batch, on_host = arguments_of(model, mesh)
    return Memory(parameters, moments, batch, math.ceil(MARGIN * live.device), live.host + on_host)


def live_arrays(model: Model, mesh: Mesh | AbstractMesh, traced: jax.stages.Traced | None = None) -> Liveness:
    """What the traced training step holds beside its arguments: bytes on the device and on its host, without margin."""
    return liveness((traced or trace_train_step(model, mesh)).jaxpr, on_cpu=not has_host_memory(mesh))


def arguments_of(model: Model, mesh: Mesh | AbstractMesh) -> tuple[int, int, int, int]:
    """Bytes per device of parameters, moments and batch, and of what of these is in the host's memory instead."""
    state = state_like(model, make_optimizer(model.config.optim), mesh)
    parameters, moments, batch = (
        _bytes(arrays, mesh) for arrays in (state.params, state.opt_state, (state.step, _used(model.config, mesh)))
    )
    return parameters[0], moments[0], batch[0], parameters[1] + moments[1] + batch[1]


def _bytes(arrays: Any, mesh: Mesh | AbstractMesh) -> tuple[int, int]:
    """Bytes per device of arrays with shapes, dtypes and shardings: on the device, and in the host's memory."""
    sizes = [0, 0]
    for leaf in jax.tree.leaves(arrays):
        sizes[rests_on_host(leaf.sharding, mesh)] += shard_bytes(leaf, leaf.sharding)
    return sizes[0], sizes[1]


def rests_on_host(sharding: Any, mesh: Mesh | AbstractMesh) -> bool:
    """Whether arrays of this sharding take none of the devices' memory."""
    return sharding.memory_kind == HOST and has_host_memory(mesh)


def _used(config: Config, mesh: Mesh | AbstractMesh) -> Any:
    """What the step uses of a batch; the numbers of its rows are an argument for dropout alone."""
    batch = make_task(config).batch_like(mesh)
    return batch if config.model.dropout else batch._replace(rows=None)
