"""The longest sequence that fits 80 GiB per device for the shape of Llama 3 8B, compiled for TPU v5p.

    python -m experiments.longest.run             # the ladder on 8 devices, then 32 and 1; about two hours on two cores
    python -m experiments.longest.run --only all  # one rung

A rung is a set of changes to `configs/llama_8b.py`, which has everything on. Its longest sequence is searched with the
compiler: memory is nearly linear in the length, so that two programs give a guess, which is compiled, and corrected
until a length fits and one 5% longer does not, or five programs are compiled: the longest that was seen to fit is
reported, with the shortest that was seen not to. Writes `results.json` and `results.md`
beside this file after every rung.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GIB = 2**30
BUDGET = 80 * GIB
STEP = 16_384  # tokens per device: lengths are multiples of as many tokens as there are devices, times this
CLOSE = 0.05
PROGRAMS = 5
CRASHED = "the compiler ended"

BARE = {"attention.head_groups": 1, "attention.regather": False, "model.remat": "block", "model.tile": 0}
ON_HOST = {"optim.offload": True, "optim.moments_dtype": "bfloat16", "optim.beta2": 0.98}
ONE, EIGHT, MANY = ("tpu:v5p:2x2x1", 1), ("tpu:v5p:2x2x2", 8), ("tpu:v5p:2x4x4", 32)
# name: (what it is, topology, devices, first length per device, changes)
RUNGS: dict[str, tuple[str, str, int, int, dict[str, Any]]] = {
    "plain": ("weights replicated, blocks recomputed", *EIGHT, STEP, {**BARE, "mesh.shard": "none"}),
    "moments": ("+ moments sharded", *EIGHT, STEP, {**BARE, "mesh.shard": "optimizer"}),
    "weights": ("+ weights and gradients sharded", *EIGHT, STEP, BARE),
    "tiles": ("weights, and tiles of 2,048 tokens", *EIGHT, STEP, {**BARE, "model.tile": 2048}),
    "offload": ("weights, and offload of layers' inputs", *EIGHT, STEP, {**BARE, "model.remat": "offload"}),
    "groups": (
        "weights, and 8 groups of heads",
        *EIGHT,
        STEP,
        {**BARE, "attention.head_groups": 8, "attention.regather": True},
    ),
    "no offload": (
        "weights, tiles and groups; blocks but their attention recomputed",
        *EIGHT,
        6 * STEP,
        {"model.remat": "block"},
    ),
    "no offload, inputs": (
        "the same, blocks recomputed from their inputs",
        *EIGHT,
        12 * STEP,
        {"model.remat": "input"},
    ),
    "no offload, every 2nd": (
        "the same, every second layer's input saved",
        *EIGHT,
        16 * STEP,
        {"model.remat": "input", "model.remat_every": 2},
    ),
    "all": ("weights, tiles, groups and offload", *EIGHT, 24 * STEP, {}),
    "all, every 2nd": ("the same, every second layer's input waits", *EIGHT, 40 * STEP, {"model.remat_every": 2}),
    "all, ulysses": (
        "the same with Ulysses, 4 groups",
        *EIGHT,
        36 * STEP,
        {"attention.strategy": "ulysses", "attention.head_groups": 4, "model.remat_every": 2},
    ),
    "all, state on the host": (
        "every second layer's input waits; weights, gradients and moments rest on the host",
        *EIGHT,
        40 * STEP,
        {"model.remat_every": 2, **ON_HOST},
    ),
    "32 devices": ("all, every second layer's input waits", *MANY, 38 * STEP, {"model.remat_every": 2}),
    "one device": (
        "tiles, groups, every fourth layer's input waits; weights, gradients and moments rest on the host",
        *ONE,
        30 * STEP,
        {"model.remat_every": 4, **ON_HOST},
    ),
}


def compiled(topology: str, devices: int, length: int, changes: dict[str, Any]) -> dict[str, Any]:
    """What `compile.py` prints of one program."""
    overrides = [f"--config.{key}={value}" for key, value in {**changes, "data.seq_len": length}.items()]
    program = [sys.executable, "-m", "experiments.longest.compile"]
    command = [*program, "--topology", topology, "--devices", str(devices), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(lines[-1]) if lines else {"too large": f"{CRASHED}: {done.stderr.strip()[-200:]}"}
    print(f"  {length:>12,} {result}", flush=True)
    return {"length": length, **result}


def fits(program: dict[str, Any]) -> bool:
    """Whether a compiled program fits the budget."""
    return "device" in program and program["device"] <= BUDGET


def crashed(program: dict[str, Any]) -> bool:
    """Whether the compiler ended without saying why, as it does at some lengths (524,288 tokens per device)."""
    return program.get("too large", "").startswith(CRASHED)


def search(topology: str, devices: int, first: int, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The programs compiled on the way to the longest length that fits."""
    step, length = STEP * devices, first * devices
    found: list[dict[str, Any]] = []
    while len(found) < PROGRAMS:
        found.append(compiled(topology, devices, length, changes))
        if crashed(found[-1]):
            length += step
            continue
        good = sorted((one for one in found if fits(one)), key=lambda one: one["length"])
        bad = min((one["length"] for one in found if not fits(one) and not crashed(one)), default=None)
        if not good:
            if len(found) > 1 or length == step:
                break
            length = step  # does anything fit?
            continue
        best = good[-1]
        if bad and bad <= best["length"] * (1 + CLOSE) + step:
            break
        guess = 1.25 * best["length"]
        if len(good) > 1:
            slope = (best["device"] - good[-2]["device"]) / (best["length"] - good[-2]["length"])
            guess = min(guess, best["length"] + 0.98 * (BUDGET - best["device"]) / slope) if slope > 0 else guess
        if bad:
            guess = min(guess, (best["length"] + bad) / 2)
        length = max(int(guess) // step * step, best["length"] + step)
    return found


def refusal(program: dict[str, Any]) -> str:
    """Why a program does not fit, in a few words."""
    wanted = re.search(r"temporaries \(([\d.]+)G\)|Used ([\d.]+)G of", program.get("too large", ""))
    if not wanted:
        return program.get("too large", "over the budget")
    return f"{wanted[1]} GiB of temporaries" if wanted[1] else f"{wanted[2]} GiB of temporaries on the host"


def table(results: dict[str, Any]) -> str:
    """The longest length of each rung, with its memory."""
    lines = [
        "| rung | devices | longest | device, GiB | of it state | host, GiB | compiled in, s | does not fit |",
        "| --- " * 8 + "|",
    ]
    for name, rung in results.items():
        good = [one for one in rung["programs"] if fits(one)]
        bad = [one for one in rung["programs"] if not fits(one)]
        refused = min(bad, key=lambda one: one["length"]) if bad else None
        why = f"{refused['length']:,}: {refusal(refused)}" if refused else "not tried"
        start = f"| {name}: {rung['what']} | {rung['devices']} "
        if not good:
            lines.append(f"{start}| does not fit | - | - | - | - | {why} |")
            continue
        best = max(good, key=lambda one: one["length"])
        sizes = " | ".join(f"{best[key] / GIB:.1f}" for key in ("device", "state", "host"))
        lines.append(f"{start}| {best['length']:,} | {sizes} | {best['seconds']:.0f} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RUNGS, nargs="+", help="these rungs alone (default: all)")
    arguments = parser.parse_args()
    written = HERE / "results.json"
    results = json.loads(written.read_text()) if written.exists() else {}
    for name in arguments.only or RUNGS:
        what, topology, devices, first, changes = RUNGS[name]
        print(f"{name}: {what}, {devices} devices", flush=True)
        results[name] = {"what": what, "devices": devices, "programs": search(topology, devices, first, changes)}
        ordered = {name: results[name] for name in RUNGS if name in results}
        written.write_text(json.dumps(ordered, indent=1) + "\n")
        (HERE / "results.md").write_text(table(ordered))


if __name__ == "__main__":
    main()
