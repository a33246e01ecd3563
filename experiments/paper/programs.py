"""What the tables share: training steps on devices that do not exist, compiled and read off; and results on disk."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from matplotlib.figure import Figure

from configs import paper_50112
from experiments.paper.machines import V5P, algorithmic_operations, groups, step_time
from lss_jax.config.schema import Config, from_dict
from lss_jax.data.loader import next_tokens, read_batch
from lss_jax.data.windows import windows_at
from lss_jax.inspection.audit import audited, json_of, on_device
from lss_jax.inspection.contract import sent
from lss_jax.inspection.topology import capacity_of, devices_of
from lss_jax.models import build_model
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import AXES
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.setup import mesh_of
from lss_jax.training.state import init_state
from lss_jax.training.step import trace_train_step

HERE = Path(__file__).parent
TOKENS = 348  # per device in the paper's weak scaling: 50,112 on 144
Mesh = tuple[int, int, int]
Row = dict[str, Any]

TORUS = {36: "2x2x9", 128: "8x16x1", 144: "12x12x1", 3456: "12x12x24"}
DENSE: Row = {"attention.kernel": "dense", "attention.regather": True}
BLOCKWISE: Row = {"attention.kernel": "blockwise", "attention.regather": True}


def config_of(mesh: Mesh, seq_len: int, changes: Row | None = None) -> Config:
    """The paper's model (6 layers, width 512, 8 heads, bfloat16, blocks recomputed), contiguous segments.

    One sequence per data group, unless the changes say otherwise.
    """
    values = paper_50112.get_config()
    of_mesh = {f"mesh.{axis}": size for axis, size in zip(AXES, mesh, strict=True)}
    values.update_from_flattened_dict(
        {**of_mesh, "data.seq_len": seq_len, "data.batch_size": mesh[0], **(changes or {})}
    )
    return from_dict(values)


def chips(count: int) -> Sequence[jax.Device]:
    """TPU v5p chips in a torus, for ahead-of-time compilation; six are a 2 x 3 host, which nobody can rent.

    128 and 144 form a plane: on 6 x 6 x 4 libtpu gathers by an all-reduce of zero-padded segments, which the audit
    reports.
    """
    if count == 6:
        devices_of("tpu:v5p:2x2x1")  # loads libtpu with the settings that it needs here
        shape: dict[str, Any] = {"topology_name": "v5p:2x3x1", "chips_per_host_bounds": (2, 3, 1)}
        return topologies.get_topology_desc(platform="tpu", **shape).devices
    return devices_of(f"tpu:v5p:{TORUS[count]}")


def compiled(config: Config, devices: Sequence[jax.Device]) -> Row:
    """A step's figures per device: memory, bytes sent and operations, read off the program, and its modelled time."""
    size = config.mesh.data * config.mesh.seq * config.mesh.model
    mesh = mesh_of(config, devices[:size])
    model = build_model(config)
    audit = audited(model, mesh)
    figures = json_of(audit, capacity_of(devices[0]))
    operations = audit.flops + audit.attention_flops
    collectives = audit.collectives or audit.predicted
    time = step_time(V5P, model, mesh, operations, collectives)
    row = {
        "mesh": groups(mesh),
        "devices": mesh.size,
        "seq_len": config.data.seq_len,
        "sequences": config.data.batch_size,
        "microbatches": config.optim.accumulate,
        "kernel": config.attention.kernel,
        "head_groups": config.attention.head_groups,
        "fits": audit.memory is not None,
        "too_large": audit.too_large,
        "memory": audit.memory,
        "memory_total": on_device(audit.memory) if audit.memory else None,
        "operations": operations,
        "attention_operations": audit.attention_flops,
        "algorithmic_operations": algorithmic_operations(model, mesh, scores=1),
        "sent": sent(audit.collectives or audit.predicted, mesh),
        "collectives": figures["collectives"]["compiled"],
        "compile_seconds": audit.seconds,
        "problems": figures["problems"],
        "modelled_seconds": {**time._asdict(), "total": time.total},
    }
    print(f"{row['mesh']}, {row['seq_len']:,} tokens, {row['kernel']}: {megabytes(row['memory_total'])}, "
          f"compiled in {audit.seconds:.0f} s", flush=True)  # fmt: skip
    return row


class Step:
    """A compiled step with its state and a batch of random bytes; a call runs one step and gives its loss."""

    def __init__(self, config: Config, devices: Sequence[jax.Device]):
        self.mesh, self.model = mesh_of(config, devices), build_model(config)
        self.program = trace_train_step(self.model, self.mesh).lower().compile()
        length, rows = config.data.seq_len, config.data.batch_size
        text = np.random.default_rng(0).integers(0, 256, rows * length + 1).astype(np.uint8)
        self._batch = read_batch(
            windows_at(text, np.arange(rows) * length, length),
            length,
            self.mesh,
            layout_on(config, self.mesh),
            read=next_tokens,
        )
        self._state = init_state(self.model, make_optimizer(config.optim), self.mesh, seed=0)

    @property
    def temporaries(self) -> int:
        """Bytes per device."""
        analysis = self.program.memory_analysis()
        assert analysis is not None, "every backend has one"
        return analysis.temp_size_in_bytes

    def __call__(self) -> float:
        self._state, metrics = self.program(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return float(metrics["loss"])


def megabytes(size: float | None) -> str:
    """A size for a table."""
    return "does not fit" if size is None else f"{size / 1e6:,.1f} MB"


def table(head: str, rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; ` | ` separates the column names in `head`."""
    lines = [f"| {head} |", "| --- " * len(head.split(" | ")) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def read(name: str) -> dict[str, Any]:
    """The results of an earlier run, of which a part may be run again."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, results: Any, render: Callable[[Any], str], plot: Callable[[Any], Figure]) -> None:
    """Writes the figures as JSON, the table as Markdown and the plot beside this file."""
    (HERE / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads((HERE / f"{name}.json").read_text())
    (HERE / f"{name}.md").write_text(render(results) + "\n")
    plot(results).savefig(HERE / f"{name}.png", dpi=100, bbox_inches="tight")
    print(render(results))
