"""The other processes of a run: whether they live, and after which step all of them stop.

When a process dies or hangs, the collectives of the others wait for it, and their main threads run no Python code:
other threads must notice. Each process writes a heartbeat once a second to JAX's key-value store, which process 0
serves; process 0 checks all heartbeats. If process 0 itself is gone, JAX aborts the others at once, with a message of
its own.
"""

import os
import threading
import time
from typing import Any, Self

import jax

LOST = 4  # exit code: another process was lost, or failed
BEAT = 1.0  # seconds
PATIENCE = 0.6  # fraction of the heartbeat timeout; the rest is for informing the others
GRACE = 5.0  # seconds for processes that fail for the same reason to report it themselves
ENDED = "ended"  # the last heartbeat of a process that has ended normally
NOTICES, BEATS, AT = "lss_jax/notices/", "lss_jax/beats/", "lss_jax/at/"  # prefixes of keys in the store


class Alone:
    """The only process of a run; `signal` is the number of the signal that asked it to stop, None before that."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def request_stop(self, signal: int) -> None:
        """Asks all processes to stop after the same step."""
        self.signal = signal

    def may_start(self, step: int) -> bool:
        """Whether to run this step; every process asks before each step, and all get the same answer."""
        return self.signal is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        """Stops watching the others; an error is reported to them."""


class Peers(Alone):
    """One of many processes, and the threads that watch the others."""

    def __init__(self, client: Any, process: int, processes: int, timeout: float):
        super().__init__()
        self._client, self._process, self._processes = client, process, processes
        self._limit = timeout * PATIENCE
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards the two below: no step starts while the last one is agreed on
        self._started = 0  # the step that this process is running
        self._last: int | None = None  # the step after which all stop
        self._heard: dict[str, tuple[str, float]] = {}  # in process 0: each heartbeat, and when it last changed
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._beat_on, self._watch_process_0)]
        for thread in self._threads:
            thread.start()

    def request_stop(self, signal: int) -> None:
        self._notify("stop", str(signal))

    def may_start(self, step: int) -> bool:
        with self._lock:
            if self._last is not None and step > self._last:
                return False
            self._started = step
            return True

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._closed.wait(self._limit + GRACE)  # another process may be the cause: let the threads find out
        self._closed.set()
        self._threads[0].join()
        if error is not None:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._notify("failed", f"process {self._process} of {self._processes} ended with: {reason}")
        self._end()
        if error is not None and self._process == 0:  # it serves the others, so it ends last
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
        """Writes one heartbeat and acts on the notices of other processes."""
        self._client.key_value_set(f"{BEATS}{self._process}", beat, allow_overwrite=True)
        if self._process == 0:
            self._check_heartbeats()
        notices = self._listing(NOTICES)
        if "lost" in notices:
            self._leave_in_turn(notices["lost"], grace=0.0)
        if "failed" in notices:
            self._leave_in_turn(notices["failed"], grace=GRACE)
        if "stop" in notices and self._last is None:
            self._agree_on_last_step(int(notices["stop"]))

    def _leave_in_turn(self, reason: str, grace: float) -> None:
        """Ends this process if it has not ended within `grace` seconds; process 0, which serves all, waits longer."""
        self._answered = float("inf")  # process 0 is not called any more
        if not self._closed.wait(grace + (2 * BEAT if self._process == 0 else 0.0)):
            self._end()
            leave(reason)

    def _check_heartbeats(self) -> None:
        """Notifies all processes if one has been silent for too long."""
        now = time.monotonic()
        for process, beat in self._listing(BEATS).items():
            if self._heard.get(process, ("", 0.0))[0] != beat:
                self._heard[process] = (beat, now)
        for process, (beat, since) in self._heard.items():
            if beat != ENDED and now - since > self._limit:
                lost = f"process {process} of {self._processes} has not been heard of for {now - since:.0f} s"
                self._notify("lost", f"{lost}: it was killed, hangs, or its machine is gone")

    def _agree_on_last_step(self, signal: int) -> None:
        """Makes the latest step that any process has started the last one for all.

        The threads exchange step numbers, so a process may be inside a collective; none starts another step until all
        have answered.
        """
        with self._lock:
            self._client.key_value_set(f"{AT}{self._process}", str(self._started), allow_overwrite=True)
            answers, asked = {str(self._process): str(self._started)}, time.monotonic()
            while len(answers.keys() | self._ended()) < self._processes and not self._closed.wait(BEAT / 10):
                answers |= self._listing(AT)
                if time.monotonic() - asked > self._limit:
                    leave(f"the processes of the run were asked to stop, and only {sorted(answers)} answered")
            self._last, self.signal = max(map(int, answers.values())), signal

    def _notify(self, kind: str, text: str) -> None:
        """Sends a notice to all processes; of several of one kind the first counts."""
        try:
            self._client.key_value_set(NOTICES + kind, text)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def _listing(self, prefix: str) -> dict[str, str]:
        return {key.removeprefix(prefix): value for key, value in self._client.key_value_dir_get(prefix)}

    def _end(self) -> None:
        self._client.key_value_set(f"{BEATS}{self._process}", ENDED, allow_overwrite=True)

    def _ended(self) -> set[str]:
        return {process for process, beat in self._listing(BEATS).items() if beat == ENDED}


def leave(reason: str) -> None:
    """Ends this process at once, from any thread, even if its main thread waits in a collective."""
    note = f"error: {reason}; start the same command again on all machines: it goes on from the last sound checkpoint\n"
    os.write(2, note.encode())
    os._exit(LOST)
