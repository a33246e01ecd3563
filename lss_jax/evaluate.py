"""Evaluate a trained model: `python -m lss_jax.evaluate --workdir DIR`."""

import argparse
import json
from pathlib import Path
from typing import Any

from lss_jax import cli
from lss_jax.config.schema import Config, ConfigError
from lss_jax.generation.beams import PENALTY, Beams
from lss_jax.reports import rouge
from lss_jax.reports.by_position import evaluate_by_position, parse_lengths, plot_of, table_of
from lss_jax.reports.figures import png_of
from lss_jax.reports.pictures import check_pictures, picture_run
from lss_jax.reports.runs import BY_POSITION, PICTURES
from lss_jax.reports.summaries import evaluate_rouge
from lss_jax.runtime import distributed
from lss_jax.storage.metrics import add_record
from lss_jax.storage.workdir import write_whole
from lss_jax.tasks import make_task
from lss_jax.tasks.task import Task
from lss_jax.training.evaluation import evaluate_run

SHOWN = 3  # texts


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lss_jax.evaluate",
        description="The task's metrics (bits per byte) of a run's newest checkpoint on a whole split of its data.",
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
        help=f"by how much came before: a table here, {BY_POSITION}_SPLIT.json and .png in the workdir",
    )
    parser.add_argument(
        "--lengths", metavar="L,L", help="with --by-position: windows of these lengths (default: data.seq_len)"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        metavar="N",
        help=f"draw N images of the split with labels and predictions: {PICTURES}_SPLIT.png in the workdir",
    )
    parser.add_argument(
        "--rouge",
        action="store_true",
        help="of an encoder-decoder: ROUGE of the texts that it generates, beside the first sentences of the sources",
    )
    parser.add_argument("--beams", type=int, metavar="N", help="with --rouge: of the search (default: 1, greedy)")
    cli.add_launch(parser)
    arguments, config = cli.parse(parser, cli.config_of_run)
    workdir = Path(arguments.workdir)
    check(arguments, make_task(config))
    if arguments.pictures is not None:
        check_pictures(config)
    asked = {_rouge: arguments.rouge, _by_position: arguments.by_position, _pictures: arguments.pictures is not None}
    evaluate = next((one for one, is_asked in asked.items() if is_asked), _metrics)
    with cli.start(arguments, config):
        evaluate(arguments, config, workdir)
    return 0


def _metrics(arguments: argparse.Namespace, config: Config, workdir: Path) -> None:
    record = evaluate_run(workdir, arguments.split, arguments.batches, config=config)
    if distributed.is_first():
        if arguments.split == "test" and arguments.batches is None:
            add_record(workdir, record)
        metrics = "  ".join(f"{record[metric.name]:.4f} {metric.unit}" for metric in make_task(config).metrics)
        print(f"step {record['step']}  {arguments.split}  loss {metrics}")


def _by_position(arguments: argparse.Namespace, config: Config, workdir: Path) -> None:
    lengths = parse_lengths(arguments.lengths) if arguments.lengths else [config.data.seq_len]
    result = evaluate_by_position(config, workdir, arguments.split, lengths, arguments.batches)
    if distributed.is_first():
        save(make_task(config), result, workdir)
        print(table_of(make_task(config), result))


def _rouge(arguments: argparse.Namespace, config: Config, workdir: Path) -> None:
    beams = Beams(1 if arguments.beams is None else arguments.beams, PENALTY)
    result = evaluate_rouge(config, workdir, arguments.split, arguments.batches, beams)
    if distributed.is_first():
        write(workdir / f"rouge_{arguments.split}.json", json.dumps(result, indent=2) + "\n")
        print(shown(result))


def _pictures(arguments: argparse.Namespace, config: Config, workdir: Path) -> None:
    picture = picture_run(config, workdir, arguments.split, arguments.pictures)
    if distributed.is_first():
        path = workdir / f"{PICTURES}_{arguments.split}.png"
        write(path, picture)
        print(f"wrote {path}")


def check(arguments: argparse.Namespace, task: Task) -> None:
    """Refuses options that cannot work, or not together."""
    batches, lengths = arguments.batches, arguments.lengths
    if arguments.rouge and arguments.by_position:
        raise ConfigError("--rouge and --by-position are two evaluations; ask for one of them")
    if arguments.beams is not None and not arguments.rouge:
        raise ConfigError(f"--beams={arguments.beams} has no use without --rouge, which generates texts; add that")
    if batches is not None and batches < 1:
        raise ConfigError(f"--batches={batches} must be at least 1; leave it out for the whole split")
    if arguments.pictures is not None and arguments.pictures < 1:
        raise ConfigError(f"--pictures={arguments.pictures} must be at least 1")
    others = arguments.by_position or arguments.rouge or batches is not None
    if arguments.pictures is not None and others:
        raise ConfigError("--pictures goes with --split alone; leave out --by-position, --rouge and --batches")
    if lengths is not None and not arguments.by_position:
        raise ConfigError(f"--lengths={lengths} has no use without --by-position; add that")
    if lengths is not None and len(parse_lengths(lengths)) > 1 and batches is not None:
        raise ConfigError(
            f"--batches={batches} with --lengths={lengths} would compare different {task.items}; leave out --batches"
        )


def shown(result: dict[str, Any]) -> str:
    """ROUGE in a table, and some of the texts above their references."""
    head = f"step {result['step']}  {result['split']}  {result['documents']} documents"
    pairs = result["texts"][:SHOWN]
    examples = [f"\ntext       {pair['text']}\nreference  {pair['reference']}" for pair in pairs]
    return "\n".join([head, rouge.table_of(result["scores"]), *examples])


def save(task: Task, result: dict[str, Any], workdir: Path) -> None:
    """Writes the result and its figure into the workdir."""
    path = workdir / f"{BY_POSITION}_{result['split']}.json"
    figure = png_of(plot_of(task, {f"windows of {window['length']:,}": window for window in result["windows"]}))
    write(path, json.dumps(result, indent=2) + "\n")
    write(path.with_suffix(".png"), figure)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file into the workdir, whole or not at all."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); make room or make it writable") from error


if __name__ == "__main__":
    cli.run(main)
