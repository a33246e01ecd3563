"""What the models are compared on: tasks with their configs and data, scaled down for two cores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.alternatives import listops, recall
from experiments.alternatives.models import HIERARCHY, MODELS
from experiments.genomes.genomes import TRAIN, file_of
from lss_jax import load_config

BUDGETS = TOKENS, OPERATIONS = "tokens", "operations"  # what is equal to those of exact attention
SEEDS = {"train": 0, "valid": 1, "test": 2}  # of generated files
COUNTS = {"train": 20_000, "valid": 512, "test": 512}
DISTANCES = {128: 150, 512: 300}  # to the steps that exact attention takes to recall all, about
STRAIN, SPECIES = "hpylori-SJM180", "vcholerae-O395"  # held out
BOUNDS = listops.Bounds(least=64, most=256, depth=5, arguments=5)
BLOCKS = {"attention.block_queries": 128, "attention.block_keys": 128}  # small ones, for narrow windows
SMALL = {
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 2,
    "model.positions": "rope",
    "sample_prompt": "",
    **BLOCKS,
}


class Comparison(NamedTuple):
    """A task: the config file and the keys of exact attention, and what is told of a run."""

    name: str
    file: str
    keys: dict[str, Any]
    metric: str  # in the records of the validation split
    unit: str
    by_position: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """The models that serve this task: a hierarchy predicts next tokens alone."""
        task = load_config(self.file, self.keys).task
        return tuple(name for name in MODELS if name != HIERARCHY or task == "language_model")


def name_of(task: Comparison, model: str, budget: str) -> str:
    """What the runs of all seeds are called."""
    return f"{task.name}, {model}, equal {budget}"


def comparisons(enwik8: Path, genomes: Path, folder: Path) -> list[Comparison]:
    """All tasks; those that are generated are files in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return [*(_recall(distance, folder) for distance in DISTANCES), _listops(folder), *_others(enwik8, genomes)]


def _recall(distance: int, folder: Path) -> Comparison:
    counts = {split: count * min(DISTANCES) // distance for split, count in COUNTS.items()}
    keys = {
        **_files(f"recall-{distance}", folder, lambda split: recall.lines(counts[split], SEEDS[split], distance)),
        "data.prompt_field": "prompt",
        "data.answer_field": "answer",
        "data.pack": False,
        "data.seq_len": recall.length_of(distance),
        "data.batch_size": 16,
        "optim.steps": DISTANCES[distance],
        "optim.learning_rate": 1.5e-2,
    }
    return Comparison(
        f"recall at {distance:,}", "configs/default.py", {**SMALL, **keys}, "bits_per_byte", "bits/letter"
    )


def _files(name: str, folder: Path, text_of: Callable[[str], str]) -> dict[str, Any]:
    """The keys of a generated text of each split, written if it is not there."""
    paths = {split: folder / f"{name}-{split}.jsonl" for split in SEEDS}
    for split, path in paths.items():
        if not path.exists():
            path.write_text(text_of(split))
    train, valid, test = map(str, paths.values())
    return {"data.source": "text", "data.path": train, "data.valid_path": valid, "data.test_path": test}


def _listops(folder: Path) -> Comparison:
    keys = {
        **_files("listops", folder, lambda split: listops.lines(COUNTS[split], SEEDS[split], BOUNDS)),
        "task": "sequence_label",
        "data.prompt_field": "text",
        "data.answer_field": "label",
        "data.seq_len": BOUNDS.most,
        "data.batch_size": 16,
        "labels.names": "0,1,2,3,4,5,6,7,8,9",
        "model.family": "encoder",
        "model.classes": 10,
        "model.pooling": "mean",
        "attention.layout": "contiguous",
        "optim.steps": 300,
    }
    return Comparison("ListOps", "configs/default.py", {**SMALL, **keys}, "accuracy", "share right")


def _others(enwik8: Path, genomes: Path) -> list[Comparison]:
    windows = {"data.seq_len": 1024, "data.batch_size": 4}
    letters = {**SMALL, **windows, "data.source": "enwik8", "data.path": str(enwik8), "optim.steps": 150}
    bases = {
        **SMALL,
        **windows,
        "data.path": ",".join(str(file_of(genomes, name)) for name in TRAIN),
        "data.valid_path": str(file_of(genomes, SPECIES)),
        "data.test_path": str(file_of(genomes, STRAIN)),
        "optim.steps": 150,
    }
    return [
        Comparison("mosaics", "configs/mosaics.py", BLOCKS, "dice", "mean Dice"),
        Comparison("enwik8", "configs/default.py", letters, "bits_per_byte", "bits/byte", by_position=True),
        Comparison("DNA", "configs/genome.py", bases, "bits_per_base", "bits/base", by_position=True),
    ]
