"""The tables and the goals of the attention benchmark, in Markdown, from the rows that `measure.py` gives."""

from typing import NamedTuple

from experiments.attention.measure import WINDOWS
from experiments.attention.variants import BLOCK_KEYS, BLOCK_QUERIES, DEVICES, ITEMSIZE, LSS_ZIGZAG, B, H, K

MB = 1e6
GOAL_TIME, GOAL_MEMORY, GOAL_LENGTH = 0.12, 0.08, 8192
GOAL_ARRAYS = 1.3
Rows = list[dict]


def compare_table(rows: Rows) -> str:
    """The variants: time, memory and collectives."""
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
    """A figure for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def area_table(rows: Rows) -> str:
    """Time against the area of the mask."""
    lines = [
        "| L | mask | s | time / bidirectional | key blocks computed / all | goal for the time |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        figures = f"{row['seconds']:.2f} | {row['over_bidirectional']:.3f} | {row['blocks']:.3f} | {row['goal']}"
        lines.append(f"| {row['length']:,} | {row['mask']} | {figures} |")
    return "\n".join(lines)


def tune_table(rows: Rows) -> str:
    """Time and temporary memory by the size of a block."""
    sizes = sorted({row["keys"] for row in rows})
    cells = {
        (row["queries"], row["keys"]): f"{row['over_default']:.2f} ({row['temporary_bytes'] / MB:.1f} MB)"
        for row in rows
    }
    lines = [
        f"| queries per block | {' | '.join(f'{size} keys' for size in sizes)} |",
        "| --- " * (len(sizes) + 1) + "|",
    ]
    for queries in sorted({row["queries"] for row in rows}):
        lines.append(f"| {queries} | {' | '.join(cells.get((queries, size), '-') for size in sizes)} |")
    return "\n".join(lines)


def regather_table(rows: Rows) -> str:
    """Saving against re-gathering, with the saved bytes by arithmetic below."""
    length = rows[0]["length"]
    lse = length // DEVICES * B * H * ITEMSIZE / MB
    segment, pair = lse * K, lse * K * 2 * DEVICES
    lines = [
        "| L | LSS zigzag, one layer | time / saved | s | residuals, MB | all-gathers |",
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
        f"({pair:.2f}) or the local `k` and `v` ({segment:.2f} each): {2 * segment + lse + pair:.2f} MB saved, "
        f"{4 * segment + lse:.2f} MB re-gathered, beside the intervals and positions of the queries.",
    ]
    return "\n".join(lines)


class Goal(NamedTuple):
    """A measured value and its upper bound."""

    what: str
    value: float
    bound: float

    def __str__(self) -> str:
        verdict = "met" if self.value <= self.bound else "NOT met"
        return f"- {self.what}: {self.value:.3f}, goal at most {self.bound}: {verdict}"


def verdicts(results: dict[str, Rows]) -> str:
    """Whether each goal that these results cover was met."""
    compared = results["variants"]
    return "\n".join(map(str, [*_partitioner_goals(compared), *_array_goals(compared), *_area_goals(results["area"])]))


def _partitioner_goals(rows: Rows) -> list[Goal]:
    at = f"over the partitioner's at {GOAL_LENGTH:,}"
    goals = []
    for row in rows:
        if (row["length"], row["variant"]) == (GOAL_LENGTH, LSS_ZIGZAG.name):
            goals += [
                Goal(f"time {at}", row["over_partitioner"], GOAL_TIME),
                Goal(f"temporary memory {at}", row["temporary_over_partitioner"], GOAL_MEMORY),
            ]
    return goals


def _array_goals(rows: Rows) -> list[Goal]:
    """Memory of the worst blockwise LSS variant at each length."""
    blockwise = [row for row in rows if row["variant"].startswith("lss, blockwise")]
    return [
        Goal(
            f"{kind} memory of blockwise LSS (the worst) over arrays that must exist at {length:,}",
            max(row[f"{kind}_over_must_exist"] for row in blockwise if row["length"] == length),
            GOAL_ARRAYS,
        )
        for length in sorted({row["length"] for row in blockwise})
        for kind in ("temporary", "total")
    ]


def _area_goals(rows: Rows) -> list[Goal]:
    return [
        Goal(f"time of {row['mask']} over bidirectional at {row['length']:,}", row["over_bidirectional"], row["goal"])
        for row in rows
        if row["mask"] != "bidirectional"
    ]


TABLES = {
    "variants": ("Variants, causal, forward and backward pass", compare_table),
    "area": (f"Time against the area of the mask (LSS, blockwise, zigzag; window of L/{WINDOWS})", area_table),
    "blocks": (
        f"Block sizes: time over that of {BLOCK_QUERIES} queries and {BLOCK_KEYS} keys (LSS, zigzag), and "
        "temporary memory",
        tune_table,
    ),
    "regather": ("Re-gathering keys and values in the backward pass", regather_table),
}


def render(results: dict[str, Rows]) -> str:
    """The text of `results.md`."""
    sections = [f"## {title}\n\n{table(results[key])}\n" for key, (title, table) in TABLES.items() if results[key]]
    return "\n".join([*sections, f"## Goals\n\n{verdicts(results)}\n"])
