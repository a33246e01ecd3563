"""The planner's memory model against the compiler: a training step's bytes per device, predicted and compiled.

    python -m experiments.planner.run
    python -m experiments.planner.run --topology tpu:v5p:2x2x2

By default a grid (every strategy with its ways to keep keys and values, with and without remat, on meshes of all three
axes; variants of the config; dense attention; state that outweighs activations), and two sets drawn at random, of other
sizes, on 1 to 32 devices. With a topology a few configs for its compiler. An error is predicted over compiled bytes,
minus 1, of state, batch and temporaries together, which is what must fit. The claim to test: never below 0, and never
above 10%. Some 150 programs, half an hour on two cores; nothing is run. Writes `results.json` and `results.md` beside
this file (`results_KIND` with a topology).
"""

import argparse
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from configs import base
from lss_jax.config.schema import Config, ConfigError, from_dict
from lss_jax.inspection.memory import memory_of
from lss_jax.inspection.topology import devices_of
from lss_jax.models import build_model
from lss_jax.parallel.mesh import AXES, make_mesh
from lss_jax.training.setup import validate
from lss_jax.training.step import trace_train_step

HERE = Path(__file__).parent
Case = dict[str, Any]  # changes to configs/base.py
Sizes = tuple[int, int, int]

MODELS: dict[str, Case] = {
    "wide": {"model.layers": 4, "model.width": 1024, "model.heads": 16},
    "deep": {"model.layers": 24, "model.width": 256, "model.heads": 8},
    "enwik8": {"model.layers": 6, "model.width": 512, "model.heads": 8},
    "gqa": {"model.layers": 8, "model.width": 768, "model.heads": 16, "model.kv_heads": 8},
}
SEGMENTS = {"wide": (2048, 2), "deep": (2048, 1), "enwik8": (4096, 2), "gqa": (3072, 1)}  # tokens and rows of a device
WAYS: dict[str, Case] = {
    "lss": {"attention.strategy": "lss"},
    "regather": {"attention.strategy": "lss", "attention.regather": True},
    "ring": {"attention.strategy": "ring"},
    "ulysses": {"attention.strategy": "ulysses"},
}
MESHES = ((1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (1, 2, 4))
VARIANTS: tuple[Case, ...] = (
    {"model__dtype": "bfloat16"},
    {"attention__layout": "contiguous"},
    {"model__vocab": 32768},
    {"model__vocab": 32768, "model__tied_head": False, "model__positions": "rope"},
    {"optim__accumulate": 2},
    {"optim__shard_state": True},
    {"model__dropout": 0.1},
    {"data__separator": "a"},
    {"attention__window": 256},
    {"attention__gather_groups": 2},
    {"model__layers": 48, "model__dtype": "bfloat16"},
    {"model__mlp_width": 512},
)


def case(mesh: Sizes, model: str, way: str, **changes: Any) -> Case:
    """A model on a mesh with its usual segment; `model__remat="block"` changes `model.remat`."""
    length, rows = SEGMENTS[model]
    data, seq, parts = mesh
    return {
        **on(mesh),
        **MODELS[model],
        **WAYS[way],
        "data.seq_len": length * seq * (2 if parts > 2 else 1),
        "data.batch_size": rows * data * changes.get("optim__accumulate", 1),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }


def on(mesh: Sizes) -> Case:
    return {f"mesh.{axis}": size for axis, size in zip(AXES, mesh, strict=True)}


def crossed() -> list[Case]:
    """Every way, remat and mesh; models, dtypes and layouts take turns."""
    cases = []
    for number, (way, remat, mesh) in enumerate(itertools.product(WAYS, ("block", "none"), MESHES)):
        dtype, layout = ("float32", "bfloat16")[number // 2 % 2], ("zigzag", "contiguous")[number // 3 % 2]
        model = list(MODELS)[number % len(MODELS)]
        cases.append(case(mesh, model, way, model__remat=remat, model__dtype=dtype, attention__layout=layout))
    return cases


def variants() -> list[Case]:
    """Of one config, each on a mesh without and with a model axis; dense kernels; uncut sequences; few tokens."""
    both = ((1, 8, 1), (2, 2, 2))
    block = {"model__remat": "block"}
    cases = [case(mesh, "enwik8", "regather", **block, **change) for change in VARIANTS for mesh in both]
    shares = {"model__vocab": 32768, "model__vocab_parallel": True}
    cases.append(case((2, 2, 2), "enwik8", "regather", **block, **shares))
    for remat, mesh in itertools.product(("block", "none"), (*both, (8, 1, 1))):
        dense = case(mesh, "enwik8", "lss", model__remat=remat, attention__kernel="dense")
        cases.append({**dense, "data.seq_len": 1024 * mesh[1]})
    kinds = (("wide", "float32"), ("deep", "bfloat16"))
    for (model, dtype), mesh, remat in itertools.product(kinds, ((8, 1, 1), (1, 1, 8), (2, 1, 4)), ("block", "none")):
        changes = {"model__remat": remat, "model__dtype": dtype, "model__kv_heads": 8}
        cases.append(case(mesh, model, "lss", **changes))
    for length, way in itertools.product((64, 256), WAYS):
        cases.append({**case((1, 8, 1), "wide", way, **block), "data.seq_len": 8 * length})
    return cases


def drawn(seed: int, count: int) -> list[Case]:
    """At random, the same ones every time; without those that cannot be."""
    meshes = [(1, 16, 1), (1, 32, 1), (2, 8, 2), (1, 8, 4), (4, 8, 1), (1, 4, 8), (2, 2, 8), (1, 4, 1), (1, 1, 2)]
    meshes += [(1, 2, 1), (1, 1, 1)]
    draw = random.Random(seed)
    return [case for case in (_drawn(draw, meshes) for _ in range(count)) if _possible(case)]


def _possible(case: Case) -> bool:
    try:
        validate(config_of(case), math.prod(sizes_of(case)))
    except ConfigError:
        return False
    return True


def _drawn(draw: random.Random, meshes: list[Sizes]) -> Case:
    mesh = draw.choice(meshes)
    data, seq, parts = mesh
    head_width = draw.choice([64, 128])
    heads = draw.choice([32] if seq * parts > 16 else [16, 32])
    return {
        **on(mesh),
        **WAYS[draw.choice(list(WAYS))],
        "model.heads": heads,
        "model.layers": draw.choice([2, 4, 8, 16]),
        "model.width": heads * head_width if draw.random() < 0.5 else heads * 32,
        "model.kv_heads": draw.choice([heads, heads, heads // 2]),
        "model.vocab": draw.choice([256, 256, 8192]),
        "data.batch_size": data * draw.choice([1, 2]),
        "data.seq_len": seq * parts * draw.choice([256, 512, 2048]),
        "model.remat": draw.choice(["block", "block", "none"]),
        "model.dtype": draw.choice(["bfloat16", "float32"]),
        "model.positions": draw.choice(["learned", "rope"]),
        "attention.layout": draw.choice(["zigzag", "contiguous"]),
    }


def tpu_sample() -> list[Case]:
    """As `configs/enwik8.py` has it, but for what is changed."""

    def changed(mesh: Sizes, way: str = "regather", length: int = 32768, rows: int = 8, **changes: Any) -> Case:
        kept = {"model__remat": "block", "model__dtype": "bfloat16", **changes}
        return {**case(mesh, "enwik8", way, **kept), "data.seq_len": length, "data.batch_size": rows}

    return [
        changed((1, 8, 1)),
        changed((1, 8, 1), length=65536),
        changed((1, 8, 1), model__layers=12),
        changed((1, 8, 1), "ulysses"),
        changed((1, 8, 1), "lss", model__remat="none"),
        changed((2, 2, 2)),
        changed((1, 8, 1), "ring"),
        changed((1, 1, 8), "lss"),
        changed((1, 8, 1), model__dtype="float32"),
        changed((1, 4, 2), length=16384, attention__layout="contiguous"),
    ]


def sizes_of(case: Case) -> Sizes:
    data, seq, model = (case[f"mesh.{axis}"] for axis in AXES)
    return data, seq, model


def config_of(case: Case) -> Config:
    values = base.get_config()
    values.update_from_flattened_dict(case)
    return from_dict(values)


GRID = [*crossed(), *variants()]
SETS = {"grid": GRID, "drawn": drawn(seed=7, count=40), "drawn again": drawn(seed=8, count=25)}
Bytes = dict[str, int]


def compiled(config: Config, mesh: Mesh) -> Bytes:
    """What the compiler says."""
    analysis = trace_train_step(build_model(config), mesh).lower().compile().memory_analysis()
    assert analysis is not None
    return {"state and batch": analysis.argument_size_in_bytes, "temporaries": analysis.temp_size_in_bytes}


def predicted(config: Config) -> Bytes:
    """What the model says, without devices."""
    sizes = config.mesh.data, config.mesh.seq, config.mesh.model
    *arguments, temporaries = memory_of(build_model(config), AbstractMesh(sizes, AXES))
    return {"state and batch": sum(arguments), "temporaries": temporaries}


def error(result: dict) -> float:
    return sum(result["predicted"].values()) / sum(result["compiled"].values()) - 1


def table(results: list[dict]) -> str:
    """A row for each case, with what it changes, after the range of errors of each set."""
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
    parser.add_argument("--topology", default="cpu:32", help="for which devices (default: %(default)s)")
    parser.add_argument("--set", choices=SETS, help="one set of programs alone (default: all of them)")
    arguments = parser.parse_args()
    devices, kind = devices_of(arguments.topology), arguments.topology.partition(":")[0]
    sets = SETS if kind == "cpu" else {arguments.topology: tpu_sample()}
    if arguments.set:
        sets = {arguments.set: SETS[arguments.set]}
    results = []
    for name, case in ((name, case) for name, cases in sets.items() for case in cases):
        config, sizes = config_of(case), sizes_of(case)
        mesh = make_mesh(sizes, devices[: math.prod(sizes)])
        results.append({"set": name, "case": case, "compiled": compiled(config, mesh), "predicted": predicted(config)})
        print(f"{error(results[-1]):+.1%}  {case}", flush=True)
        jax.clear_caches()
    written = HERE / ("results" if kind == "cpu" else f"results_{kind}")
    written.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    written.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
