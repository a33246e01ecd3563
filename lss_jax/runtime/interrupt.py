"""Ctrl-C in a notebook's cell or at a prompt, where something must be done whole or not at all."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[None]:
    """Has Ctrl-C wait for the end of the block, where `KeyboardInterrupt` is raised; a second one comes at once.

    Without it, a step that has been given the state (a donated buffer) could be left before it gives the next one back.
    Whatever handles the signal otherwise handles it here, only later. Signals come to the main thread alone, so
    elsewhere there is nothing to do.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            before(number, frame)
        held.append(frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(signal.SIGINT, held[0])
