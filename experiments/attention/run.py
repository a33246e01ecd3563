"""One layer of attention on 8 simulated devices: LSS, ring and Ulysses against XLA's SPMD partitioner.

    python -m experiments.attention.run

Forward and backward pass (`o` and `dq, dk, dv`) of causal attention in float32, B=1, 8 heads of 64, the sequence
sharded over 8 devices. The baseline is `jax.nn.dot_product_attention(is_causal=True)` under plain `jit` with sharded
inputs, where the partitioner chooses the collectives. The variants take turns in one process; a time ratio is the
median over the rounds of the ratio within a round. The simulated devices share the machine's cores, so a time measures
the work of all devices together: neither the cost of an uneven layout (see experiments/balance) nor a real network
shows.

Memory is what the compiled program asks for per device, so it is known for programs too large to run as well:
`temporary` without its arguments and results, `total` with them. "Arrays that must exist" are `q, k, v, o` and their
gradients and, for LSS, the gathered pair and its gradient. Collectives are read from the compiled program, and must be
those that the strategy predicts (the run stops if not).

Goals: LSS (blockwise, zigzag) takes at most 0.12 of the partitioner's time and 0.08 of its temporary memory at 8k;
temporary memory of LSS is at most 1.3 of the arrays that must exist; a causal mask takes at most 0.55 of the time of a
bidirectional one, and a window of L/16 at most 0.15. `results.md` reports for each whether it was met. Takes half an
hour on two cores. Writes `results.json` and `results.md` beside this file, after each table.
"""

import argparse
import json
from pathlib import Path

import jax

from experiments.attention.measure import area, compare, regather, tune
from experiments.attention.report import GOAL_LENGTH, TABLES, render, verdicts
from experiments.attention.variants import DEVICES, LENGTHS
from lss_jax.parallel.mesh import make_mesh
from lss_jax.runtime import distributed

AREA_LENGTHS = (8192, 16384)
TUNING_LENGTH = 8192
HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument(
        "--tables", nargs="*", choices=TABLES, default=list(TABLES), help="measure these, leave the others as they are"
    )
    return parser.parse_args()


def main() -> None:
    given = arguments()
    distributed.start()
    mesh = make_mesh((1, DEVICES, 1), jax.devices()[:DEVICES])
    written = HERE / "results.json"
    results = json.loads(written.read_text()) if written.exists() else {}
    results |= {key: [] for key in TABLES if key in given.tables or key not in results}
    tasks = [("variants", compare, length) for length in given.lengths]
    tasks += [("area", area, length) for length in given.area_lengths]
    tasks += [("blocks", tune, given.tuning_length), ("regather", regather, given.tuning_length)]
    for key, measure, length in tasks:
        if key not in given.tables:
            continue
        rows = measure(length, given.rounds if length <= GOAL_LENGTH else 1, mesh)
        results[key] += rows
        print(TABLES[key][1](rows), end="\n\n", flush=True)
        written.write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "results.md").write_text(render(results))
    print(verdicts(results))


if __name__ == "__main__":
    main()
