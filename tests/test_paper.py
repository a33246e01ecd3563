"""The experiments behind the paper's tables: their formulas, and that what is written is what was computed."""

import json
from pathlib import Path

import pytest

from experiments.paper import ablation, head_to_head, longest, splits, weak_scaling
from experiments.paper.machines import Machine, communication, step_time
from experiments.paper.programs import HERE, config_of
from lss_jax.inspection.contract import Line, Total, predicted
from lss_jax.inspection.topology import devices_of
from lss_jax.models import build_model
from lss_jax.parallel.mesh import abstract_mesh

TABLES = {module.NAME: module for module in (ablation, head_to_head, longest, splits, weak_scaling)}
MESH = abstract_mesh((2, 4, 1))
SLOW = Machine("slow", peak=1e9, memory_rate=1e6, link_rate=100.0, latency=0.5)


@pytest.mark.parametrize("name", TABLES)
def test_each_table_says_what_its_figures_say(name):
    written = Path(HERE / f"{name}.md").read_text()
    assert TABLES[name].render(json.loads((HERE / f"{name}.json").read_text())) + "\n" == written


def test_a_collective_takes_its_ring_steps_and_its_bytes():
    gather = {
        Line("attention forward", "all-gather", ("seq",)): Total(times=2, elements=200, bytes=800, asynchronous=0)
    }
    assert communication(SLOW, gather, MESH) == pytest.approx(2 * 3 * 0.5 + 3 / 4 * 800 / 100)
    reduce = {Line("gradients", "all-reduce", ("data",)): Total(times=1, elements=100, bytes=400, asynchronous=0)}
    assert communication(SLOW, reduce, MESH) == pytest.approx(2 * 0.5 + 400 / 100)


def test_a_step_is_its_slower_half_and_its_communication():
    model = build_model(config_of((2, 4, 1), 1024))
    time = step_time(SLOW, model, MESH, 5 * 10**9, predicted(model, MESH))
    assert time.compute == 5 and time.total == max(5, time.memory) + time.communication


@pytest.mark.grid
def test_what_is_left_out_changes_no_loss():
    """`timed` compares the losses of all variants with those of the whole algorithm, step by step."""
    devices = devices_of("cpu:8")
    variants = {name: ablation.variant(name, devices) for name in ablation.VARIANTS}
    of = {name: ablation.figures(variant) for name, variant in variants.items()}
    ablation.timed(variants, 1)

    def count(name):
        return sum(line["times"] for line in of[name]["collectives"])

    assert count("keys and values apart") == count("whole") + 2 * ablation.SMALL["model.layers"]
    assert of["all-reduce for reduce-scatter"]["sent"] > of["whole"]["sent"]
    assert of["one flat reduction of gradients"]["sent"] < of["whole"]["sent"]
