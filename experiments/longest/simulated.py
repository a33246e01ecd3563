"""What making room costs and buys where it can be run: on 8 simulated devices, time and resident memory.

    python -m experiments.longest.simulated

A model of the Llama class, small enough for two cores. First the time of a training step, of variants that take turns
in one process: nothing recomputed, each block recomputed from its input, and the same with everything on (weights in
shares, tiles, groups of heads, inputs "offloaded", which on CPU means saved; then also the state on the host). Then the
memory of a process that trains on one sequence of 131,072 tokens (with a sliding window, or it would take hours), each
variant in a process of its own. Fifteen minutes on two idle cores. Writes `simulated.json` and `simulated.md` beside
this file.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import base
from experiments.attention.programs import ratio, take_turns
from lss_jax.config.schema import Config, from_dict
from lss_jax.data.loader import next_tokens, read_batch
from lss_jax.data.windows import windows_at
from lss_jax.models import build_model, parameter_count
from lss_jax.parallel.layout import layout_on
from lss_jax.runtime import distributed
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.setup import mesh_of
from lss_jax.training.state import init_state
from lss_jax.training.step import make_train_step

HERE = Path(__file__).parent
DEVICES, LAYERS = 8, 2
LLAMA = {
    "model.norm": "rms",
    "model.mlp": "swiglu",
    "model.bias": False,
    "model.positions": "rope",
    "model.tied_head": False,
    "model.vocab": 4_096,
    "model.layers": LAYERS,
    "model.width": 256,
    "model.heads": 8,
    "model.kv_heads": 4,
    "model.mlp_width": 896,
    "mesh.data": 1,
    "mesh.seq": DEVICES,
    "data.batch_size": 1,
}
EVERYTHING = {
    "mesh.shard": "all",
    "model.tile": 512,
    "model.remat": "offload",
    "attention.head_groups": 4,
    "attention.regather": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks recomputed": {"model.remat": "input"},
    "everything": EVERYTHING,
    "everything, state on the host": {**EVERYTHING, "optim.offload": True},
}
TIMED, LONG = 8_192, 131_072  # tokens
WINDOW = 2_048  # tokens, of attention in the long ones: all keys would take two cores an hour, in the same memory


def config_of(variant: str, seq_len: int, window: int = 0) -> Config:
    values, data = base.get_config(), {"data.seq_len": seq_len, "attention.window": window}
    values.update_from_flattened_dict({**LLAMA, **data, **VARIANTS[variant]})
    return from_dict(values)


class Training:
    """A compiled step, and what it trains."""

    def __init__(self, config: Config):
        mesh = mesh_of(config, jax.devices()[:DEVICES])
        self.model, optimizer = build_model(config, mesh), make_optimizer(config.optim)
        source = np.random.default_rng(0).integers(0, 256, 10**6).astype(np.uint8)
        self.batch = read_batch(
            windows_at(source, np.zeros(1, int), config.data.seq_len),
            config.data.seq_len,
            mesh,
            layout_on(config, mesh),
            read=next_tokens,
        )
        self.state = init_state(self.model, optimizer, mesh, seed=0)
        self._step = make_train_step(self.model, optimizer, mesh).lower(self.state, self.batch).compile()

    def seconds(self) -> float:
        """Trains one step; returns its seconds."""
        started = time.perf_counter()
        self.state, _ = self._step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - started


def resident(variant: str) -> int:
    """The resident memory of this process at its largest, in bytes, in a step on a long sequence."""
    Training(config_of(variant, LONG, WINDOW)).seconds()
    status = Path("/proc/self/status").read_text()  # unlike `getrusage` without the process that started this one
    found = re.search(r"VmHWM:\s*(\d+)", status)
    assert found
    return 1024 * int(found[1])


def table(results: dict[str, Any]) -> str:
    seconds, memory = results["seconds"], results["resident"]
    lines = [
        f"{results['parameters']:,} parameters, {LAYERS} layers, 1 x {DEVICES} x 1 simulated devices, one sequence",
        "",
        f"| variant | step at {TIMED:,} tokens, s | over plain | over blocks recomputed "
        f"| resident at {LONG:,} tokens, GiB |",
        "| --- " * 5 + "|",
    ]
    for name in VARIANTS:
        ratios = " | ".join(f"{ratio(seconds[name], seconds[over]):.2f}" for over in ("plain", "blocks recomputed"))
        median = statistics.median(seconds[name])
        lines.append(f"| {name} | {median:.2f} | {ratios} | {memory[name] / 2**30:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant (default: 5)")
    parser.add_argument("--resident", choices=VARIANTS, help=argparse.SUPPRESS)  # one variant, in its own process
    arguments = parser.parse_args()
    distributed.start_on_cpu(DEVICES)
    if arguments.resident:
        print(json.dumps(resident(arguments.resident)))
        return
    seconds = take_turns({name: Training(config_of(name, TIMED)) for name in VARIANTS}, arguments.rounds)
    memory = {}
    for name in VARIANTS:
        command = [sys.executable, "-m", "experiments.longest.simulated", "--resident", name]
        memory[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name}: {memory[name]}", flush=True)
    parameters = parameter_count(build_model(config_of("plain", TIMED)))
    results = {"parameters": parameters, "seconds": seconds, "resident": memory}
    (HERE / "simulated.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "simulated.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
