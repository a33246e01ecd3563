"""SIGKILL and SIGTERM at any moment lose nothing that was committed, and change no bit of what comes out."""

import random
import signal
import sys
import time

import jax
import numpy as np
import pytest
from processes import command, finish, losses, read_until, saved, start, write_text

STEPS, EVERY, DEVICES = 60, 3, 4
MOMENTS = ["in a step", "in a save", "after a save"]


def wait_for_save(folder, started: bool) -> None:
    """Returns when a checkpoint is being written, or has been since."""
    finished = {path.name for path in folder.glob("*")}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        names = {path.name for path in folder.glob("*")} - finished
        if any(name.isdigit() for name in names) or (started and any("tmp" in name for name in names)):
            return
        time.sleep(0.001)
    raise AssertionError("no checkpoint was begun in a minute")


@pytest.mark.faults
def test_killed_at_twenty_moments_a_run_ends_bit_equal(tmp_path):
    text = write_text(tmp_path)
    whole, parts = (
        command(tmp_path / name, text, optim__steps=STEPS, checkpoint_every=EVERY) for name in ("whole", "parts")
    )
    process = start(whole, DEVICES)
    _, err = finish(process)
    assert process.returncode == 0, err
    dice, kills, begun = random.Random(0), 0, []
    while kills < 20:
        process = start(parts, DEVICES)
        begun.append(read_until(process, "workdir"))
        if len(losses(tmp_path / "parts")) > STEPS - 2 * EVERY:
            break
        read_until(process, "step ")
        moment = MOMENTS[kills % 3]
        if moment != "in a step":
            wait_for_save(tmp_path / "parts" / "checkpoints", started=moment == "in a save")
        time.sleep(dice.uniform(0.0, 0.02))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kills += 1
    process.kill()
    process.communicate()
    assert kills >= 20, begun
    last = start(parts, DEVICES)
    _, err = finish(last)
    assert last.returncode == 0, err
    assert "warning" not in err, "a killed save is no damage"
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path / "parts", STEPS), saved(tmp_path / "whole", STEPS))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole"), "each step once, with the same loss"


@pytest.mark.faults
def test_terminated_again_and_again_no_step_is_lost_or_done_twice(tmp_path):
    text = write_text(tmp_path)
    whole, parts = (
        command(tmp_path / name, text, optim__steps=40, checkpoint_every=1000) for name in ("whole", "parts")
    )
    process = start(whole, DEVICES)
    finish(process)
    dice, step = random.Random(1), 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process = start(parts, DEVICES)
        told = read_until(process, "workdir")
        assert f"going on after step {step}" in told or step == 0
        for _ in range(dice.randrange(1, 5)):
            read_until(process, "step ")
        process.send_signal(number)
        out, err = finish(process)
        assert process.returncode == 128 + number, err
        step = int(out.split("stopped after step ")[1].split(",")[0])
        assert [s for s, _ in losses(tmp_path / "parts")] == list(range(1, step + 1))
    last = start(parts, DEVICES)
    _, err = finish(last)
    assert last.returncode == 0, err
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path / "parts", 40), saved(tmp_path / "whole", 40))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_second_interrupt_ends_the_process_at_once():
    """Though the main thread is in a long step: it waits in compiled code, where no Python handler runs."""
    code = """
import time
import jax
import numpy as np
from lss_jax.runtime.peers import Alone
from lss_jax.train import stopping_on_signals

def long_step(x):
    print("step ", flush=True)
    time.sleep(600)
    return x

with stopping_on_signals(Alone()):
    shape = jax.ShapeDtypeStruct((), np.float32)
    step = jax.jit(lambda x: jax.pure_callback(long_step, shape, x))
    jax.block_until_ready(step(np.float32(1)))
"""
    process = start([sys.executable, "-c", code], 1)
    read_until(process, "step ")
    process.send_signal(signal.SIGINT)
    read_until(process, "finishing the step")
    process.send_signal(signal.SIGINT)
    finish(process, timeout=30)
    assert process.returncode == 128 + signal.SIGINT
