"""Table 1: LSS against Nvidia's sequence parallelism, the same model and the same tokens.

    python -m experiments.paper.head_to_head               # all; compiling takes pip install "jax[tpu]"
    python -m experiments.paper.head_to_head --only measured

The paper (arXiv 2311.02382, Results): on 144 GPUs LSS is 5.6 times as fast and takes 10.2 times less memory.

*Measured*: a step on 2, 4 and 8 simulated devices that share this machine's cores, the mesh 1 x N x 1 (LSS) against
1 x 1 x N (the baseline), taking turns; the time is the median over rounds of the ratio within a round. Simulated
devices communicate through memory, so this compares the work, not the network.

*Compiled*, for TPU v5p: the paper's model at 348 tokens per device. The baseline shards heads, of which there are 8:
144 devices are 18 groups of 8 with a sequence each (36: 9 groups of 4). So LSS gets the same 18 (9) sequences per step,
one after the other over all devices (`optim.accumulate`): the same tokens, the same update, the same work per device.
That is the paper's own comparison: what cannot be sharded further must be replicated in data groups. Both recompute
blocks (`remat="block"`). With the dense kernel both hold scores in memory, as the paper's did; with the blockwise one
neither does.

Where the column `as predicted` says no, the audit finds other collectives than the formulas predict, and the JSON
lists them: on 128 chips, where the moments are sharded, libtpu gathers all but two parameters in one all-reduce of
zero-padded shards (the shards of those two fill its tiles).

*Modelled*: the seconds of a step, by `machines.py`, from the compiled operations and collectives.
"""

import argparse
import statistics
import time

import jax

from experiments.paper.head_to_head_report import plot, render
from experiments.paper.programs import (
    BLOCKWISE,
    DENSE,
    TOKENS,
    Mesh,
    Row,
    Step,
    chips,
    compiled,
    config_of,
    read,
    write,
)
from lss_jax.runtime import distributed

NAME = "head_to_head"
SMALL: Row = {"model.layers": 4, "model.width": 256, "model.dtype": "float32"}
LENGTH = 2048  # tokens, on simulated devices
BASELINES = {36: (9, 1, 4), 144: (18, 1, 8)}
GROUPS = 8  # of heads, one collective each, where LSS is to save memory
KERNELS = {"dense": DENSE, "blockwise": BLOCKWISE}


def measured(devices: int, rounds: int) -> list[Row]:
    """Both methods on `devices` simulated devices, dense and blockwise."""
    rows = []
    for kernel, changes in KERNELS.items():
        meshes: dict[str, Mesh] = {"lss": (1, devices, 1), "baseline": (1, 1, devices)}
        configs = {name: config_of(mesh, LENGTH, {**SMALL, **changes}) for name, mesh in meshes.items()}
        steps = {name: Step(config, jax.devices()[:devices]) for name, config in configs.items()}
        seconds = in_turns(steps, rounds)
        ratios = [one / other for one, other in zip(seconds["baseline"], seconds["lss"], strict=True)]
        rows.append(
            {
                "devices": devices,
                "kernel": kernel,
                "seq_len": LENGTH,
                "baseline_over_lss_seconds": statistics.median(ratios),
                "ratios": sorted(ratios),
                "temporaries": {name: step.temporaries for name, step in steps.items()},
                "seconds": {name: statistics.median(of_one) for name, of_one in seconds.items()},
            }
        )
        print(rows[-1], flush=True)
    return rows


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def compiled_on(devices: int) -> list[Row]:
    """The baseline and LSS, dense and blockwise, LSS also with heads in groups."""
    absent, rows = chips(devices), []
    baseline = BASELINES[devices]
    for changes in KERNELS.values():
        for name, mesh, groups in (
            ("baseline", baseline, 1),
            ("lss", (1, devices, 1), 1),
            ("lss", (1, devices, 1), GROUPS),
        ):
            same = {"data.batch_size": baseline[0], "optim.accumulate": baseline[0] if name == "lss" else 1}
            config = config_of(mesh, TOKENS * devices, {**changes, **same, "attention.head_groups": groups})
            rows.append({"name": name, **compiled(config, absent)})
    return rows


def one_sequence() -> list[Row]:
    """LSS alone on one sequence, so without microbatches; on 128 devices Adam's moments are sharded."""
    rows = []
    for devices in (144, 128):
        for changes in KERNELS.values():
            groups = {"attention.head_groups": GROUPS, "mesh.shard": "optimizer"}
            row = compiled(config_of((1, devices, 1), TOKENS * devices, {**changes, **groups}), chips(devices))
            rows.append({"name": "lss", **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each program (default: 5)")
    parser.add_argument("--only", choices=("measured", "compiled"), help="run this part, leave the other as it is")
    arguments = parser.parse_args()
    distributed.start_on_cpu(8)
    results = read(NAME)
    if arguments.only != "compiled":
        results["measured"] = [row for devices in (2, 4, 8) for row in measured(devices, arguments.rounds)]
    if arguments.only != "measured":
        results["compiled"] = [row for devices in BASELINES for row in compiled_on(devices)]
        results["one sequence"] = one_sequence()
    write(NAME, results, render, plot)


if __name__ == "__main__":
    main()
