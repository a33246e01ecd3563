"""The planner's memory model against the compiler: a training step's bytes per device, predicted and compiled.

    python -m experiments.planner.run
    python -m experiments.planner.run --topology tpu:v5p:2x2x2

By default a grid (every strategy, LSS also with re-gathering, with and without remat, on meshes of all three axes;
variants of the config; dense attention; models whose state outweighs their activations), LSS in groups of heads, what
makes room for large models, and two random sets of other sizes, on 1 to 32 devices. With a topology a few configs for
its compiler. An error is predicted over compiled bytes, minus 1, of state, batch and temporaries together, which is
what must fit. The claim to test: never below 0, and never above 10%. Some 180 programs, half an hour on two cores;
nothing is run. Writes `results.json` and `results.md` beside this file (`results_KIND` with a topology).
"""

import argparse
import json
import math
from pathlib import Path

import jax
from jax.sharding import Mesh

from experiments.planner.cases import SETS, config_of, sizes_of, tpu_sample
from lss_jax.config.schema import Config
from lss_jax.inspection.memory import memory_of
from lss_jax.inspection.topology import cpu_devices_of, devices_of
from lss_jax.models import build_model
from lss_jax.parallel.mesh import make_mesh
from lss_jax.runtime import distributed
from lss_jax.training.step import trace_train_step

HERE = Path(__file__).parent
Bytes = dict[str, int]


def compiled(config: Config, mesh: Mesh) -> Bytes:
    """The compiler's bytes per device."""
    analysis = trace_train_step(build_model(config, mesh), mesh).lower().compile().memory_analysis()
    assert analysis is not None
    return {"state and batch": analysis.argument_size_in_bytes, "temporaries": analysis.temp_size_in_bytes}


def predicted(config: Config, mesh: Mesh) -> Bytes:
    """The memory model's bytes per device."""
    memory = memory_of(build_model(config, mesh), mesh)
    return {"state and batch": memory.total - memory.temporaries, "temporaries": memory.temporaries}


def error(result: dict) -> float:
    """Predicted over compiled bytes, minus 1."""
    return sum(result["predicted"].values()) / sum(result["compiled"].values()) - 1


def table(results: list[dict]) -> str:
    """The range of errors of each set, then each case with its changes."""
    lines = []
    for name in dict.fromkeys(result["set"] for result in results):
        errors = [error(result) for result in results if result["set"] == name]
        lines.append(f"- {name}: {len(errors)} cases, predicted over compiled {min(errors):+.1%} to {max(errors):+.1%}")
    lines += ["", "| set | mesh | changes | compiled, MB | predicted, MB | error |", "| --- " * 6 + "|"]
    for result in results:
        case = result["case"]
        mesh = "x".join(map(str, sizes_of(case)))
        changes = ", ".join(f"{key}={value}" for key, value in case.items() if not key.startswith("mesh."))
        one, other = (sum(result[key].values()) / 1e6 for key in ("compiled", "predicted"))
        lines.append(f"| {result['set']} | {mesh} | {changes} | {one:,.1f} | {other:,.1f} | {error(result):+.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="cpu:32", help="the devices to compile for (default: %(default)s)")
    parser.add_argument("--set", choices=SETS, help="one set of programs alone (default: all of them)")
    arguments = parser.parse_args()
    distributed.start_on_cpu(cpu_devices_of(arguments.topology))
    devices, kind = devices_of(arguments.topology), arguments.topology.partition(":")[0]
    sets = SETS if kind == "cpu" else {arguments.topology: tpu_sample()}
    if arguments.set:
        sets = {arguments.set: SETS[arguments.set]}
    results = []
    for name, case in ((name, case) for name, cases in sets.items() for case in cases):
        config, sizes = config_of(case), sizes_of(case)
        mesh = make_mesh(sizes, devices[: math.prod(sizes)])
        results.append(
            {"set": name, "case": case, "compiled": compiled(config, mesh), "predicted": predicted(config, mesh)}
        )
        print(f"{error(results[-1]):+.1%}  {case}", flush=True)
        jax.clear_caches()
    written = HERE / ("results" if kind == "cpu" else f"results_{kind}")
    written.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    written.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
