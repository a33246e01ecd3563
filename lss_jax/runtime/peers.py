"""The other processes of a run: whether they live, and after which step all of them stop.

When a process dies or hangs, the collectives of the others wait for it, and no Python code of theirs goes on: threads
must notice. Each process beats once a second in JAX's key-value store, which process 0 serves; process 0 looks at all
beats. Should process 0 itself be gone, JAX aborts the others at once, with a message of its own.
"""

import os
import threading
import time
from typing import Any, Self

import jax

LOST = 4  # exit code: another process was lost, or failed
BEAT = 1.0  # seconds
PATIENCE = 0.6  # of the heartbeat timeout: the rest is for telling one another
GRACE = 5.0  # seconds in which the processes that fail for the same reason can say it themselves
ENDED = "ended"  # the last beat of a process that has ended in good order
SAID, BEATS, AT = "lss_jax/said/", "lss_jax/beats/", "lss_jax/at/"


class Alone:
    """The only process. `signal` is the one that asks it to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def request_stop(self, signal: int) -> None:
        """Asks all processes to stop after one and the same step."""
        self.signal = signal

    def may_start(self, step: int) -> bool:
        """Whether this step is to be done; every process asks before each, and all get the same answer."""
        return self.signal is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        """Ends the watch; after an error the others are told."""


class Peers(Alone):
    """One of many processes, and the threads that watch the others."""

    def __init__(self, client: Any, process: int, processes: int, timeout: float):
        super().__init__()
        self._client, self._process, self._processes = client, process, processes
        self._limit = timeout * PATIENCE
        self._closed = threading.Event()
        self._lock = threading.Lock()  # of the two below: no step starts while the last one is being agreed on
        self._in_hand = 0
        self._last: int | None = None
        self._heard: dict[str, tuple[str, float]] = {}  # process 0: the beat of each, and since when it is the same
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._beat_on, self._watch_process_0)]
        for thread in self._threads:
            thread.start()

    def request_stop(self, signal: int) -> None:
        self._say("stop", str(signal))

    def may_start(self, step: int) -> bool:
        with self._lock:
            if self._last is not None and step > self._last:
                return False
            self._in_hand = step
            return True

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._closed.wait(self._limit + GRACE)  # another process may be why: let the threads find out
        self._closed.set()
        self._threads[0].join()
        if error is not None:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._say("failed", f"process {self._process} of {self._processes} ended with: {reason}")
        self._end()
        if error is not None and self._process == 0:  # it serves the others, so it goes last
            patience = time.monotonic() + GRACE + 2 * BEAT
            while time.monotonic() < patience and len(self._ended()) < self._processes:
                time.sleep(BEAT / 10)

    def _beat_on(self) -> None:
        beats = 0
        while not self._closed.wait(BEAT):
            beats += 1
            try:
                self._exchange(str(beats))
            except Exception as error:
                leave(f"process 0 of the run cannot be reached any more ({str(error).splitlines()[0]})")
            self._answered = time.monotonic()

    def _watch_process_0(self) -> None:
        while not self._closed.wait(BEAT):
            silent = time.monotonic() - self._answered
            if silent > self._limit:
                leave(f"process 0 of the run has not answered for {silent:.0f} s: it hangs, or its machine is gone")

    def _exchange(self, beat: str) -> None:
        """One beat: shows that this process lives, and hears what the others have to say."""
        self._client.key_value_set(f"{BEATS}{self._process}", beat, allow_overwrite=True)
        if self._process == 0:
            self._look_for_the_lost()
        said = self._listing(SAID)
        if "lost" in said:
            self._leave_in_turn(said["lost"], grace=0.0)
        if "failed" in said:
            self._leave_in_turn(said["failed"], grace=GRACE)
        if "stop" in said and self._last is None:
            self._agree(int(said["stop"]))

    def _leave_in_turn(self, reason: str, grace: float) -> None:
        """Ends this process, unless it ends by itself before that; process 0, which serves the others, goes last."""
        self._answered = float("inf")  # nothing is asked of process 0 from here on
        if not self._closed.wait(grace + (2 * BEAT if self._process == 0 else 0.0)):
            self._end()
            leave(reason)

    def _look_for_the_lost(self) -> None:
        now = time.monotonic()
        for process, beat in self._listing(BEATS).items():
            if self._heard.get(process, ("", 0.0))[0] != beat:
                self._heard[process] = (beat, now)
        for process, (beat, since) in self._heard.items():
            if beat != ENDED and now - since > self._limit:
                lost = f"process {process} of {self._processes} has not been heard of for {now - since:.0f} s"
                self._say("lost", f"{lost}: it was killed, hangs, or its machine is gone")

    def _agree(self, signal: int) -> None:
        """Finds the last step: the latest that any process has in hand.

        They tell it from their threads, so a process may be in the middle of a collective; and none can start another
        step until all have told.
        """
        with self._lock:
            self._client.key_value_set(f"{AT}{self._process}", str(self._in_hand), allow_overwrite=True)
            told, asked = {str(self._process): str(self._in_hand)}, time.monotonic()
            while len(told.keys() | self._ended()) < self._processes and not self._closed.wait(BEAT / 10):
                told |= self._listing(AT)
                if time.monotonic() - asked > self._limit:
                    leave(f"the processes of the run were asked to stop, and only {sorted(told)} answered")
            self._last, self.signal = max(map(int, told.values())), signal

    def _say(self, what: str, text: str) -> None:
        """Says it to all processes, unless somebody has said as much before."""
        try:
            self._client.key_value_set(SAID + what, text)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def _listing(self, folder: str) -> dict[str, str]:
        return {key.removeprefix(folder): value for key, value in self._client.key_value_dir_get(folder)}

    def _end(self) -> None:
        self._client.key_value_set(f"{BEATS}{self._process}", ENDED, allow_overwrite=True)

    def _ended(self) -> set[str]:
        return {process for process, beat in self._listing(BEATS).items() if beat == ENDED}


def leave(reason: str) -> None:
    """Ends this process at once, from any thread, though its main thread may be waiting for a collective."""
    note = f"error: {reason}; start the same command again on all machines: it goes on from the last sound checkpoint\n"
    os.write(2, note.encode())
    os._exit(LOST)
