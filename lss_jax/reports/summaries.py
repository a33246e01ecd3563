"""The texts that a run's model generates from the sources of a split, beside their references."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from lss_jax.config.schema import Config, ConfigError, RunError, with_value
from lss_jax.data.split import WindowSplit
from lss_jax.data.text import Tokenizer, decoded
from lss_jax.data.windows import sides
from lss_jax.generation.beam_search import BeamSearch
from lss_jax.generation.beams import Beams
from lss_jax.generation.programs import reads_source
from lss_jax.generation.request import task_and_text
from lss_jax.models import build_model
from lss_jax.reports.rouge import Rouge, first_sentences
from lss_jax.runtime.distributed import is_first
from lss_jax.storage.workdir import write_whole
from lss_jax.tasks import make_task
from lss_jax.training.compatibility import check_workdir
from lss_jax.training.evaluation import restore_params
from lss_jax.training.setup import mesh_of

FIRST = (1, 3)  # so many first sentences of a source are compared with


class Pair(NamedTuple):
    """A document of a split."""

    source: np.ndarray  # tokens
    target: np.ndarray


def evaluate_rouge(config: Config, workdir: Path, split: str, batches: int | None, beams: Beams) -> dict[str, Any]:
    """ROUGE of the texts of the newest sound checkpoint, and of the first sentences, over a split's documents.

    Texts are saved batch by batch in the workdir, as `summaries_SPLIT.json`, and the same call goes on with them.

    Args:
      config: the run's own, perhaps on another mesh, which gives the same texts.
      workdir: of the run.
      split: "train", "valid" or "test".
      batches: how many batches, from the first; None for all.
      beams: of the search.

    Raises:
      ConfigError: the run's model answers no sources, a package is missing, or what `evaluate_run` raises.
    """
    check(config, beams)
    rouge = Rouge()
    check_workdir(config, workdir, trains=False)
    config = with_value(config, "optim.offload", False)  # or all weights would come from the host for every token
    mesh = mesh_of(config, jax.devices(), trains=False)
    documents = documents_of(config, mesh, split, batches)
    step, params = restore_params(build_model(config, mesh), mesh, workdir)
    of = {"step": step, **dataclasses.asdict(beams), "data": dataclasses.asdict(config.data)}
    saved = Saved(workdir / f"summaries_{split}.json", of)
    rows, longest = config.data.batch_size, config.data.source_len
    if len(saved.texts) < len(documents):
        search = BeamSearch(config, mesh, params, rows=rows, length=longest, tokens=config.data.seq_len, beams=beams)
        todo = range(len(saved.texts), len(documents), rows)
        for first in tqdm(todo, desc="summaries", unit="batch", leave=False, disable=None if is_first() else True):
            sources = [pair.source[:longest] for pair in documents[first : first + rows]]
            saved.add(search.texts(sources))
    _, text = task_and_text(config)
    return saved.of | {"split": split} | compared(rouge, text, documents, saved.texts[: len(documents)])


def check(config: Config, beams: Beams) -> None:
    """Raises a ConfigError for a run whose model has no text to say of a source, or for a search that cannot work."""
    problems = [*beams.problems()]
    if not reads_source(config):
        problems.append(
            f"--rouge compares answers to sources with references, and model.family={config.model.family!r} reads "
            f'none; give a run of task="sequence_to_sequence"'
        )
    if problems:
        raise ConfigError("\n".join(problems))
    task_and_text(config)


def compared(rouge: Rouge, text: Tokenizer, documents: list[Pair], texts: list[str]) -> dict[str, Any]:
    """The number of documents, ROUGE by kind of text, and all the texts."""
    references = [decoded(text, pair.target) for pair in documents]
    sources = [decoded(text, pair.source) for pair in documents]
    scores = {"model": rouge.of(references, texts)}
    for count in FIRST:
        name = f"first {count} sentences" if count > 1 else "first sentence"
        scores[name] = rouge.of(references, [first_sentences(source, count) for source in sources])
    pairs = [{"reference": reference, "text": text} for reference, text in zip(references, texts, strict=True)]
    return {"documents": len(documents), "scores": scores, "texts": pairs}


def documents_of(config: Config, mesh: jax.sharding.Mesh, split: str, batches: int | None) -> list[Pair]:
    """The documents of the first batches of a split, in the order of evaluation."""
    return list(_pairs(make_task(config).splits(mesh)[split], batches))


def _pairs(split: WindowSplit, batches: int | None) -> Iterator[Pair]:
    count = split.batches if batches is None else min(batches, split.batches)
    for window in (window for index in range(count) for window in split.evaluation_windows(index)):
        if window.start < window.stop:
            yield Pair(*(stream.tokens[start:stop] for stream, start, stop in sides(window)))


class Saved:
    """Texts that are saved as they come, and taken up again if they are `of` the same checkpoint and search.

    Among many processes nothing is taken up: not all of them need see the same folder.
    """

    def __init__(self, path: Path, of: dict[str, Any]):
        self._path, self.of, self.texts = path, json.loads(json.dumps(of)), list[str]()
        if path.is_file() and jax.process_count() == 1:
            found = json.loads(path.read_text())
            self.texts = found["texts"] if found["of"] == self.of else []

    def add(self, texts: list[bytes]) -> None:
        """Adds texts, and saves all there are.

        Raises:
          RunError: they cannot be written.
        """
        self.texts += [text.decode(errors="replace").strip() for text in texts]
        if not is_first():
            return
        try:
            write_whole(self._path, json.dumps({"of": self.of, "texts": self.texts}, indent=2) + "\n")
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written ({error.strerror}); make room, then the same command goes on"
            ) from error
