"""The overhead of sharding: a training step on 8 simulated devices over the same step on 1, on the same cores.

    python -m experiments.spmd_overhead.run

Both do the same global work (the same model, batch and sequence), so a ratio of 1 means that sharding is free. The
meshes take turns in one process; a figure is the median over the rounds of the ratio to the whole step on one device
within a round. Beside the whole step are its parts, each timed as a program of its own: the loss and gradient, and the
optimizer, which every device runs for the whole model because weights are replicated; and the CPU time of the whole
step, in user and in kernel mode. Takes about six minutes on two cores. Writes `results.json` and `results.md` beside
this file.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import optax

from configs import base
from lss_jax.config.schema import Config, from_dict
from lss_jax.data.loader import next_tokens, read_batch
from lss_jax.data.windows import windows_at
from lss_jax.models import build_model, parameter_count
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import make_mesh
from lss_jax.runtime import distributed
from lss_jax.training.optimizer import make_optimizer
from lss_jax.training.setup import validate
from lss_jax.training.state import init_state, state_shardings
from lss_jax.training.step import make_means_and_gradient, make_train_step

MESHES = [(1, 1), (1, 8), (2, 4)]  # data x seq
SIZES = {  # with more and more tokens per parameter: at first weights dominate the work, at last the sequence does
    "short": {"data.seq_len": 256, "data.batch_size": 8},
    "medium": {"data.seq_len": 1024, "data.batch_size": 8},
    "long": {"data.seq_len": 4096, "data.batch_size": 2, "model.layers": 2},
}
PARTS = ("step", "gradient", "optimizer")
HERE = Path(__file__).parent


def config_of(size: str, data: int, seq: int) -> Config:
    values = base.get_config()
    values.update_from_flattened_dict({**SIZES[size], "mesh.data": data, "mesh.seq": seq})
    return from_dict(values)


class Programs:
    """The compiled step and its parts on one mesh, with their arguments."""

    def __init__(self, size: str, data: int, seq: int):
        config = config_of(size, data, seq)
        mesh = make_mesh(validate(config, data * seq), jax.devices()[: data * seq])
        self.model, optimizer = build_model(config), make_optimizer(config.optim)
        source = np.random.default_rng(0).integers(0, 256, 10**6).astype(np.uint8)
        starts_B = np.arange(config.data.batch_size) * config.data.seq_len
        self.batch = read_batch(
            windows_at(source, starts_B, config.data.seq_len),
            config.data.seq_len,
            mesh,
            layout_on(config, mesh),
            read=next_tokens,
        )
        self.state = init_state(self.model, optimizer, mesh, seed=0)
        placed = state_shardings(self.model, optimizer, mesh)

        def update(gradient, opt_state, params):
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self._step = make_train_step(self.model, optimizer, mesh).lower(self.state, self.batch).compile()
        gradient = jax.jit(make_means_and_gradient(self.model, mesh))
        self._gradient = gradient.lower(self.state.params, self.batch, 0).compile()
        self._last = self._gradient(self.state.params, self.batch, 0)[1]
        self._optimizer = (
            jax.jit(update, out_shardings=(placed.params, placed.opt_state))
            .lower(self._last, self.state.opt_state, self.state.params)
            .compile()
        )

    def step(self):
        self.state, metrics = self._step(self.state, self.batch)
        return metrics

    def gradient(self):
        return self._gradient(self.state.params, self.batch, 0)

    def optimizer(self):
        return self._optimizer(self._last, self.state.opt_state, self.state.params)


def measure(size: str, rounds: int) -> dict:
    programs = {mesh: Programs(size, *mesh) for mesh in MESHES}
    seconds: dict[str, dict[tuple[int, int], list[float]]] = {part: {mesh: [] for mesh in MESHES} for part in PARTS}
    cpu: dict[tuple[int, int], list[tuple[float, float]]] = {mesh: [] for mesh in MESHES}
    for part in PARTS:
        for turn in range(rounds + 1):
            for mesh, program in programs.items():
                before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
                jax.block_until_ready((getattr(program, part)(), program.state))
                if turn:  # the first warms up
                    seconds[part][mesh].append(time.perf_counter() - started)
                    after = resource.getrusage(resource.RUSAGE_SELF)
                    if part == "step":
                        cpu[mesh].append((after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime))
    whole = seconds["step"][MESHES[0]]

    def ratio(part: str, mesh: tuple[int, int]) -> float:
        return statistics.median(t / one for t, one in zip(seconds[part][mesh], whole, strict=True))

    config = config_of(size, 1, 1)
    return {
        "size": size,
        "parameters": parameter_count(programs[MESHES[0]].model),
        "layers": config.model.layers,
        "seq_len": config.data.seq_len,
        "batch_size": config.data.batch_size,
        "rounds": rounds,
        "seconds_of_one_device": statistics.median(whole),
        "ratios": {f"{d}x{s}": {part: ratio(part, (d, s)) for part in PARTS} for d, s in MESHES},
        "cpu_seconds": {f"{d}x{s}": list(map(statistics.median, zip(*cpu[d, s], strict=True))) for d, s in MESHES},
    }


def table(results: list[dict]) -> str:
    lines = [
        "| size | parameters | tokens | data x seq | step | loss and gradient | optimizer | CPU s, user + kernel |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        tokens = f"{result['batch_size']} x {result['seq_len']:,}"
        for mesh, ratio in result["ratios"].items():
            figures = " | ".join(f"{ratio[part]:.2f}" for part in PARTS)
            cpu = " + ".join(f"{seconds:.2f}" for seconds in result["cpu_seconds"][mesh])
            lines.append(f"| {result['size']} | {result['parameters']:,} | {tokens} | {mesh} | {figures} | {cpu} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions of each program (default: 5)")
    arguments = parser.parse_args()
    distributed.start()
    results = []
    for size in SIZES:
        results.append(measure(size, arguments.rounds))
        print(table(results[-1:]), flush=True)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "results.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
