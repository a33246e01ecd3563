"""The planner's command line, and what it says of meshes that nobody has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import small_config

from lss_jax.config.schema import ConfigError
from lss_jax.config.units import parse_size
from lss_jax.inspection import planner
from lss_jax.inspection.planner import Room, largest, plan, steps
from lss_jax.models import build_model, parameter_count

ROOT = Path(__file__).parents[1]


def run_plan(*arguments):
    command = [sys.executable, "-m", "lss_jax.plan", "--config", "configs/enwik8.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("room", [4, 5, 11, 64, 1000, 12345, 10**7])
def test_the_largest_that_fits(room):
    """Straight pieces that get steeper: found to half a percent, in a few steps."""
    asked = []

    def needs(number):
        asked.append(number)
        return 4 + max(number, 3 * number - 500, 7 * number - 20_000)

    exact = max((number for number in range(1, 5000) if needs(number) <= room), default=0)
    asked.clear()
    found = largest(needs, room, limit=4000, first=100)
    assert min(0.995 * exact, exact) <= found <= exact if exact < 4000 else found >= 0.995 * 4000
    assert len(asked) <= 10


def test_what_is_planned_fits(monkeypatch):
    monkeypatch.setattr(planner, "meshes", lambda _: [(1, 8, 1)])
    memory = parse_size("64MiB")
    candidates, impossible = plan(small_config(), 8, Room(memory, None))
    assert candidates and all(candidate.longest.memory.total <= memory for candidate in candidates)
    assert any("ulysses" in one.reason for one in impossible)


@pytest.mark.grid
def test_with_host_memory_it_chooses_what_makes_room(monkeypatch):
    """Each thing buys something, all of it fits both memories, and scarce host memory lets fewer inputs wait."""
    monkeypatch.setattr(planner, "meshes", lambda _: [(1, 8, 1)])
    monkeypatch.setattr(planner, "STRATEGIES", {"lss": planner.STRATEGIES["lss"]})
    llama = {"model__norm": "rms", "model__mlp": "swiglu", "model__positions": "rope", "model__mlp_width": 512}
    config = small_config(**llama, model__layers=4, data__batch_size=1, model__width=128, model__dtype="bfloat16")
    room = Room(parse_size("64MiB"), parse_size("4MiB"))
    (best,), _ = plan(config, 8, room)
    assert best.longest.memory.total <= room.memory and best.longest.memory.host <= room.host
    assert best.changes["model.remat"] == "offload" and best.changes["attention.head_groups"] == 4
    assert best.changes["model.remat_every"] > 1
    bought = [length for _, length in steps(config, best, room)]
    assert bought[-1] == best.longest.seq_len > 2 * bought[0]


@pytest.mark.grid
def test_a_state_that_does_not_fit_goes_to_the_host(monkeypatch):
    """On one device, which has room for a few layers of the weights alone."""
    config = small_config(model__layers=64, model__width=128, model__mlp_width=512, data__batch_size=1)
    room = Room(parse_size("64MiB"), parse_size("4GiB"))
    (best,), _ = plan(config, 1, room)
    assert best.changes["optim.offload"] and best.longest.memory.total <= room.memory
    assert best.longest.memory.host > 12 * parameter_count(build_model(config)) * 0.9
    bought = dict((next(iter(way), ""), length) for way, length in steps(config, best, room))
    assert bought["model.remat"] == 0 < bought["optim.offload"]


@pytest.mark.grid
def test_thousands_of_devices(tmp_path):
    few = [f"--config.{key}=1" for key in ("data.batch_size", "model.heads", "model.kv_heads")]  # meshes are possible
    done = run_plan("--devices", "4096", "--memory", "16GiB", "--json", str(tmp_path / "plan.json"), *few)
    assert done.returncode == 0, done.stderr
    assert "recommended: " in done.stdout and "python -m lss_jax.train" in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["candidates"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "8", "--memory", "16"), "error: --memory=16 is no size; write it like 16GiB"),
        pytest.param(
            ("--devices", "0", "--memory", "16GiB"), "error: --devices=0 must be at least 1", marks=pytest.mark.grid
        ),
        pytest.param(
            ("--devices", "8", "--memory", "1MiB"),
            "error: no mesh of --devices=8 is possible: ",
            marks=pytest.mark.grid,
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    done = run_plan(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("written", ["", "16", "0GiB", "-1GiB", "lots"])
def test_a_size_needs_a_unit(written):
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(written)
