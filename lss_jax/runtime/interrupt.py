"""Ctrl-C in a notebook's cell or at a prompt, delayed while a block must run as a whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block, where `KeyboardInterrupt` is raised; a second one is raised at once.

    Without it, a step that has taken the state (a donated buffer) could be interrupted before it returns the next one.
    A signal handler of the user's is delayed in the same way. Signals reach the main thread alone, so in other threads
    there is nothing to do.
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
