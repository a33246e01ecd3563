"""Compares a compiled training step with its predictions: collectives, memory and operations."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lss_jax.attention.placement import kernel_on
from lss_jax.attention.strategies import STRATEGIES
from lss_jax.config.schema import Config
from lss_jax.config.units import shown_size
from lss_jax.inspection import contract, hlo, operations
from lss_jax.inspection.contract import Contract
from lss_jax.inspection.memory import memory_of, rests_on_host, shortfall
from lss_jax.inspection.topology import capacity_of, devices_of
from lss_jax.models import Model, build_model, parameter_count, shown_count, trained_count
from lss_jax.parallel.mesh import shard_bytes
from lss_jax.training.setup import mesh_of
from lss_jax.training.step import trace_train_step

HOST = "host memory"
OFFLOADED = 0.95  # of what should be in host memory: compilers may leave a few small arrays on the device
CLASSES = ("parameters", "optimizer state", "batch", "temporaries", HOST)


class Audit(NamedTuple):
    """A step as compiled and as predicted; what was compiled is None if the program does not fit its devices."""

    model: Model
    mesh: Mesh
    seconds: float  # of compilation
    collectives: Contract | None
    memory: dict[str, int] | None  # bytes per device, by class
    too_large: str  # the compiler's message if the program does not fit, else empty
    predicted: Contract
    predicted_memory: dict[str, int]  # as `memory`: from shapes, specs and the memory model's count of live arrays
    flops: int  # per device, of matrix products outside attention, traced
    attention_flops: int  # on the busiest device, by the blocks that the mask touches, or as the strategy counts them

    def __repr__(self) -> str:
        return text_of(self, capacity_of(self.mesh.devices.flat[0]))


def audit_step(config: Config, devices: str | Sequence[jax.Device] | None = None) -> Audit:
    """Compiles a config's training step and compares it with its predictions; allocates nothing.

    Args:
      config: from `lss_jax.load_config`.
      devices: to compile for; all there are by default; or a topology such as "tpu:v5p:2x2x2" or "gpu:h100:8", whose
        devices need not be there (that takes `pip install "jax[tpu]"` or `"jax[cuda13]"`).

    Returns:
      `collectives` as compiled and as `predicted`, `memory` in bytes per device, `flops`; `print` it for the table.

    Raises:
      ConfigError: the config does not fit the devices, or there is no such topology.
    """
    if isinstance(devices, str):
        devices = devices_of(devices)
    devices = jax.devices() if devices is None else devices
    mesh = mesh_of(config, devices)
    return audited(build_model(config, mesh), mesh)


def audited(model: Model, mesh: Mesh) -> Audit:
    """Compiles a model's training step from shapes alone and compares it with its predictions."""
    traced = trace_train_step(model, mesh)
    expected = dict(zip(CLASSES, memory_of(model, mesh, traced), strict=True))
    known = (
        contract.predicted(model, mesh),
        expected,
        operations.traced(traced.jaxpr),
        operations.attention(model, mesh),
    )
    started = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return Audit(model, mesh, time.perf_counter() - started, None, None, shortfall(error), *known)
    seconds = time.perf_counter() - started
    found = contract.found(hlo.collectives(compiled.as_text()), mesh)
    return Audit(model, mesh, seconds, found, _memory(compiled, mesh), "", *known)


def _memory(compiled: jax.stages.Compiled, mesh: Mesh) -> dict[str, int]:
    """Bytes per device, by class: the arguments, by the program's input shardings, and the temporaries."""
    (state, batch), _ = compiled.args_info
    (state_shardings, batch_shardings), _ = compiled.input_shardings

    def size(infos: Any, shardings: Any) -> int:
        """Bytes per device, on it, of the arguments that the program uses: the others have no sharding."""

        def of_one(info: Any, sharding: Any) -> int:
            return shard_bytes(info, sharding) if sharding and not rests_on_host(sharding, mesh) else 0

        return sum(jax.tree.leaves(jax.tree.map(of_one, infos, shardings)))

    analysis = compiled.memory_analysis()
    assert analysis is not None, "every backend of XLA has one"
    sizes = (
        size(state.params, state_shardings.params),
        size(state.opt_state, state_shardings.opt_state),
        size(batch, batch_shardings),
        analysis.temp_size_in_bytes,
        analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes,
    )
    return dict(zip(CLASSES, sizes, strict=True))


def problems(audit: Audit, room: int | None) -> list[str]:
    """Differences between program and prediction, and whether it exceeds a device's memory of `room` bytes."""
    if audit.collectives is None or audit.memory is None:
        return [f"it does not fit: {audit.too_large}"]
    found = contract.disagreements(audit.collectives, audit.predicted)
    expected = operations.outside_attention(audit.model, audit.mesh)
    if audit.flops != expected:
        found.append(f"operations outside attention: {audit.flops:,} in the program, {expected:,} predicted")
    expected_host = audit.predicted_memory[HOST]
    if audit.memory[HOST] < OFFLOADED * expected_host:
        found.append(
            f"host memory: {shown_size(audit.memory[HOST])} in the program, {shown_size(expected_host)} predicted: "
            f"what should wait there stays on the devices"
        )
    needed = on_device(audit.memory)
    if room and needed > room:
        found.append(
            f"it does not fit: {shown_size(needed)} of {shown_size(room)}, {shown_size(needed - room)} too much"
        )
    return found


def text_of(audit: Audit, room: int | None) -> str:
    """The audit as text for a terminal; `room` is a device's memory in bytes, None if unknown."""
    config, mesh, device = audit.model.config, audit.mesh, audit.mesh.devices.flat[0]
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"devices     {mesh.size:,} {device.device_kind}, mesh {sizes}",
        f"model       {shown_count(audit.model)}, {config.model.layers} layers, {config.model.dtype}, "
        f"attention {config.attention.strategy} ({config.attention.layout}, {kernel_on(config.attention, mesh)})",
        f"step        {config.data.batch_size} sequences of {config.data.seq_len:,} tokens",
        f"compiled    in {audit.seconds:.1f} s, jax {jax.__version__}",
        "",
        *_table_of_collectives(audit),
        "",
        *_table_of_memory(audit, room),
        "",
        *_table_of_operations(audit),
    ]
    differences = [f"differs     {problem}" for problem in problems(audit, room)]
    return "\n".join([*lines, "", *(differences or ["all as predicted"])])


def _table_of_collectives(audit: Audit) -> list[str]:
    predicted, found = audit.predicted, audit.collectives or {}
    width = max([21, *(len(line.place) + 1 for line in (*found, *predicted))])
    lines = [
        "collectives per step; MB are of their results on one device",
        f"{'':{width}}{'':20}{'':11}{'compiled':>14}{'':7}{'':9}{'predicted':>14}",
        f"{'in':{width}}{'kind':20}{'over':11}{'times':>7}{'MB':>14}{'async':>7}  {'times':>7}{'MB':>14}",
    ]
    for line in sorted(found.keys() | predicted.keys()):
        one, other = found.get(line), predicted.get(line)
        lines.append(
            f"{line.place:{width}}{line.kind:20}{','.join(line.axes):11}"
            + (f"{one.times:7}{one.bytes / 1e6:14,.3f}{one.asynchronous:7}" if one else f"{'-':>7}{'-':>14}{'-':>7}")
            + (f"  {other.times:7}{other.bytes / 1e6:14,.3f}" if other else f"  {'-':>7}{'-':>14}")
        )
    return lines if len(lines) > 3 else ["no collectives"]


def _table_of_memory(audit: Audit, room: int | None) -> list[str]:
    compiled, predicted = audit.memory, audit.predicted_memory
    lines = [f"{'memory per device':21}{'compiled':>14}{'predicted':>14}"]
    for name in CLASSES:
        lines.append(f"{name:21}{shown_size(compiled[name]) if compiled else '-':>14}{shown_size(predicted[name]):>14}")
    needed = on_device(compiled) if compiled else 0
    lines.append(
        f"{'all on the device':21}{shown_size(needed) if compiled else '-':>14}{shown_size(on_device(predicted)):>14}"
    )
    if not compiled:
        return [*lines, f"does not fit: {audit.too_large}"]
    return [*lines, f"of {shown_size(room)}: {'fits' if needed <= room else 'does not fit'}"] if room else lines


def on_device(memory: dict[str, int]) -> int:
    """The bytes of all classes that must fit a device's memory."""
    return sum(size for name, size in memory.items() if name != HOST)


def _table_of_operations(audit: Audit) -> list[str]:
    outside = operations.outside_attention(audit.model, audit.mesh)
    of_kernel = STRATEGIES[audit.model.config.attention.strategy].operations is None
    counted = "by the blocks that the mask touches" if of_kernel else "as the strategy counts them"
    return [
        "floating-point operations per step and device, of matrix products",
        f"{'outside attention':21}{audit.flops:>24,} traced{outside:>24,} predicted",
        f"{'attention':21}{audit.attention_flops:>24,} {counted}, on the busiest device",
    ]


def json_of(audit: Audit, room: int | None) -> dict[str, Any]:
    """The audit for JSON: all figures per device and step, in bytes, seconds and operations."""

    def rows(lines: Contract | None) -> list[dict[str, Any]] | None:
        return (
            None
            if lines is None
            else [{**line._asdict(), "axes": list(line.axes), **lines[line]._asdict()} for line in sorted(lines)]
        )

    return {
        "mesh": dict(audit.mesh.shape),
        "device": audit.mesh.devices.flat[0].device_kind,
        "parameters": parameter_count(audit.model),
        "trained": trained_count(audit.model),
        "compile_seconds": audit.seconds,
        "collectives": {
            "compiled": rows(audit.collectives),
            "predicted": rows(audit.predicted),
        },
        "memory": {"compiled": audit.memory, "predicted": audit.predicted_memory},
        "memory_of_device": room,
        "too_large": audit.too_large,
        "operations": {
            "outside_attention_traced": audit.flops,
            "outside_attention_predicted": operations.outside_attention(audit.model, audit.mesh),
            "attention": audit.attention_flops,
        },
        "problems": problems(audit, room),
    }
