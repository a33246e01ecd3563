"""Modelled seconds of a training step at each rung's longest sequence, and where they go; nothing is compiled or run.

    python -m experiments.longest.seconds

Reads `results.json`, which `run.py` writes. Operations are counted on the busiest device (products outside attention as
predicted, attention by the blocks that the kernel visits, recomputation included) and run at the chip's peak.
Collectives are those of the contract, on the links of `experiments/paper/machines.py`. What moves between device and
host goes at an assumed rate. Nothing overlaps, so that the shares are upper bounds but for compute, which never reaches
the peak. Writes `seconds.md` beside this file.
"""

import json
from pathlib import Path
from typing import Any

from experiments.longest.run import RUNGS, fits
from experiments.paper.machines import V5P, communication
from lss_jax import load_config
from lss_jax.inspection import contract, operations
from lss_jax.inspection.topology import cpu_devices_of, devices_of
from lss_jax.models import build_model, parameter_count
from lss_jax.models.recompute import waiting
from lss_jax.runtime import distributed
from lss_jax.training.setup import mesh_of

HERE = Path(__file__).parent
HOST_RATE = 32e9  # bytes per second and direction between a chip and its host: an assumption, that of PCIe 4.0 x16
# How often a step moves state that rests on the host: weights there for both passes, and there and back for the
# update; gradients back, there and back to be divided, there for the norm and for the update; moments there and back.
WEIGHTS, GRADIENTS, MOMENTS = 2 + 2, 1 + 2 + 1 + 1, 2


def seconds(topology: str, devices: int, length: int, changes: dict[str, Any]) -> dict[str, float]:
    """Seconds by what they are for, of one step."""
    config = load_config("configs/llama_8b.py", {**changes, "mesh.seq": devices, "data.seq_len": length})
    mesh = mesh_of(config, devices_of(topology)[:devices])
    model = build_model(config, mesh)
    moved = 2 * waiting(config, mesh)
    if config.optim.offload:
        moments = 2 * (2 if config.optim.moments_dtype == "bfloat16" else 4)
        bytes_each = 4 * (WEIGHTS + GRADIENTS) + MOMENTS * moments
        moved += bytes_each * parameter_count(model) // devices
    return {
        "attention": operations.attention(model, mesh) / V5P.peak,
        "other products": operations.outside_attention(model, mesh) / V5P.peak,
        "collectives": communication(V5P, contract.predicted(model, mesh), mesh),
        "host": moved / HOST_RATE,
    }


def main() -> None:
    distributed.start_on_cpu(cpu_devices_of("tpu:v5p:2x2x2"))
    results = json.loads((HERE / "results.json").read_text())
    lines = [
        "| rung | devices | tokens | attention, s | other products, s | collectives, s | host, s | in all, s |",
        "| --- " * 8 + "|",
    ]
    for name, rung in results.items():
        _, topology, devices, _, changes = RUNGS[name]
        good = [program["length"] for program in rung["programs"] if fits(program)]
        if not good:
            continue
        parts = seconds(topology, devices, max(good), changes)
        figures = " | ".join(f"{value:,.1f}" for value in (*parts.values(), sum(parts.values())))
        lines.append(f"| {name} | {devices} | {max(good):,} | {figures} |")
        print(lines[-1], flush=True)
    (HERE / "seconds.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
