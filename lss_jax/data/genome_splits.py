"""Genomes as training data: whole records in each split, one after the other in the stream of each source.

A genome is never chopped into splits at random: what is held out is whole files, such as a strain or a species, or
whole records, such as contigs.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lss_jax.config.schema import ConfigError, DataConfig, gather_problems, parts_of
from lss_jax.data.annotation import Gff, Span, annotated, check_known, labels_of, read_gff
from lss_jax.data.documents import files_of
from lss_jax.data.genomes import SUFFIXES, Record, read_genome
from lss_jax.data.packing import Packing, Stream
from lss_jax.data.sources import SPLITS, MemorySource, Part

PATHS = {"train": "path", "valid": "valid_path", "test": "test_path"}  # by split, the key of `data`
HELD_OUT = 20  # without held-out files, one in so many bases is for validation at most, and as many for the test


class GenomeFiles(NamedTuple):
    """A source of a split: its part of the key, and the files that it names."""

    shown: str
    files: list[Path]


class LabelledRecord(NamedTuple):
    """A record with a label per base, or none where nothing annotates it."""

    name: str
    bases: np.ndarray  # uint8, tokens
    labels: np.ndarray | None  # uint8
    digest: bytes  # of the bases
    where: str


Records = list[list[LabelledRecord]]  # of each source


def genome_files(config: DataConfig) -> dict[str, list[GenomeFiles]]:
    """The files of each split; without `data.valid_path` and `data.test_path` all are the training split's.

    Raises:
      ConfigError: a part names no file, or a file is named for two splits; a line each.
    """
    named: dict[str, list[GenomeFiles]] = {}
    splits = [split for split in SPLITS if getattr(config, PATHS[split])]

    def find(split: str) -> None:
        named[split] = list(_named(f"data.{PATHS[split]}", getattr(config, PATHS[split])))

    gather_problems(*(lambda split=split: find(split) for split in splits), lambda: annotation_files(config))
    _check_apart(named)
    return named


def annotation_files(config: DataConfig) -> list[Path]:
    """The GFF files of `data.annotation`.

    Raises:
      ConfigError: it names none.
    """
    found = _named("data.annotation", config.annotation, (".gff", ".gff3")) if config.annotation else []
    return [file for part in found for file in part.files]


def _named(key: str, value: str, suffixes: Sequence[str] = SUFFIXES) -> Iterator[GenomeFiles]:
    for part in parts_of(value):
        try:
            yield GenomeFiles(f"{key}={part!r}", files_of([part], suffixes))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error


def _check_apart(named: dict[str, list[GenomeFiles]]) -> None:
    seen: dict[Path, str] = {}
    for part in itertools.chain.from_iterable(named.values()):
        for file in part.files:
            if file.resolve() in seen:
                raise ConfigError(
                    f"{part.shown} has {file}, which {seen[file.resolve()]} has too; name each file once, in one split"
                )
            seen[file.resolve()] = part.shown


def open_genomes(config: DataConfig) -> dict[str, list[Stream]]:
    """Reads all genomes and their annotation; by split, the stream of each source.

    Raises:
      ConfigError: a file is malformed, or a split is too short.
    """
    named = genome_files(config)
    annotations = [read_gff(path) for path in annotation_files(config)]
    records = {split: [_labelled(part, annotations) for part in parts] for split, parts in named.items()}
    _check_names(records, annotations)
    if len(records) == 1:
        records = dealt(records["train"], f"data.path={config.path!r}")
    _check_lengths(records, named["train"], config.seq_len)
    return {split: [_stream(of_part) for of_part in parts if of_part] for split, parts in records.items()}


def _labelled(part: GenomeFiles, annotations: Sequence[Gff]) -> list[LabelledRecord]:
    return [record for file in part.files for record in _of_file(list(read_genome(file)), annotations)]


def _of_file(records: Sequence[Record], annotations: Sequence[Gff]) -> list[LabelledRecord]:
    """The records of a file; one in which no coding sequence is annotated says nothing about any."""
    is_annotated = any(record.coding for record in records)
    return [_with_labels(record, record.coding if is_annotated else None, annotations) for record in records]


def _with_labels(record: Record, coding: list[Span] | None, annotations: Sequence[Gff]) -> LabelledRecord:
    name, bases, _, where = record
    if coding is None and annotations:
        coding = annotated(name, len(bases), annotations)
    labels, digest = None if coding is None else labels_of(bases, coding), hashlib.sha256(bases.data).digest()
    return LabelledRecord(name, bases, labels, digest, where)


def _check_names(records: dict[str, Records], annotations: Sequence[Gff]) -> None:
    """Raises a ConfigError if annotation does not know which record it is of, or that is not there."""
    if not annotations:
        return
    seen: dict[str, str] = {}
    for record in itertools.chain.from_iterable(itertools.chain.from_iterable(records.values())):
        if record.name in seen:
            raise ConfigError(
                f"{record.where}: record {record.name!r} is in {seen[record.name]} too, and data.annotation knows "
                f"records by their names; give each a name of its own"
            )
        seen[record.name] = record.where
    check_known(annotations, seen)


def dealt(parts: Records, shown: str) -> dict[str, Records]:
    """Deals records into three splits by the hash of their bases; at most 5% are held out for each of two.

    So equal records are in the same split, whatever their names, files and order.

    Raises:
      ConfigError: they are too few.
    """
    sizes: dict[bytes, int] = {}
    for record in itertools.chain.from_iterable(parts):
        sizes[record.digest] = sizes.get(record.digest, 0) + len(record.bases)
    total, held, split_of = sum(sizes.values()), {"valid": 0, "test": 0}, dict.fromkeys(sizes, "train")
    for digest, size in sorted(sizes.items()):
        smaller = min(held, key=lambda split: held[split])
        if (held[smaller] + size) * HELD_OUT <= total:
            split_of[digest], held[smaller] = smaller, held[smaller] + size
    if not all(held.values()):
        raise ConfigError(
            f"{shown}: of {len(sizes)} different records, {total} bases, too few are short enough to be held out whole "
            f"for validation and for the test, at most 1 base in {HELD_OUT} for each; name files that are held out by "
            f"data.valid_path and data.test_path"
        )
    return {
        split: [[record for record in records if split_of[record.digest] == split] for records in parts]
        for split in SPLITS
    }


def _stream(records: Sequence[LabelledRecord]) -> Stream:
    """The records one after the other, in a source that holds all bases and, behind them, their labels."""
    ends = np.cumsum([len(record.bases) for record in records]).astype(np.int64)
    bases, labels = [record.bases for record in records], [r.labels for r in records if r.labels is not None]
    has_labels, length = len(labels) == len(records), int(ends[-1])
    source = MemorySource(np.concatenate(bases + labels if has_labels else bases))
    return Stream(Part(source, 0, length), Packing(ends), Part(source, length, 2 * length) if has_labels else None)


def _check_lengths(records: dict[str, Records], train: Sequence[GenomeFiles], seq_len: int) -> None:
    """Raises a ConfigError for sources without a training window, and for a base that is held out alone."""
    sizes = {split: [sum(len(r.bases) for r in of_part) for of_part in parts] for split, parts in records.items()}
    problems = [
        f"{part.shown}: {size} bases for training, but one window takes data.seq_len + 1 = {seq_len + 1}; give more, "
        f"or use a smaller data.seq_len"
        for part, size in zip(train, sizes["train"], strict=True)
        if size <= seq_len
    ]
    for split in SPLITS[1:]:
        if 1 in sizes[split]:
            problems.append(f"the split {split!r} has a source of a single base, with none to predict; give more")
    if problems:
        raise ConfigError("\n".join(problems))
