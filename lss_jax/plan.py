"""Plan a run before there are devices for it: `python -m lss_jax.plan --config F --devices N --memory 16GiB`."""

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lss_jax import cli
from lss_jax.config.schema import Config, ConfigError, from_dict
from lss_jax.config.units import parse_size, shown_size
from lss_jax.inspection.memory import shortfall
from lss_jax.inspection.planner import CLOSE, Candidate, Cost, Impossible, chosen, plan
from lss_jax.inspection.topology import FORMS, devices_of
from lss_jax.models import build_model
from lss_jax.parallel.mesh import AXES, make_mesh
from lss_jax.training.step import trace_train_step

SHOWN = 20  # rows of the table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.plan",
        description="For each way to cut N devices, the longest sequence that fits their memory, and what it moves.",
        epilog=f"{cli.OVERRIDES} No device is needed, and nothing is compiled unless you say so.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="for example configs/enwik8.py")
    parser.add_argument("--devices", required=True, type=int, metavar="N", help="how many there are to share the work")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="of each device, for example 16GiB")
    parser.add_argument("--json", metavar="OUT", help="write all rows to this file as well")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="cpu",
        metavar="TOPOLOGY",
        help=f"check the recommended row with the compiler, for simulated devices or a topology: {FORMS}",
    )
    arguments, values = cli.parse(parser, lambda arguments: cli.load_config_file(arguments.config))
    config, memory = from_dict(values), parse_size(arguments.memory)
    if arguments.devices < 1:
        raise ConfigError(f"--devices={arguments.devices} must be at least 1; say how many devices share the work")
    topology = f"cpu:{arguments.devices}" if arguments.compile == "cpu" else arguments.compile
    devices = devices_of(topology or "cpu:1")  # before JAX looks for others
    if topology and len(devices) != arguments.devices:
        raise ConfigError(
            f"--compile={topology} has {len(devices)} devices and --devices={arguments.devices}; give the same number"
        )
    cuts, impossible = plan(config, arguments.devices, memory)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(as_json(cuts, impossible), indent=2) + "\n")
    if not cuts:
        raise ConfigError(f"no way to cut --devices={arguments.devices}: {'; '.join(grouped(impossible))}")
    print(report(cuts, impossible, config, memory))
    overrides = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    print(f"\n  {train_command(arguments.config, overrides, chosen(config, cuts[0]))}")
    return check(chosen(config, cuts[0]), cuts[0], devices, topology, memory) if topology else 0


def report(cuts: list[Candidate], impossible: list[Impossible], config: Config, memory: int) -> str:
    """The table, what is not possible, and what to do."""
    own, best = config.data.seq_len, cuts[0]
    head = ("data x seq x model", "attention", "longest", "sent per step", f"at {own:,}: memory", "sent per step")
    rows = [head] + [_row(cut, memory) for cut in cuts[:SHOWN]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(cuts) > SHOWN:
        lines.append(f"... and {len(cuts) - SHOWN} more (--json has all)")
    lines += ["", "Per device: memory by the model of lss_jax/inspection/memory.py; bytes sent by ring algorithms."]
    if impossible:
        lines += ["", "not possible:", *(f"  {line}" for line in grouped(impossible))]
    close = sum(cut.longest.seq_len >= (1 - CLOSE) * max(c.longest.seq_len for c in cuts) for cut in cuts)
    among = (
        f"of the {close} within {CLOSE:.0%} of the longest, it sends least per token" if close > 1 else "the longest"
    )
    lines += ["", f"recommended: {_mesh(best.sizes)}, {best.strategy}, {best.longest.seq_len:,} tokens: {among}."]
    return "\n".join(lines)


def _row(cut: Candidate, memory: int) -> tuple[str, ...]:
    own = shown_size(cut.own.memory.total) + (" (too much)" if cut.own.memory.total > memory else "")
    return (
        _mesh(cut.sizes),
        cut.strategy,
        f"{cut.longest.seq_len:,}",
        shown_size(cut.longest.sent),
        own,
        shown_size(cut.own.sent),
    )


def _mesh(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def grouped(impossible: list[Impossible]) -> list[str]:
    """A line for each rule, without the sizes of the mesh, and two of the cuts that it forbids."""
    by_rule = defaultdict(list)
    for sizes, strategy, reason in impossible:
        by_rule[re.sub(r"(mesh\.\w+)=\d+", r"\1", reason)].append(f"{_mesh(sizes)} {strategy}")
    return [
        f"{rule}: {', '.join(cuts[:2])}{f' and {len(cuts) - 2} more' if len(cuts) > 2 else ''}"
        for rule, cuts in by_rule.items()
    ]


def train_command(path: str, overrides: list[str], config: Config) -> str:
    """What trains this config; `overrides` are those that were given, of which ours have the last word."""
    ours = {f"mesh.{axis}": size for axis, size in zip(AXES, dataclasses.astuple(config.mesh), strict=True)}
    ours |= {f"attention.{key}": getattr(config.attention, key) for key in ("strategy", "gather_groups", "regather")}
    ours |= {"data.seq_len": config.data.seq_len}
    settings = [f"--config.{key}={value}" for key, value in ours.items()]
    return shlex.join(["python", "-m", "lss_jax.train", "--config", path, *overrides, *settings])


def check(config: Config, cut: Candidate, devices: Sequence[jax.Device], topology: str, memory: int) -> int:
    """Compiles the step of this config and says what it needs; 1 if that is more than there is."""
    print(f"\ncompiling for {topology} ...", flush=True)
    try:
        program = trace_train_step(build_model(config), make_mesh(cut.sizes, devices)).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        print(f"does not fit: {shortfall(error)}")
        return 1
    analysis = program.memory_analysis()
    assert analysis is not None, "CPU and TPU compilers give one"
    compiled, expected = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes, cut.longest.memory.total
    verdict = "fits" if compiled <= memory else "does not fit"
    print(
        f"{verdict}: compiled {shown_size(compiled)}, predicted {shown_size(expected)} "
        f"({expected / compiled - 1:+.1%}), there are {shown_size(memory)}"
    )
    return int(compiled > memory)


def as_json(cuts: list[Candidate], impossible: list[Impossible]) -> dict[str, Any]:
    """All rows, sizes in bytes."""

    def cost(one: Cost) -> dict[str, Any]:
        return {**one._asdict(), "memory": {**one.memory._asdict(), "total": one.memory.total}}

    return {
        "cuts": [{**cut._asdict(), "own": cost(cut.own), "longest": cost(cut.longest)} for cut in cuts],
        "impossible": [one._asdict() for one in impossible],
    }


if __name__ == "__main__":
    cli.run(main)
