"""Annotation: where the coding sequences of a record lie, from GenBank features or a GFF3 file, as a label per base.

A base is coding (1) where any coding sequence (CDS) covers it, on either strand, and else not (0). Parts of joined
sequences count, and what lies between them does not; pseudogenes that are annotated as CDS count too.
"""

import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lss_jax.config.schema import ConfigError
from lss_jax.data.bases import UNKNOWN
from lss_jax.data.numbered import numbered
from lss_jax.data.packing import IGNORED_LABEL

NAMES = ("other", "coding")  # of the labels
CDS = "CDS"
COLUMNS = 9  # of a line of GFF
_OPERATORS = re.compile(r"complement\(|join\(|order\(|\)|\s")
_PART = re.compile(r"<?(\d+)(?:\.\.>?(\d+))?")
_CIRCULAR = re.compile(r"(?:^|;)\s*Is_circular=true", re.IGNORECASE)


class Span(NamedTuple):
    """Bases of a coding sequence, from `start` (counted from 0) to `stop`; `line` is where its file says so."""

    start: int
    stop: int
    line: int


class Gff(NamedTuple):
    """The coding sequences that a GFF3 file annotates."""

    path: Path
    spans: dict[str, list[Span]]  # by record
    circular: set[str]  # records whose coding sequences may go on from their end to their start


def spans_of_location(location: str, line: int) -> list[Span]:
    """The spans of a GenBank location, as `complement(join(1..9,<12..30))`; the strand and `<` and `>` do not matter.

    Raises:
      ValueError: it is none, or lies in another record; the argument is the part in question.
    """
    spans = []
    for part in _OPERATORS.sub("", location).split(","):
        match = _PART.fullmatch(part)
        if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise ValueError(part)
        spans.append(Span(int(match[1]) - 1, int(match[2] or match[1]), line))
    return spans


def read_gff(path: Path) -> Gff:
    """The coding sequences of a GFF3 file, gzipped or not; other features are not looked at.

    Raises:
      ConfigError: it cannot be read, a line is malformed, or there is no coding sequence.
    """
    gff = Gff(path, {}, set())
    for number, line in numbered(path):
        text = line.decode(errors="replace").rstrip("\r\n")
        if text.startswith(("##FASTA", ">")):
            break  # from here on sequences
        if text.strip() and not text.startswith("#"):
            _add_line(gff, text, f"{path}, line {number}", number)
    if not gff.spans:
        raise ConfigError(f"{path} has no feature of type {CDS}; give a GFF3 file with coding sequences in it")
    return gff


def _add_line(gff: Gff, text: str, where: str, number: int) -> None:
    columns = text.split("\t")
    if len(columns) != COLUMNS:
        raise ConfigError(
            f"{where}: has {len(columns)} columns, but a line of GFF3 has {COLUMNS}, with tabs between; repair it, or "
            f"leave it out"
        )
    record, _, kind, start, stop, *_, attributes = columns
    record = urllib.parse.unquote(record)
    if _CIRCULAR.search(attributes):
        gff.circular.add(record)
    if kind == CDS:
        if not (start.isdecimal() and stop.isdecimal() and 1 <= int(start) <= int(stop)):
            raise ConfigError(
                f"{where}: a {CDS} of record {record!r} from {start!r} to {stop!r}; give its first and its last base, "
                f"counted from 1, the first one first"
            )
        gff.spans.setdefault(record, []).append(Span(int(start) - 1, int(stop), number))


def annotated(record: str, length: int, annotations: Sequence[Gff]) -> list[Span]:
    """The coding sequences of a record that GFF files know, none of them beyond its end.

    Raises:
      ConfigError: one reaches beyond the end, and the record is not circular.
    """
    found = []
    for gff in annotations:
        spans = gff.spans.get(record, [])
        if record in gff.circular:
            spans = [part for span in spans for part in _round(span, length)]
        check_spans(spans, record, length, gff.path)
        found += spans
    return found


def _round(span: Span, length: int) -> Iterable[Span]:
    """A span of a circular record in parts: what is beyond its end is at its start."""
    yield span._replace(stop=min(span.stop, length)) if span.start < length else span
    if span.start < length < span.stop <= 2 * length:
        yield span._replace(start=0, stop=span.stop - length)


def check_spans(spans: Iterable[Span], record: str, length: int, path: Path) -> None:
    """Raises a ConfigError for a coding sequence that reaches beyond the end of its record."""
    for start, stop, line in spans:
        if stop > length:
            raise ConfigError(
                f"{path}, line {line}: a {CDS} of record {record!r} goes from {start + 1} to {stop}, but the record "
                f"has {length} bases; give the annotation of this sequence"
            )


def check_known(annotations: Sequence[Gff], records: Mapping[str, object]) -> None:
    """Raises a ConfigError, with a line per file, for annotation of a record that there is not."""
    problems = []
    for gff in annotations:
        unknown = [name for name in gff.spans if name not in records]
        if unknown:
            name, line = unknown[0], gff.spans[unknown[0]][0].line
            problems.append(
                f"{gff.path}, line {line}: annotates record {name!r}, which no FASTA file has (they have "
                f"{_some(records)}); give its file in data.path, or leave these lines out"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _some(names: Mapping[str, object]) -> str:
    shown = ", ".join(map(repr, list(names)[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def labels_of(bases: np.ndarray, spans: Iterable[Span]) -> np.ndarray:
    """The label of each base, uint8: 1 in a coding sequence, 0 elsewhere, `IGNORED_LABEL` for unknown bases."""
    labels = np.zeros(len(bases), np.uint8)
    for start, stop, _ in spans:
        labels[start:stop] = 1
    labels[bases == UNKNOWN] = IGNORED_LABEL
    return labels
