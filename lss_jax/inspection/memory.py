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
from lss_jax.parallel.mesh import has_host_memory
from lss_jax.tasks import make_task
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.state import state_like
from lss_jax.training.step import trace_train_step

MARGIN = 1.05  # of what is counted: the compiler's schedule and packing differ a little from `liveness`


class Memory(NamedTuple):
    """The memory of a training step, in bytes per device."""

    parameters: int
    moments: int  # the whole state of the optimizer
    batch: int
    temporaries: int
    host: int  # layers' inputs that wait in the host's memory

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
    live, waits = live_arrays(model, mesh, traced), has_host_memory(mesh)
    temporaries = math.ceil(MARGIN * (live.device if waits else live.device + live.host))
    return Memory(*arguments_of(model, mesh), temporaries, live.host if waits else 0)


def live_arrays(model: Model, mesh: Mesh | AbstractMesh, traced: jax.stages.Traced | None = None) -> Liveness:
    """What the traced training step holds beside its arguments: bytes on the device and on its host, without margin."""
    return liveness((traced or trace_train_step(model, mesh)).jaxpr)


def arguments_of(model: Model, mesh: Mesh | AbstractMesh) -> tuple[int, int, int]:
    """Bytes per device of parameters, moments and batch."""
    state = state_like(model, make_optimizer(model.config.optim), mesh)
    return _bytes(state.params), _bytes(state.opt_state), _bytes(state.step) + _bytes(_used(model.config, mesh))


def _used(config: Config, mesh: Mesh | AbstractMesh) -> Any:
    """What the step uses of a batch; the numbers of its rows are an argument for dropout alone."""
    batch = make_task(config).batch_like(mesh)
    return batch if config.model.dropout else batch._replace(rows=None)


def _bytes(arrays: Any) -> int:
    """Bytes per device of arrays with shapes, dtypes and shardings."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
