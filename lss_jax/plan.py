"""Plan a run before there are devices for it: `python -m lss_jax.plan --config F --devices N --memory 16GiB`."""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from lss_jax import cli
from lss_jax.config.schema import Config, ConfigError
from lss_jax.config.units import parse_size, shown_size
from lss_jax.inspection.memory import shortfall
from lss_jax.inspection.plan_table import by_rule, json_of, line_of, table_of
from lss_jax.inspection.planner import Candidate, Room, chosen, compiled_memory, plan, steps
from lss_jax.inspection.topology import FORMS, cpu_devices_of, devices_of
from lss_jax.parallel.mesh import AXES
from lss_jax.runtime import distributed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.plan",
        description="For each mesh of N devices and each strategy, the longest sequence that fits, and what it sends.",
        epilog=f"{cli.OVERRIDES} No device is needed, and nothing is compiled unless you say so.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="for example configs/enwik8.py")
    parser.add_argument("--devices", required=True, type=int, metavar="N", help="the number of devices in the mesh")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="per device, for example 16GiB")
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="per device, for what waits there: also chooses what makes room (sharded weights, tiles, recomputation, "
        "groups of heads, offload of inputs and state), and says what each of them buys",
    )
    parser.add_argument("--json", metavar="OUT", help="also write the whole plan to this file")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="cpu",
        metavar="TOPOLOGY",
        help=f"check the recommendation with the compiler, for simulated devices or a topology: {FORMS}",
    )
    arguments, config = cli.parse(parser, cli.config_of_file)
    memory = parse_size(arguments.memory)
    room = Room(memory, parse_size(arguments.host_memory, "--host-memory") if arguments.host_memory else None)
    if arguments.devices < 1:
        raise ConfigError(f"--devices={arguments.devices} must be at least 1; say how many devices share the work")
    topology = f"cpu:{arguments.devices}" if arguments.compile == "cpu" else arguments.compile
    distributed.start_on_cpu(cpu_devices_of(topology or "cpu:1"))
    devices = devices_of(topology) if topology else []
    if topology and len(devices) != arguments.devices:
        raise ConfigError(
            f"--compile={topology} has {len(devices)} devices and --devices={arguments.devices}; give the same number"
        )
    candidates, impossible = plan(config, arguments.devices, room)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(json_of(candidates, impossible), indent=2) + "\n")
    if not candidates:
        raise ConfigError(f"no mesh of --devices={arguments.devices} is possible: {'; '.join(by_rule(impossible))}")
    print(table_of(candidates, impossible, config, memory))
    if room.host is not None:
        bought = map(line_of, steps(config, candidates[0], room))
        print("\n".join(["", "what makes room there, one after the other:", *bought]))
    overrides = [argument for argument in sys.argv[1:] if argument.startswith("--config.")]
    print(f"\n  {train_command(arguments.config, overrides, chosen(config, candidates[0]), candidates[0])}")
    return check(config, candidates[0], devices, topology, memory) if topology else 0


def train_command(path: str, overrides: list[str], config: Config, best: Candidate) -> str:
    """The command that trains this config: its file, the user's overrides, and after them the planner's."""
    ours = {f"mesh.{axis}": size for axis, size in zip(AXES, dataclasses.astuple(config.mesh)[:3], strict=True)}
    ours |= {f"attention.{key}": getattr(config.attention, key) for key in ("strategy", "head_groups", "regather")}
    ours |= {**best.changes, "data.seq_len": config.data.seq_len}
    settings = [f"--config.{key}={value}" for key, value in ours.items()]
    return shlex.join(["python", "-m", "lss_jax.train", "--config", path, *overrides, *settings])


def check(config: Config, best: Candidate, devices: Sequence[jax.Device], topology: str, memory: int) -> int:
    """Compiles the recommended step and prints what it needs; returns 1 if it does not fit into `memory` bytes.

    Raises:
      ConfigError: something is to wait in host memory, and simulated devices have none.
    """
    if best.longest.memory.host and topology.startswith("cpu"):
        raise ConfigError(
            f"--compile={topology} cannot check the recommendation, part of which waits in host memory; give a "
            f"topology of accelerators, such as --compile=tpu:v5p:2x2x2"
        )
    print(f"\ncompiling for {topology} ...", flush=True)
    try:
        compiled = compiled_memory(config, best, devices)
    except jax.errors.JaxRuntimeError as error:
        print(f"does not fit: {shortfall(error)}")
        return 1
    expected, verdict = best.longest.memory.total, "fits" if compiled <= memory else "does not fit"
    print(
        f"{verdict}: compiled {shown_size(compiled)}, predicted {shown_size(expected)} "
        f"({expected / compiled - 1:+.1%}), there are {shown_size(memory)}"
    )
    return int(compiled > memory)


if __name__ == "__main__":
    cli.run(main)
