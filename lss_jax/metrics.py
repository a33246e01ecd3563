"""What a run says of itself: lines on the console, `metrics.jsonl`, and TensorBoard event files."""

import json
import math
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

Record = dict[str, Any]  # step, split, loss, bits_per_byte; train also learning_rate, grad_norm, tokens_per_second, ...


def bits_per_byte(nats: float) -> float:
    """Nats per byte to bits per byte."""
    return nats / math.log(2)


class MetricsWriter:
    """Appends records to `DIR/metrics.jsonl` (one JSON object a line) and `DIR/tensorboard/`.

    `resumed_step` is the step that the run goes on from: records of later steps, which will come again, are dropped.
    """

    def __init__(self, workdir: Path, resumed_step: int):
        path = workdir / "metrics.jsonl"
        _rewrite(path, [r for r in read_records(path) if r["step"] <= resumed_step])
        self._file = path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, record: Record) -> None:
        """Writes one record to both places."""
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "split"):
                self._tensorboard.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._tensorboard.close()


def add_record(workdir: Path, record: Record) -> None:
    """Adds a record to the metrics of a run at rest; it takes the place of one of the same step and split."""
    path = workdir / "metrics.jsonl"
    same = (record["step"], record["split"])
    _rewrite(path, [r for r in read_records(path) if (r["step"], r["split"]) != same] + [record])


def _rewrite(path: Path, records: list[Record]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(unfinished, path)


def read_records(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; a line that a kill cut short does not count."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def console_line(record: Record, steps: int) -> str:
    """A record for the eye; `steps` is where the run ends, for the time that is left."""
    step = f"step {record['step']:>{len(str(steps))}}/{steps}"
    if record["split"] != "train":
        return f"{step}  {record['split']:<5} loss {record['loss']:.4f}  {record['bits_per_byte']:.4f} bits/byte"
    left = (steps - record["step"]) * record["step_seconds"]
    return (
        f"{step}  train loss {record['loss']:.4f}  {record['bits_per_byte']:.4f} bits/byte  "
        f"lr {record['learning_rate']:.2e}  |grad| {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {duration(left)} left"
    )


def duration(seconds: float) -> str:
    """Seconds as `4s`, `3m04s` or `2h05m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
