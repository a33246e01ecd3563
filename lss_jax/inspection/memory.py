"""The memory of a training step, in bytes per device: state and batch by their specs, temporaries by counting arrays.

Temporaries are what the compiled program allocates beside its arguments: the arrays that are live at the moment that
needs most, which a family's `Costs` count in elements of four bytes. The sums bound the compiler's from above, so that
nothing "fits" that the compiler says does not. How close they are is measured by `python -m experiments.planner.run`,
for a few configs also on TPUs, whose compiler assigns buffers differently.
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from lss_jax.config.schema import Config
from lss_jax.models import Model, costs_of
from lss_jax.models.stack import waiting
from lss_jax.tasks import make_task
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.state import state_like

NUMBER = 4  # bytes
GAPS = 1.07  # temporaries over the largest sum of live buffers: the heap is fragmented


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


def memory_of(model: Model, mesh: Mesh | AbstractMesh) -> Memory:
    """Predicts the memory of this model's training step on this mesh, which may be abstract.

    Raises:
      ConfigError: the model's family declares no costs.
    """
    state = state_like(model, make_optimizer(model.config.optim), mesh)
    return Memory(
        parameters=_bytes(state.params),
        moments=_bytes(state.opt_state),
        batch=_bytes(state.step) + _bytes(_used(model.config, mesh)),
        temporaries=math.ceil(GAPS * NUMBER * max(peaks(model, mesh).values())),
        host=waiting(model.config, mesh),
    )


def peaks(model: Model, mesh: Mesh | AbstractMesh) -> dict[str, float]:
    """Elements per device that are live at each of the moments of the step that may need most, as the family says."""
    state = state_like(model, make_optimizer(model.config.optim), mesh)
    return costs_of(model).peaks(model.config, mesh, _bytes(state.params) // NUMBER)


def _used(config: Config, mesh: Mesh | AbstractMesh) -> Any:
    """What the step uses of a batch; the numbers of its rows are an argument for dropout alone."""
    batch = make_task(config).batch_like(mesh)
    return batch if config.model.dropout else batch._replace(rows=None)


def _bytes(arrays: Any) -> int:
    """Bytes per device of arrays with shapes, dtypes and shardings."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
