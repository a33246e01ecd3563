"""Signals that stop a training run between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lss_jax.runtime.peers import Alone, Peers

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is for Slurm: sbatch --signal=USR1@120


@contextmanager
def stopping_on_signals(peers: Alone | Peers) -> Iterator[None]:
    """Ctrl-C, SIGTERM or SIGUSR1 stops the run after the current step; a second Ctrl-C ends the process at once.

    A thread handles them, woken by the interpreter's own C handler: the main thread may be inside a long step, where no
    Python handler runs.
    """
    wakes, woken = os.pipe()
    os.set_blocking(woken, False)
    watch = threading.Thread(target=_watch_signals, args=(wakes, peers), daemon=True)
    watch.start()
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    old = signal.set_wakeup_fd(woken)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(woken)
        watch.join()
        os.close(wakes)


def _watch_signals(wakes: int, peers: Alone | Peers) -> None:
    stopping = False
    while received := os.read(wakes, 1):
        number = received[0]
        if stopping and number == signal.SIGINT:
            os._exit(128 + number)
        if not stopping and number in SIGNALS:
            stopping = True
            os.write(1, b"\nfinishing the step and saving; Ctrl-C (again) to quit at once\n")
            peers.request_stop(number)
