"""One of two processes is killed or stopped: the other ends in time and says why, and the restarted job goes on."""

import re
import signal
import time

import pytest
from processes import SMALL, command, finish, kill_all, losses, read_until, start_many, write_text

SILENT = "process 1 of 2 has not been heard of for"
ABORTED = "the leader task was preempted/died/restarted unexpectedly|process 0 of the run cannot be reached any more"
CASES = [  # who is lost and how, what the other says, its exit code
    (1, signal.SIGKILL, SILENT, {4}),
    (1, signal.SIGSTOP, SILENT, {4}),
    (0, signal.SIGSTOP, "process 0 of the run has not answered for", {4}),
    (0, signal.SIGKILL, ABORTED, {4, -signal.SIGABRT}),  # we and JAX see the closed connection at the same moment
]
SPARE = 5.0  # seconds, for a busy machine


@pytest.mark.faults
def test_the_others_end_in_time_and_the_same_command_goes_on(tmp_path):
    text, reached = write_text(tmp_path), 0
    run = command(tmp_path / "run", text, optim__steps=100_000, checkpoint_every=5)
    for lost, number, message, codes in CASES:
        both = start_many(run, 2, 2)
        told = read_until(both[0], "workdir")
        assert reached == 0 or f"going on after step {reached}" in told
        while int(read_until(both[0], "step ").split()[1].split("/")[0]) < reached + 12:
            pass
        both[lost].send_signal(number)
        started = time.monotonic()
        _, err = finish(both[1 - lost], timeout=60)
        took = time.monotonic() - started
        kill_all(both[lost : lost + 1])
        assert re.search(message, err)
        assert both[1 - lost].returncode in codes, err
        assert took < SMALL["heartbeat_timeout"] + SPARE
        steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
        assert max(steps) > reached
        reached = max(steps)
    last = start_many(command(tmp_path / "run", text, optim__steps=reached + 3), 2, 2)
    for process in last:
        _, err = finish(process)
        assert process.returncode == 0, err
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, reached + 4)), "each step once"
