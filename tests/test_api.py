"""What `import lss_jax` offers, and what a notebook does with it: train, interrupt, look, go on."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import lss_jax
from lss_jax.config.schema import ConfigError
from lss_jax.runtime.interrupt import held_back
from lss_jax.storage.metrics import read_records

ROOT = Path(__file__).parents[1]
TEXT = bytes(np.random.default_rng(0).choice(list(b"abcdefgh     \n"), 6000))
DEVICES = jax.devices()[:4]
SMALL = {
    "data.source": "text",
    "data.seq_len": 48,
    "data.batch_size": 4,
    "model.layers": 1,
    "model.width": 32,
    "optim.steps": 24,
    "log_every": 1,
    "eval_every": 0,
    "optim.warmup_steps": 2,
    "mesh.data": 1,
    "mesh.seq": 4,
    "eval_batches": 1,
}


def python(program, *options):
    done = subprocess.run([sys.executable, *options, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    return lss_jax.load_config(ROOT / "configs/default.py", {**SMALL, "data.path": str(tmp_path / "text")})


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal: a process that a shell puts into the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_importing_it_imports_nothing_else():
    program = "import sys, lss_jax; print(*(n for n in sys.modules if n.split('.')[0] in ('lss_jax', 'jax', 'numpy')))"
    assert python(program) == "lss_jax"


def test_a_name_is_the_function_whatever_was_imported_before():
    for name, home in lss_jax.HOMES.items():
        value = getattr(lss_jax, name)
        assert callable(value) and value.__module__ == f"lss_jax.{home}", name
        assert value is getattr(sys.modules[f"lss_jax.{home}"], name)
    assert sorted(lss_jax.HOMES) == lss_jax.__all__
    assert set(lss_jax.__all__) <= set(dir(lss_jax))
    from lss_jax import attention, cli

    assert attention.__name__ == "lss_jax.attention" and cli.__name__ == "lss_jax.cli"
    with pytest.raises(AttributeError, match="no attribute 'evaluation'"):
        _ = lss_jax.evaluation


def test_a_command_line_of_the_same_name_starts_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "lss_jax.evaluate", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert "--workdir" in done.stdout


def test_a_config_is_found_from_anywhere(tmp_path):
    program = (
        "import os, sys; sys.path.insert(0, os.getcwd()); import lss_jax; del sys.path[0]\n"
        f"os.chdir({str(tmp_path)!r})\n"
        f"print(lss_jax.load_config({str(ROOT / 'configs/default.py')!r}, {{'model.width': 64}}).model.mlp_width)"
    )
    assert python(program) == "256"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.witdh": 3}, "did you mean 'model.width'"),
        ({"model": 3}, "is a group of keys"),
        ({"model.width": "3"}, "model.width='3' is of type str; give a value of type int"),
        ({"attention.layout": "star"}, "attention.layout='star' is not known; choose one of 'contiguous', 'zigzag'"),
    ],
)
def test_overrides_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=message):
        lss_jax.load_config(ROOT / "configs/default.py", overrides)
    with pytest.raises(ConfigError) as error:
        lss_jax.load_config(ROOT / "configs/default.py", {"no.such": 1, "seed": "x"})
    assert len(str(error.value).split("\n")) == 2


def test_a_run_in_a_folder_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        lss_jax.load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        lss_jax.evaluate_run(tmp_path)


def test_a_notebook_trains_is_interrupted_looks_and_goes_on(config, tmp_path, ctrl_c):
    whole = lss_jax.Trainer(config, tmp_path / "whole", DEVICES)
    assert len(list(whole.fit())) == 24 + 1
    whole.close()

    trainer, reached = lss_jax.Trainer(config, str(tmp_path / "parts"), DEVICES), []
    trainer.compile()
    while trainer.step < 24:
        timer = threading.Timer(0.01 + 0.013 * len(reached), signal.raise_signal, (signal.SIGINT,))
        try:
            timer.start()
            for _ in trainer.fit():
                pass
            timer.cancel()
            timer.join()
        except KeyboardInterrupt:
            reached.append(trainer.step)
            assert int(trainer.state.step) == trainer.step, "one can look at it"
    assert len(reached) > 2, "it was interrupted"
    trainer.close()
    jax.tree.map(np.testing.assert_array_equal, trainer.state, whole.state)
    curves = [
        [
            (record["step"], record["split"], record["loss"])
            for record in read_records(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "parts")
    ]
    assert curves[0] == curves[1]
    found = lss_jax.evaluate_run(tmp_path / "parts", batches=1, devices=DEVICES)
    assert found["step"] == 24 and found["loss"] == pytest.approx(curves[0][-1][2], rel=1e-6)


def test_ctrl_c_waits_for_the_end_of_the_block_and_a_second_one_does_not(ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        done.append("first")
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("second")
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    thread = threading.Thread(target=lambda: held_back().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_audit_reads_as_its_table():
    config = lss_jax.load_config(ROOT / "configs/default.py", {**SMALL, "data.source": "stdlib"})
    result = lss_jax.audit_step(config, "cpu:4")
    assert str(result) == repr(result)
    assert "4 cpu, mesh data=1 x seq=4 x model=1" in str(result) and str(result).endswith("all as predicted")
    with pytest.raises(ConfigError, match=r"mesh.seq=4, mesh.model=1 needs 4 devices, but 8 are found"):
        lss_jax.audit_step(config)
    with pytest.raises(ConfigError, match="topology 'moon:8' is unknown"):
        lss_jax.audit_step(config, "moon:8")
