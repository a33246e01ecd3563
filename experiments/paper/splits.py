"""Table 5: the best mesh, data x sequence x model, for 64, 256 and 3,456 devices.

    python -m experiments.paper.splits

For a model of 20M and one of 1.5B parameters, at 8k, 50k and 1M tokens. A step has at most four million tokens, since a
larger batch trains no better (GPT-3 had 3.2 million, Brown et al. 2020, arXiv 2005.14165, Table 2.1): where these are
fewer sequences than devices, only sharding the sequence or the heads lets more devices help. A data group takes its
sequences in as few microbatches as fit in memory.

All of it is *modelled*: memory by the planner's model, an upper bound, against the 95 GiB of a TPU v5p; seconds by
`machines.py` from the predicted operations and collectives (which `lss_jax.audit` compares with compiled programs). The
best split has the fewest device seconds per token; the table also has the best split of each kind.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from experiments.paper.machines import V5P, algorithmic_operations, step_time
from experiments.paper.programs import Mesh, Row, config_of, table, write
from lss_jax.config.schema import ConfigError, MeshConfig
from lss_jax.inspection.contract import predicted, sent
from lss_jax.inspection.memory import memory_of
from lss_jax.inspection.planner import at_length, meshes
from lss_jax.inspection.topology import CAPACITY
from lss_jax.models import Model, build_model, parameter_count
from lss_jax.parallel.mesh import abstract_mesh
from lss_jax.training.setup import validate

NAME = "splits"
DEVICES = (64, 256, 3456)
LENGTHS = (8192, 50_112, 2**20)
BATCH = 2**22  # tokens per step
MEMORY = CAPACITY["TPU v5"] * 2**30
MODELS: dict[str, Row] = {
    "20M": {},
    "1.5B": {"model.layers": 30, "model.width": 2048, "model.heads": 16},
}
COMMON: Row = {"attention.regather": True, "attention.layout": "zigzag", "mesh.shard": "optimizer"}


def splits(model: Model, devices: int) -> Iterator[Row]:
    """Each mesh that the rules and the memory allow, with its modelled seconds."""
    for sizes in meshes(devices):
        for microbatches in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            row = tried(model, sizes, microbatches)
            if row is None:  # breaks a rule, or has more microbatches than sequences
                break
            if row["memory"] <= MEMORY:
                yield row
                break


def tried(model: Model, sizes: Mesh, microbatches: int) -> Row | None:
    """A split with this many microbatches; None where that breaks a rule."""
    length = model.config.data.seq_len
    each = BATCH // length // sizes[0]  # sequences per data group
    if each < microbatches:
        return None
    batch = each // microbatches * microbatches * sizes[0]
    config = dataclasses.replace(
        model.config,
        mesh=MeshConfig(*sizes, model.config.mesh.shard),
        data=dataclasses.replace(model.config.data, batch_size=batch),
        optim=dataclasses.replace(model.config.optim, accumulate=microbatches),
    )
    try:
        validate(config, sizes[0] * sizes[1] * sizes[2])
    except ConfigError:
        return None
    mesh = abstract_mesh(sizes)
    model = build_model(config, mesh)
    collectives = predicted(model, mesh)
    work = algorithmic_operations(model, mesh, scores=0.5)
    time = step_time(V5P, model, mesh, work, collectives)
    return {
        "mesh": sizes,
        "sequences": batch,
        "microbatches": microbatches,
        "memory": memory_of(model, mesh).total,
        "sent": sent(collectives, mesh),
        "operations": work,
        "seconds": time.total,
        "communication": time.communication / time.total,
        "microseconds_per_token": time.total * mesh.size / (batch * length) * 1e6,  # of one device
    }


def measure(name: str, devices: int, length: int, model: Model) -> Row:
    """The best split, and the best of each kind."""
    rows = sorted(
        splits(build_model(at_length(model.config, length)), devices), key=lambda row: row["microseconds_per_token"]
    )

    def best(kind: Any) -> Row | None:
        return next((row for row in rows if kind(row["mesh"])), None)

    return {
        "model": name,
        "devices": devices,
        "length": length,
        "possible": len(rows),
        "best": best(lambda mesh: True),
        "data alone": best(lambda mesh: mesh[1] == mesh[2] == 1),
        "data and sequence": best(lambda mesh: mesh[1] > 1 and mesh[2] == 1),
        "data and model": best(lambda mesh: mesh[1] == 1 and mesh[2] > 1),
        "all": rows,
    }


KINDS = ("data alone", "data and sequence", "data and model")


def render(results: list[Row]) -> str:
    """The table."""
    head = (
        "model | devices | tokens | best, data x seq x model | sequences in microbatches | GiB | step, s "
        f"| communication | device us per token | {' | '.join(f'{kind}, over best' for kind in KINDS)}"
    )
    body = []
    for row in results:
        best = row["best"]
        if best is None:
            body.append((row["model"], f"{row['devices']:,}", f"{row['length']:,}", "nothing fits", *[""] * 8))
            continue
        body.append(
            (
                row["model"],
                f"{row['devices']:,}",
                f"{row['length']:,}",
                _mesh(best),
                f"{best['sequences']} in {best['microbatches']}",
                f"{best['memory'] / 2**30:.1f}",
                f"{best['seconds']:.3f}",
                f"{best['communication']:.0%}",
                f"{best['microseconds_per_token']:.3f}",
                *(_over(row[kind], best) for kind in KINDS),
            )
        )
    return "\n".join(
        [
            "# Sequence x data x model",
            "",
            "Command: `python -m experiments.paper.splits`",
            "",
            "Modelled for TPU v5p (95 GiB each), at most 4,194,304 tokens per step:",
            "",
            table(head, body),
        ]
    )


def _mesh(row: Row) -> str:
    return " x ".join(map(str, row["mesh"]))


def _over(row: Row | None, best: Row) -> str:
    if row is None:
        return "not possible"
    return f"{row['microseconds_per_token'] / best['microseconds_per_token']:.2f} ({_mesh(row)})"


def plot(results: list[Row]) -> Figure:
    """Seconds per token over the size of a sequence group, for each model and length on 256 devices."""
    figure = Figure(figsize=(9, 3.8))
    for axes, name in zip(figure.subplots(1, 2), MODELS, strict=True):
        for row in results:
            if (row["model"], row["devices"]) != (name, 256):
                continue
            for parts, style in ((1, "o-"), (8, "s--")):
                own = sorted((one["mesh"][1], one) for one in row["all"] if one["mesh"][2] == parts)
                times = [one["microseconds_per_token"] for _, one in own]
                label = f"{row['length']:,} tokens, model = {parts}"
                axes.plot([seq for seq, _ in own], times, style, label=label)
        axes.set(xscale="log", yscale="log", xlabel="seq", ylabel="device us per token", title=f"{name}, 256 devices")
        axes.legend(fontsize=6)
    figure.tight_layout()
    return figure


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = []
    for name, changes in MODELS.items():
        model = build_model(config_of((1, 1, 1), LENGTHS[0], {**COMMON, **changes}))
        print(f"{name}: {parameter_count(model):,} parameters", flush=True)
        for devices in DEVICES:
            results += [measure(name, devices, length, model) for length in LENGTHS]
    write(NAME, results, render, plot)


if __name__ == "__main__":
    main()
