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
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lss_jax.config.schema import Config
from lss_jax.models import Model, costs_of
from lss_jax.parallel.mesh import without_unsharded
from lss_jax.tasks import make_task
from lss_jax.training.optimizer import moments_of
from lss_jax.training.state import moment_specs, param_specs

NUMBER = 4  # bytes
GAPS = 1.07  # temporaries over the largest sum of live buffers: the heap is fragmented
COUNTERS = {"adamw": 3, "muon": 8}  # of steps, in the state; and three coefficients of Muon's


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


def memory_of(model: Model, mesh: Mesh | AbstractMesh) -> Memory:
    """Predicts the memory of this model's training step on this mesh, which may be abstract.

    Raises:
      ConfigError: the model's family declares no costs.
    """
    return Memory(
        parameters=NUMBER * _numbers(model, param_specs(model, mesh), mesh),
        moments=NUMBER * _numbers(model, moment_specs(model, mesh), mesh, moments_of(model.config.optim, model.shapes)),
        batch=NUMBER * (_batch(model.config, mesh) + COUNTERS[model.config.optim.name]),
        temporaries=math.ceil(GAPS * NUMBER * max(peaks(model, mesh).values())),
    )


def peaks(model: Model, mesh: Mesh | AbstractMesh) -> dict[str, float]:
    """Elements per device that are live at each of the moments of the step that may need most, as the family says."""
    return costs_of(model).peaks(model.config, mesh, _numbers(model, param_specs(model, mesh), mesh))


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
