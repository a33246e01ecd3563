"""The metrics of a run: `metrics.jsonl`, TensorBoard event files, and lines on the console."""

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from lss_jax.config.schema import ConfigError

Record = dict[str, Any]

OF_TRAINING = {"learning_rate", "grad_norm", "tokens_per_second", "step_seconds", "skipped"}


class MetricsWriter:
    """Appends records to `DIR/metrics.jsonl` (one JSON object per line) and `DIR/tensorboard/`.

    `resumed_step` is the step from which the run resumes: records of later steps, which will be written again, are
    dropped. Raises OSError where a file cannot be written.
    """

    def __init__(self, workdir: Path, resumed_step: int):
        path = workdir / "metrics.jsonl"
        _rewrite(path, [r for r in read_records(path) if r["step"] <= resumed_step])
        self._file = path.open("a")
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._tensorboard = EventsWriter(str(workdir / "tensorboard" / "events"))
        restart = SessionLog(status=SessionLog.START)  # has TensorBoard drop the later steps too
        self._add_event(resumed_step + 1, session_log=restart)

    def write(self, record: Record) -> None:
        """Writes one record to both; it is on disk when this returns. Raises OSError."""
        self._file.write(_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())
        values = [
            Summary.Value(tag=f"{record['split']}/{name}", simple_value=value)
            for name, value in record.items()
            if name not in ("step", "split")
        ]
        self._add_event(record["step"], summary=Summary(value=values))

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._tensorboard.close()

    def _add_event(self, step: int, **content: Any) -> None:
        self._tensorboard.write_event(Event(wall_time=time.time(), step=step, **content))
        self._tensorboard.flush()


def add_record(workdir: Path, record: Record) -> None:
    """Adds a record to the metrics of a run that is not training; it replaces one of the same step and split."""
    path = workdir / "metrics.jsonl"
    same = (record["step"], record["split"])
    _rewrite(path, [r for r in read_records(path) if (r["step"], r["split"]) != same] + [record])


def _rewrite(path: Path, records: list[Record]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(map(_line, records)))
    os.replace(unfinished, path)


def _line(record: Record) -> str:
    """A record as a line of JSON; infinity and nan, which JSON does not have, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"


def read_records(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, with nan for null; truncated and damaged lines are left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append({k: math.nan if v is None else v for k, v in record.items()})
    return records


def checked_records(path: Path, metrics: Iterable[str]) -> list[Record]:
    """The records of a `metrics.jsonl` whose lines must be sound and have these metrics.

    Only the last line may be truncated, as a killed run leaves it.

    Raises:
      ConfigError: the file cannot be read, has no lines, or has a damaged one.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the folder of a training run") from error
    for number, line in enumerate(lines, 1):
        if not _is_record(line, {"step", "split", *metrics}):
            raise ConfigError(
                f"{path}: line {number} is damaged; put the file back from a copy, or remove that line, which leaves "
                f"a gap in the curves"
            )
    if not lines:
        raise ConfigError(f"{path} has no metrics yet; train there for log_every steps first")
    return read_records(path)


def _is_record(line: bytes, keys: set[str]) -> bool:
    try:
        record = json.loads(line)
        keys = keys | (OF_TRAINING if record["split"] == "train" else set())
        numbers = [value for key, value in record.items() if key != "split"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return (
        keys <= record.keys()
        and type(record["step"]) is int
        and all(type(n) in (int, float, type(None)) for n in numbers)
    )


def console_line(record: Record, steps: int, metrics: str) -> str:
    """A record as a line for the console.

    `steps` is the number of the run's last step, for the time left; `metrics` are the task's metrics as text.
    """
    line = f"step {record['step']:>{len(str(steps))}}/{steps}  {record['split']:<5} {metrics}"
    if record["split"] != "train":
        return line
    left = (steps - record["step"]) * record["step_seconds"]
    return (
        f"{line}  "
        f"lr {record['learning_rate']:.2e}  |grad| {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {duration(left)} left"
    )


def duration(seconds: float) -> str:
    """Seconds as `4s`, `3m04s` or `2h05m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
