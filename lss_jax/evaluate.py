"""Evaluate a trained model: `python -m lss_jax.evaluate --workdir DIR`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from ml_collections import ConfigDict

from lss_jax import cli, distributed
from lss_jax.attention.setting import mesh_of
from lss_jax.by_position import evaluate_by_position, parse_lengths, plot_of, table_of
from lss_jax.config import Config, ConfigError, from_dict
from lss_jax.data.sources import open_splits
from lss_jax.figures import png_of
from lss_jax.metrics import Record, add_record
from lss_jax.models import build_model
from lss_jax.runs import BY_POSITION
from lss_jax.step import make_eval_step
from lss_jax.trainer import Split, evaluate_split, restore_params
from lss_jax.workdir import check_workdir, saved_config, write_whole


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.evaluate",
        description="Bits per byte of a run's newest checkpoint on a whole split of its data.",
        epilog=f"{cli.OVERRIDES} The config is the run's own; another mesh gives the same number.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a training run")
    parser.add_argument(
        "--split",
        choices=["train", "valid", "test"],
        default="valid",
        help="default: valid; the whole test split is also added to metrics.jsonl",
    )
    parser.add_argument("--batches", type=int, metavar="N", help="only the first N batches (default: the whole split)")
    parser.add_argument(
        "--by-position",
        action="store_true",
        help=f"by how much came before a byte: a table here, {BY_POSITION}_SPLIT.json and .png in the workdir",
    )
    parser.add_argument(
        "--lengths", metavar="L,L", help="with --by-position: windows of these lengths (default: data.seq_len)"
    )
    cli.add_launch(parser)
    arguments, values = cli.parse(parser, lambda arguments: ConfigDict(saved_config(Path(arguments.workdir))))
    config, workdir = from_dict(values), Path(arguments.workdir)
    check(arguments)
    with cli.start(arguments, config):
        if arguments.by_position:
            lengths = parse_lengths(arguments.lengths) if arguments.lengths else [config.data.seq_len]
            result = evaluate_by_position(config, workdir, arguments.split, lengths, arguments.batches)
            if distributed.is_first():
                keep(result, workdir)
                print(table_of(result))
            return 0
        record = evaluate(workdir, arguments.split, arguments.batches, config=config)
        if distributed.is_first():
            if arguments.split == "test" and arguments.batches is None:
                add_record(workdir, record)
            shown = f"loss {record['loss']:.4f} nats/byte  {record['bits_per_byte']:.4f} bits/byte"
            print(f"step {record['step']}  {arguments.split}  {shown}")
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuses options that cannot work, or not together."""
    batches, lengths = arguments.batches, arguments.lengths
    if batches is not None and batches < 1:
        raise ConfigError(f"--batches={batches} must be at least 1; leave it out for the whole split")
    if lengths is not None and not arguments.by_position:
        raise ConfigError(f"--lengths={lengths} has no use without --by-position; add that")
    if lengths is not None and len(parse_lengths(lengths)) > 1 and batches is not None:
        raise ConfigError(
            f"--batches={batches} with --lengths={lengths} would compare different bytes; leave out --batches"
        )


def keep(result: dict[str, Any], workdir: Path) -> None:
    """Writes the result and its figure into the workdir."""
    path = workdir / f"{BY_POSITION}_{result['split']}.json"
    figure = png_of(plot_of({f"windows of {window['length']:,}": window for window in result["windows"]}))
    try:
        write_whole(path, json.dumps(result, indent=2) + "\n")
        write_whole(path.with_suffix(".png"), figure)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); make room or make it writable") from error


def evaluate(
    workdir: Path | str,
    split: Literal["train", "valid", "test"] = "valid",
    batches: int | None = None,
    *,
    config: Config | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Record:
    """The loss of a run's newest sound checkpoint: `loss` in nats and `bits_per_byte`, `step` and `split`.

    Args:
      workdir: of a training run.
      split: of its data.
      batches: only the first so many; None for all of them.
      config: the run's own, unless given; `load_config(workdir, {"mesh.seq": 4})` is that on another mesh, which gives
        the same loss.
      devices: what the mesh is made of; all there are, unless given.

    Raises:
      ConfigError: there is no run or no checkpoint, or the config does not fit it or the devices.
    """
    workdir, devices = Path(workdir), jax.devices() if devices is None else devices
    config = config or from_dict(saved_config(workdir))
    check_workdir(config, workdir)
    mesh = mesh_of(config, devices)
    data = Split(open_splits(config.data)[split], config, mesh)
    model = build_model(config)
    step, params = restore_params(model, mesh, workdir)
    losses = evaluate_split(make_eval_step(model, mesh), params, data, split, batches)
    return {"step": step, "split": split, **losses}


if __name__ == "__main__":
    cli.run(main)
