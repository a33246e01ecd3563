"""One layer of attention on 8 simulated devices: LSS, ring and Ulysses beside what XLA's partitioner makes of it.

    python -m experiments.attention.run

Forward and backward (`o` and `dq, dk, dv`) of causal attention in float32, B=1, 8 heads of 64, the sequence cut over 8
devices. The baseline is `jax.nn.dot_product_attention(is_causal=True)` under plain `jit` with sharded inputs, where the
partitioner finds the collectives. The variants take turns in one process; a time ratio is the median over the rounds
of the ratio in the same round. The simulated devices share the machine's cores, so a time is that of the work of all
devices together: what an uneven layout costs does not show (experiments/balance has that), nor does a real network.

Memory is what the compiled program asks for on one device, so it is known for programs too large to run as well:
`temporary` beside its arguments and results, and `total` with them. "Arrays that must exist" are `q, k, v, o` and their
gradients and, for LSS, the gathered pair and its gradient. Collectives are read from the compiled program, and must be
those that the strategy predicts (the run stops if not).

Goals: LSS (blockwise, zigzag) takes at most 0.12 of the partitioner's time and 0.08 of its temporary memory at 8k;
temporary memory of LSS is at most 1.3 of the arrays that must exist; a causal mask takes at most 0.55 of the time of a
bidirectional one, and a window of L/16 at most 0.15. `results.md` says of each whether it was met. Takes half an hour
on two cores. Writes `results.json` and `results.md` beside this file, after each table.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.balance.count import all_blocks, computed_blocks
from lss_jax.attention.mask import Intervals, bidirectional, causal, window
from lss_jax.attention.setting import Setting
from lss_jax.attention.strategies import STRATEGIES, make_attend
from lss_jax.attention.traffic import Sizes
from lss_jax.inspection.hlo import collectives
from lss_jax.parallel.layout import Layout
from lss_jax.parallel.mesh import SEQ, make_mesh
from lss_jax.runtime import distributed

DEVICES = 8
B, H, K = 1, 8, 64
ITEMSIZE = 4  # float32
MB = 1e6
LENGTHS = (2048, 4096, 8192, 16384, 32768)
BLOCK_QUERIES, BLOCK_KEYS = 512, 256
# What holds `l x L` scores is not run on longer sequences: at 8k the partitioner's program takes 1.3 GB on each of 8
# devices, at 16k it would be four times that, and the machine has 24 GiB.
LONGEST_DENSE = 8192
AREA_LENGTHS = (8192, 16384)
TUNING_LENGTH = 8192
BLOCK_SIZES = (128, 256, 512, 1024)
WINDOWS = 16  # in a sequence
GOAL_TIME, GOAL_MEMORY, GOAL_LENGTH = 0.12, 0.08, 8192
GOAL_ARRAYS = 1.3
GOAL_AREA = {"bidirectional": 1.0, "causal": 0.55, "window": 0.15}
HERE = Path(__file__).parent


class Variant(NamedTuple):
    """A way to compute attention; `strategy` is one of `STRATEGIES`, or the partitioner's."""

    strategy: str
    layout: str = "contiguous"
    kernel: str = "blockwise"
    groups: int = 1
    regather: bool = False

    @property
    def name(self) -> str:
        if self == PARTITIONER:
            return self.strategy
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.strategy}, {self.kernel}, {self.layout}{groups}"

    @property
    def longest(self) -> int:
        return LONGEST_DENSE if self.kernel == "dense" else max(LENGTHS)


PARTITIONER = Variant("partitioner", kernel="dense")
LSS_ZIGZAG = Variant("lss", "zigzag")
VARIANTS = (
    PARTITIONER,
    Variant("lss", kernel="dense"),
    Variant("lss"),
    LSS_ZIGZAG,
    Variant("lss", "zigzag", groups=2),
    Variant("ring"),
    Variant("ring", "zigzag"),
    Variant("ulysses"),
    Variant("ulysses", "zigzag"),
)


class Program:
    """Forward and backward of one layer, compiled: from `q, k, v, do` to `o, dq, dk, dv`."""

    def __init__(self, attention: Callable[..., jax.Array], length: int, mesh: Mesh):
        def forward_and_backward(q_BLHK, k_BLHK, v_BLHK, do_BLHK):
            o_BLHK, vjp = jax.vjp(attention, q_BLHK, k_BLHK, v_BLHK)
            return o_BLHK, *vjp(do_BLHK)

        self.inputs = inputs(length, mesh)
        sharding = self.inputs[0].sharding
        self.compiled = jax.jit(forward_and_backward, out_shardings=sharding).lower(*self.inputs).compile()
        memory = self.compiled.memory_analysis()
        assert memory is not None
        self.temporary = memory.temp_size_in_bytes
        self.total = self.temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes

    def seconds(self) -> float:
        started = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.inputs))
        return time.perf_counter() - started

    def traffic(self) -> Counter:
        return traffic_of(self.compiled)


def inputs(length: int, mesh: Mesh) -> list[jax.Array]:
    """`q, k, v, do`, `[B, L, H, K]`, cut over the mesh."""
    sharding = NamedSharding(mesh, P(None, SEQ))
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.device_put(jax.random.normal(key, (B, length, H, K)), sharding) for key in keys]


def traffic_of(compiled: jax.stages.Compiled) -> Counter:
    """How often a collective runs, by its kind and the bytes of its result on one device."""
    found: Counter = Counter()
    for one in collectives(compiled.as_text() or ""):
        found[one.kind, one.bytes] += one.times
    return found


def attention_of(
    variant: Variant,
    length: int,
    mesh: Mesh,
    mask: Callable[[jax.Array], Intervals] = causal,
    blocks: tuple[int, int] = (BLOCK_QUERIES, BLOCK_KEYS),
) -> Callable[..., jax.Array]:
    """Attention over whole arrays in layout order, cut over the mesh."""
    if variant == PARTITIONER:
        return partial(jax.nn.dot_product_attention, is_causal=True)
    position_L = Layout(variant.layout, DEVICES).positions(length)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(None, SEQ),) * 3 + (P(SEQ),), out_specs=P(None, SEQ))
    def attention(q_BlHK, k_BlHK, v_BlHK, position_l):
        attend = make_attend(variant.strategy, mask(position_l), setting_of(variant, blocks))
        return attend(q_BlHK, k_BlHK, v_BlHK)

    return lambda q_BLHK, k_BLHK, v_BLHK: attention(q_BLHK, k_BLHK, v_BLHK, position_L)


def setting_of(variant: Variant, blocks: tuple[int, int]) -> Setting:
    return Setting(
        SEQ, Layout(variant.layout, DEVICES), variant.kernel, *blocks, variant.groups, variant.regather, interpret=True
    )


def predicted(variant: Variant, length: int) -> Counter:
    """The collectives of one layer as `Program.traffic` counts them."""
    sizes = Sizes(B=B, l=length // DEVICES, H=H, G=H, K=K, itemsize=ITEMSIZE)
    setting = setting_of(variant, (BLOCK_QUERIES, BLOCK_KEYS))
    layer = STRATEGIES[variant.strategy].traffic(sizes, setting)
    expected: Counter = Counter()
    for one in layer["forward"] + layer["backward"]:
        expected[one.kind, one.bytes] += one.times
    if STRATEGIES[variant.strategy].whole_mask:
        expected["all-gather", 2 * length * 4] += 1  # the intervals of all queries, int32, once per step
    return expected


def must_exist(variant: Variant, length: int) -> int:
    """Bytes on one device of `q, k, v, o` and their gradients, and of the gathered pair and its gradient."""
    segments = 8 * length // DEVICES
    gathered = 4 * length if variant.strategy == "lss" else 0
    return (segments + gathered) * B * H * K * ITEMSIZE


def take_turns(programs: Mapping[Any, Any], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each program in each round; a round before them warms up."""
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            took = program.seconds()
            if turn:
                seconds[name].append(took)
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median over the rounds of the ratio in the same round."""
    return statistics.median(one / other for one, other in zip(seconds, base, strict=True))


# The first table: the variants, side by side.


def compare(length: int, rounds: int, mesh: Mesh) -> list[dict]:
    programs = {variant: Program(attention_of(variant, length, mesh), length, mesh) for variant in VARIANTS}
    for variant, program in programs.items():
        if variant != PARTITIONER:
            found, expected = program.traffic(), predicted(variant, length)
            assert found == expected, f"{variant.name} at {length}: {found} in the program, predicted {expected}"
    fitting = {variant: program for variant, program in programs.items() if length <= variant.longest}
    seconds = take_turns(fitting, rounds)
    rows = []
    for variant, program in programs.items():
        took = seconds.get(variant)
        base = seconds.get(PARTITIONER)
        rows.append(
            {
                "length": length,
                "variant": variant.name,
                "seconds": took and statistics.median(took),
                "over_partitioner": took and base and ratio(took, base),
                "over_lss_zigzag": took and ratio(took, seconds[LSS_ZIGZAG]),
                "temporary_bytes": program.temporary,
                "temporary_over_partitioner": program.temporary / programs[PARTITIONER].temporary,
                "temporary_over_must_exist": program.temporary / must_exist(variant, length),
                "total_over_must_exist": program.total / must_exist(variant, length),
                "collectives": [
                    {"kind": kind, "bytes": size, "times": times} for (kind, size), times in program.traffic().items()
                ],
                "as_predicted": None if variant == PARTITIONER else True,  # or the run had stopped
            }
        )
    return rows


def compare_table(rows: list[dict]) -> str:
    lines = [
        "| L | variant | time / partitioner | time / LSS zigzag | s | temporary MB | / partitioner | / must exist "
        "| total / must exist | collectives (times x MB of the result) | predicted |",
        "| --- " * 11 + "|",
    ]
    for row in rows:
        cells = [
            f"{row['length']:,}",
            row["variant"],
            number(row["over_partitioner"]),
            number(row["over_lss_zigzag"], 2),
            number(row["seconds"], 2),
            number(row["temporary_bytes"] / MB, 1),
            number(row["temporary_over_partitioner"]),
            number(row["temporary_over_must_exist"], 2),
            number(row["total_over_must_exist"], 2),
            ", ".join(f"{one['times']} {one['kind']} x {one['bytes'] / MB:.4g}" for one in row["collectives"]),
            "equal" if row["as_predicted"] else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# The second: time against the area of the mask.


def area(length: int, rounds: int, mesh: Mesh) -> list[dict]:
    masks: dict[str, Callable[[jax.Array], Intervals]] = {
        "bidirectional": partial(bidirectional, length=length),
        "causal": causal,
        "window": lambda position_l: causal(position_l) & window(position_l, length // WINDOWS),
    }
    variant = LSS_ZIGZAG
    layout = Layout(variant.layout, DEVICES)
    programs = {name: Program(attention_of(variant, length, mesh, mask), length, mesh) for name, mask in masks.items()}
    seconds = take_turns(programs, rounds)
    everything = all_blocks(layout, length, BLOCK_QUERIES, BLOCK_KEYS)
    return [
        {
            "length": length,
            "mask": name,
            "seconds": statistics.median(seconds[name]),
            "over_bidirectional": ratio(seconds[name], seconds["bidirectional"]),
            "blocks": int(computed_blocks(mask, layout, length, BLOCK_QUERIES, BLOCK_KEYS).sum()) / everything,
            "goal": GOAL_AREA[name],
        }
        for name, mask in masks.items()
    ]


def area_table(rows: list[dict]) -> str:
    lines = [
        "| L | mask | s | time / bidirectional | key blocks computed / all | goal for the time |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        figures = f"{row['seconds']:.2f} | {row['over_bidirectional']:.3f} | {row['blocks']:.3f} | {row['goal']}"
        lines.append(f"| {row['length']:,} | {row['mask']} | {figures} |")
    return "\n".join(lines)


# The third: sizes of blocks.


def tune(length: int, rounds: int, mesh: Mesh) -> list[dict]:
    """LSS zigzag with blocks of every size; one longer than a chunk of the layout is the chunk, so it is left out."""
    chunk = length // DEVICES // Layout(LSS_ZIGZAG.layout, DEVICES).chunks_per_device
    sizes = [size for size in BLOCK_SIZES if size <= chunk]
    default = (min(BLOCK_QUERIES, chunk), min(BLOCK_KEYS, chunk))
    programs = {
        blocks: Program(attention_of(LSS_ZIGZAG, length, mesh, blocks=blocks), length, mesh)
        for blocks in dict.fromkeys([default, *((queries, keys) for queries in sizes for keys in sizes)])
    }
    seconds = take_turns(programs, rounds)
    return [
        {
            "length": length,
            "queries": blocks[0],
            "keys": blocks[1],
            "over_default": ratio(seconds[blocks], seconds[default]),
            "temporary_bytes": program.temporary,
        }
        for blocks, program in sorted(programs.items())
    ]


def tune_table(rows: list[dict]) -> str:
    sizes = sorted({row["keys"] for row in rows})
    cells = {
        (row["queries"], row["keys"]): f"{row['over_default']:.2f} ({row['temporary_bytes'] / MB:.1f} MB)"
        for row in rows
    }
    lines = [
        f"| queries in a block | {' | '.join(f'{size} keys' for size in sizes)} |",
        "| --- " * (len(sizes) + 1) + "|",
    ]
    for queries in sorted({row["queries"] for row in rows}):
        lines.append(f"| {queries} | {' | '.join(cells.get((queries, size), '-') for size in sizes)} |")
    return "\n".join(lines)


# The fourth: keep the gathered pair, or gather it again on the way back.


def regather(length: int, rounds: int, mesh: Mesh) -> list[dict]:
    variants = {"gathered pair kept": LSS_ZIGZAG, "gathered again": LSS_ZIGZAG._replace(regather=True)}
    programs = {name: Halves(attention_of(variant, length, mesh), length, mesh) for name, variant in variants.items()}
    seconds = take_turns(programs, rounds)
    rows = []
    for name, program in programs.items():
        found, expected = program.traffic(), predicted(variants[name], length)
        assert found == expected, f"{name}: {found} in the program, predicted {expected}"
        rows.append(
            {
                "length": length,
                "variant": name,
                "seconds": statistics.median(seconds[name]),
                "over_kept": ratio(seconds[name], seconds["gathered pair kept"]),
                "saved_bytes": program.saved_bytes(),
                "all_gathers": sum(times for (kind, _), times in found.items() if kind == "all-gather"),
            }
        )
    return rows


class Halves:
    """Forward and backward of one layer as two programs, as the loops over layers of a whole model have them."""

    def __init__(self, attention: Callable[..., jax.Array], length: int, mesh: Mesh):
        *self.qkv, self.do_BLHK = inputs(length, mesh)
        forward = jax.jit(lambda q_BLHK, k_BLHK, v_BLHK: jax.vjp(attention, q_BLHK, k_BLHK, v_BLHK))
        self.forward = forward.lower(*self.qkv).compile()
        _, self.saved = self.forward(*self.qkv)  # a function, and the arrays that it needs
        self.backward = jax.jit(lambda saved, do_BLHK: saved(do_BLHK)).lower(self.saved, self.do_BLHK).compile()

    def seconds(self) -> float:
        started = time.perf_counter()
        o_BLHK, saved = self.forward(*self.qkv)
        jax.block_until_ready((o_BLHK, self.backward(saved, self.do_BLHK)))
        return time.perf_counter() - started

    def traffic(self) -> Counter:
        return traffic_of(self.forward) + traffic_of(self.backward)

    def saved_bytes(self) -> int:
        """What the forward pass leaves to the backward pass on one device, `q, k, v` where they are needed included."""
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(self.saved))


def regather_table(rows: list[dict]) -> str:
    length = rows[0]["length"]
    lse = length // DEVICES * B * H * ITEMSIZE / MB
    segment, pair = lse * K, lse * K * 2 * DEVICES
    lines = [
        "| L | LSS zigzag, one layer | time / kept | s | saved for the way back, MB | all-gathers |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        figures = (
            f"{row['over_kept']:.3f} | {row['seconds']:.2f} | {row['saved_bytes'] / MB:.2f} | {row['all_gathers']}"
        )
        lines.append(f"| {length:,} | {row['variant']} | {figures} |")
    lines += [
        "",
        f"By arithmetic: `q` and `o` ({segment:.2f} MB each), the log-sum-exp ({lse:.2f}), and the gathered pair "
        f"({pair:.2f}) or the own `k` and `v` ({segment:.2f} each): {2 * segment + lse + pair:.2f} MB kept, "
        f"{4 * segment + lse:.2f} MB gathered again, beside the intervals and positions of the queries.",
    ]
    return "\n".join(lines)


def verdicts(results: dict[str, list[dict]]) -> str:
    """Of every goal that these results speak of, whether it was met."""
    lines = []

    def judge(what: str, value: float, goal: float) -> None:
        lines.append(f"- {what}: {value:.3f}, goal at most {goal}: {'met' if value <= goal else 'NOT met'}")

    for row in results["variants"]:
        if (row["length"], row["variant"]) == (GOAL_LENGTH, LSS_ZIGZAG.name):
            judge(f"time over the partitioner's at {GOAL_LENGTH:,}", row["over_partitioner"], GOAL_TIME)
            memory = row["temporary_over_partitioner"]
            judge(f"temporary memory over the partitioner's at {GOAL_LENGTH:,}", memory, GOAL_MEMORY)
    blockwise = [row for row in results["variants"] if row["variant"].startswith("lss, blockwise")]
    for length in sorted({row["length"] for row in blockwise}):
        here = [row for row in blockwise if row["length"] == length]
        for kind in ("temporary", "total"):
            value = max(row[f"{kind}_over_must_exist"] for row in here)
            judge(
                f"{kind} memory of blockwise LSS (the worst) over arrays that must exist at {length:,}",
                value,
                GOAL_ARRAYS,
            )
    for row in results["area"]:
        if row["mask"] != "bidirectional":
            judge(
                f"time of {row['mask']} over bidirectional at {row['length']:,}", row["over_bidirectional"], row["goal"]
            )
    return "\n".join(lines)


TABLES = {
    "variants": ("Variants, causal, forward and backward", compare_table),
    "area": (f"Time against the area of the mask (LSS, blockwise, zigzag; window of L/{WINDOWS})", area_table),
    "blocks": (
        f"Sizes of blocks: time over that of {BLOCK_QUERIES} queries and {BLOCK_KEYS} keys (LSS, zigzag), and "
        "temporary memory",
        tune_table,
    ),
    "regather": ("Gathering again on the way back", regather_table),
}


def write(results: dict[str, list[dict]]) -> None:
    sections = [f"## {title}\n\n{table(results[key])}\n" for key, (title, table) in TABLES.items() if results[key]]
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "results.md").write_text("\n".join([*sections, f"## Goals\n\n{verdicts(results)}\n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="L of the first table")
    parser.add_argument("--area-lengths", type=int, nargs="*", default=AREA_LENGTHS, help="L of the second table")
    parser.add_argument("--tuning-length", type=int, default=TUNING_LENGTH, help="L of the third and fourth table")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help=f"timed repetitions of each program (default: 3; above {GOAL_LENGTH:,} tokens always 1)",
    )
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES), help="keep the others as they are")
    arguments = parser.parse_args()
    distributed.start()
    mesh = make_mesh((1, DEVICES, 1), jax.devices()[:DEVICES])
    results = json.loads((HERE / "results.json").read_text()) if (HERE / "results.json").exists() else {}
    results |= {key: [] for key in TABLES if key in arguments.tables or key not in results}
    tasks = [("variants", compare, length) for length in arguments.lengths]
    tasks += [("area", area, length) for length in arguments.area_lengths]
    tasks += [("blocks", tune, arguments.tuning_length), ("regather", regather, arguments.tuning_length)]
    tasks = [task for task in tasks if task[0] in arguments.tables]
    for key, measure, length in tasks:
        rows = measure(length, arguments.rounds if length <= GOAL_LENGTH else 1, mesh)
        results[key] += rows
        print(TABLES[key][1](rows), end="\n\n", flush=True)
        write(results)
    print(verdicts(results))


if __name__ == "__main__":
    main()
