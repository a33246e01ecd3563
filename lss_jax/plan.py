"""Plan a run before there are devices for it: `python -m lss_jax.plan --config F --devices N --memory 16GiB`."""

import argparse
import dataclasses
import json
import math
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import AbstractMesh, Mesh

from lss_jax import cli
from lss_jax.attention import STRATEGIES
from lss_jax.attention.setting import layout_on
from lss_jax.cli import parse_size, shown_size
from lss_jax.config import Config, ConfigError, MeshConfig, from_dict
from lss_jax.contract import Contract, predicted
from lss_jax.memory import Memory, memory_of, shortfall
from lss_jax.mesh import AXES, SEQ, make_mesh, named_axes
from lss_jax.models import Model, build_model
from lss_jax.rules import MeshSizes, validate
from lss_jax.step import trace_train_step
from lss_jax.topology import FORMS, devices_of

TILE = 128  # lengths are multiples of so many tokens, and of what the mesh cuts them into
LONGEST = 2**31 - 1  # positions are int32
CLOSE = 0.05  # lengths that differ by less are as good as one another, and traffic decides
SHOWN = 20  # rows of the table

# What a device sends in ring algorithms, over the bytes of the result, in a group of n (Thakur et al. 2005, Sec. 4).
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "collective-permute": lambda n: 1,
    "scalars": lambda n: 2 * (n - 1) / n,
}


class Cost(NamedTuple):
    """Of a training step at one length, on one device, in bytes."""

    seq_len: int
    memory: Memory
    sent: float


class Cut(NamedTuple):
    """A mesh with a strategy, and what it can do."""

    sizes: MeshSizes
    strategy: str
    own: Cost  # at the config's length, whether it fits or not
    longest: Cost


class Impossible(NamedTuple):
    """A mesh with a strategy that a rule or the memory forbids."""

    sizes: MeshSizes
    strategy: str
    reason: str


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


def plan(config: Config, devices: int, memory: int) -> tuple[list[Cut], list[Impossible]]:
    """All cuts, the best first, and what is impossible.

    Raises:
      ConfigError: the config is wrong on any mesh.
    """
    validate(dataclasses.replace(config, mesh=MeshConfig(1, 1, 1)), 1)
    model = build_model(config)
    cuts, impossible = [], []
    for sizes in meshes(devices):
        for strategy in STRATEGIES if sizes[1] > 1 else [config.attention.strategy]:  # uncut they are the same
            try:
                cuts.append(evaluate(model, sizes, strategy, memory))
            except ConfigError as error:
                impossible.append(Impossible(sizes, strategy, str(error).split("\n")[0].split(";")[0]))
    return ranked(cuts), impossible


def meshes(devices: int) -> Iterator[MeshSizes]:
    """All sizes (data, seq, model) with this product."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data in divisors:
        yield from ((data, seq, devices // data // seq) for seq in divisors if devices // data % seq == 0)


def evaluate(model: Model, sizes: MeshSizes, strategy: str, memory: int) -> Cut:
    """What a cut costs, at the config's length and at the longest that fits.

    Raises:
      ConfigError: it breaks a rule of the config, or not even the shortest sequence fits.
    """
    config, mesh = on_cut(model.config, sizes, strategy), AbstractMesh(sizes, AXES)
    validate(config, math.prod(sizes))

    def at(seq_len: int) -> Model:
        return at_length(dataclasses.replace(model, config=config), seq_len)

    def fits(seq_len: int) -> bool:
        return memory_of(at(seq_len), mesh).total <= memory

    def cost(seq_len: int) -> Cost:
        return Cost(seq_len, memory_of(at(seq_len), mesh), sent(predicted(at(seq_len), mesh), mesh))

    step = math.lcm(layout_on(config, mesh).padded(1), TILE)
    tiles = largest(lambda count: fits(count * step), LONGEST // step)
    if not tiles:
        needed = shown_size(memory_of(at(step), mesh).total)
        raise ConfigError(f"{step:,} tokens need {needed}, more than --memory={shown_size(memory)}; use more devices")
    longest = tiles * step
    validate(at(longest).config, math.prod(sizes))
    return Cut(sizes, strategy, cost(config.data.seq_len), cost(longest))


def on_cut(config: Config, sizes: MeshSizes, strategy: str) -> Config:
    """The config on a mesh with a strategy; without what is for another one."""
    attention = dataclasses.replace(config.attention, strategy=cast(Any, strategy))
    if strategy != "lss":
        attention = dataclasses.replace(attention, gather_groups=1, regather=False)
    return dataclasses.replace(config, mesh=MeshConfig(*sizes), attention=attention)


def at_length(model: Model, seq_len: int) -> Model:
    """The same model for sequences of another length."""

    def with_rows(leaf: jax.ShapeDtypeStruct, spec: jax.sharding.PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((seq_len, *leaf.shape[1:]), leaf.dtype) if SEQ in named_axes(spec) else leaf

    config = dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, seq_len=seq_len))
    return dataclasses.replace(model, config=config, shapes=jax.tree.map(with_rows, model.shapes, model.specs))


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which `holds` is true, if it is so for all smaller ones; 0 if for none."""
    high = 1
    while high <= limit and holds(high):
        high *= 2
    low, high = high // 2, min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def sent(collectives: Contract, mesh: Mesh | AbstractMesh) -> float:
    """Bytes that a device sends for these collectives, by ring algorithms."""
    return sum(
        SENT[line.kind](math.prod(mesh.shape[axis] for axis in line.axes)) * total.bytes
        for line, total in collectives.items()
    )


def ranked(cuts: list[Cut]) -> list[Cut]:
    """Of those that come close to the longest sequence the one that sends least per token first; the rest by length."""
    longest = max((cut.longest.seq_len for cut in cuts), default=0)

    def order(cut: Cut) -> tuple[bool, float]:
        length, _, moved = cut.longest
        close = length >= (1 - CLOSE) * longest
        return not close, moved / length if close else -length

    return sorted(cuts, key=order)


def report(cuts: list[Cut], impossible: list[Impossible], config: Config, memory: int) -> str:
    """The table, what is not possible, and what to do."""
    own, best = config.data.seq_len, cuts[0]
    head = ("data x seq x model", "attention", "longest", "sent per step", f"at {own:,}: memory", "sent per step")
    rows = [head] + [_row(cut, memory) for cut in cuts[:SHOWN]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(cuts) > SHOWN:
        lines.append(f"... and {len(cuts) - SHOWN} more (--json has all)")
    lines += ["", "Per device: memory by the model of lss_jax/memory.py; bytes sent by ring algorithms."]
    if impossible:
        lines += ["", "not possible:", *(f"  {line}" for line in grouped(impossible))]
    close = sum(cut.longest.seq_len >= (1 - CLOSE) * max(c.longest.seq_len for c in cuts) for cut in cuts)
    among = (
        f"of the {close} within {CLOSE:.0%} of the longest, it sends least per token" if close > 1 else "the longest"
    )
    lines += ["", f"recommended: {_mesh(best.sizes)}, {best.strategy}, {best.longest.seq_len:,} tokens: {among}."]
    return "\n".join(lines)


def _row(cut: Cut, memory: int) -> tuple[str, ...]:
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


def chosen(config: Config, cut: Cut) -> Config:
    """The config of a cut at its longest."""
    config = on_cut(config, cut.sizes, cut.strategy)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=cut.longest.seq_len))


def train_command(path: str, overrides: list[str], config: Config) -> str:
    """What trains this config; `overrides` are those that were given, of which ours have the last word."""
    ours = {f"mesh.{axis}": size for axis, size in zip(AXES, dataclasses.astuple(config.mesh), strict=True)}
    ours |= {f"attention.{key}": getattr(config.attention, key) for key in ("strategy", "gather_groups", "regather")}
    ours |= {"data.seq_len": config.data.seq_len}
    settings = [f"--config.{key}={value}" for key, value in ours.items()]
    return shlex.join(["python", "-m", "lss_jax.train", "--config", path, *overrides, *settings])


def check(config: Config, cut: Cut, devices: Sequence[jax.Device], topology: str, memory: int) -> int:
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


def as_json(cuts: list[Cut], impossible: list[Impossible]) -> dict[str, Any]:
    """All rows, sizes in bytes."""

    def cost(one: Cost) -> dict[str, Any]:
        return {**one._asdict(), "memory": {**one.memory._asdict(), "total": one.memory.total}}

    return {
        "cuts": [{**cut._asdict(), "own": cost(cut.own), "longest": cost(cut.longest)} for cut in cuts],
        "impossible": [one._asdict() for one in impossible],
    }


if __name__ == "__main__":
    cli.run(main)
