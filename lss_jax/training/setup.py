"""Before anything is opened or compiled: is the config possible on these devices, and which mesh are they?"""

from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from lss_jax.attention.placement import kernel_on
from lss_jax.attention.strategies import STRATEGIES, mask_problems, strategy_problems
from lss_jax.attention.strategy import Shards
from lss_jax.config.rules import MeshSizes, optimizer_problems, problems
from lss_jax.config.schema import Config, ConfigError
from lss_jax.models import FAMILIES, build_model, family_problems
from lss_jax.parallel.mesh import make_mesh
from lss_jax.tasks import TASKS, make_task, task_problems
from lss_jax.tasks.task import NEEDS


def validate(config: Config, device_count: int, *, trains: bool = True) -> MeshSizes:
    """Checks everything that can be known before data is opened and anything is compiled; returns the mesh sizes.

    What only reads parameters, and does not train, may do without the rules of the optimizer.

    Raises:
      ConfigError: all problems at once, a line each: those of any config, then of its strategy, family and task.
    """
    found, sizes = problems(config, device_count)
    found += strategy_problems(config.attention, _shards(config, sizes))
    found += [*family_problems(config), *task_problems(config), *_unserved(config)]
    found += _inexpressible(config, _shards(config, sizes))
    found += FAMILIES[config.model.family].problems(config, sizes) if config.model.family in FAMILIES else []
    found += optimizer_problems(config, sizes) if trains else []
    if found:
        raise ConfigError("\n".join(found))
    if config.optim.frozen or config.lora.rank:
        build_model(config)  # which knows the names that patterns are of
    assert sizes is not None
    return sizes


def mesh_of(config: Config, devices: Sequence[jax.Device], *, trains: bool = True) -> Mesh:
    """The mesh that a config asks for, made of these devices; see `validate`.

    Raises:
      ConfigError: the config does not fit them, or names a kernel for others.
    """
    mesh = make_mesh(validate(config, len(devices), trains=trains), devices)
    kernel_on(config.attention, mesh)
    return mesh


def _unserved(config: Config) -> Iterator[str]:
    """Whether the family gives what the task needs."""
    if config.task not in TASKS or config.model.family not in FAMILIES:
        return
    needs = TASKS[config.task].needs
    if needs not in FAMILIES[config.model.family].serves:
        others = " or ".join(f'"{name}"' for name, family in FAMILIES.items() if needs in family.serves)
        yield (
            f"task={config.task!r} {NEEDS[needs]}, which model.family={config.model.family!r} does not do; "
            f"use model.family={others}"
        )


def _inexpressible(config: Config, shards: Shards) -> Iterator[str]:
    """What of the task's mask the strategy cannot express."""
    if config.task in TASKS and config.attention.strategy in STRATEGIES:
        yield from mask_problems(config, make_task(config).mask_kind, shards)


def _shards(config: Config, sizes: MeshSizes | None) -> Shards:
    """What a strategy's rules look at; one device, where the mesh is wrong for any strategy."""
    heads, kv_heads = config.model.heads, config.model.kv_heads
    if sizes is None or heads % sizes[2] or kv_heads % sizes[2]:
        return Shards(heads, kv_heads, seq=1, model=1)
    return Shards(heads, kv_heads, *sizes[1:])
