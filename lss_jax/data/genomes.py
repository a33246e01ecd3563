"""Genomes: the records of FASTA and GenBank files, gzipped or not, read line by line into a byte per base."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lss_jax.config.schema import ConfigError
from lss_jax.data.annotation import CDS, Span, check_spans, spans_of_location
from lss_jax.data.bases import tokens_of
from lss_jax.data.numbered import numbered

SUFFIXES = (".fasta", ".fa", ".fna", ".gb", ".gbk", ".gbff")  # what is taken from a folder, also with .gz behind it
SPACE = b" \t\r\n"
DIGITS = b"0123456789"
FEATURE, LOCATION = slice(5, 21), slice(21, None)  # columns of GenBank's table of features

Lines = Iterable[tuple[int, bytes]]


class Record(NamedTuple):
    """A sequence of a file: a chromosome, a plasmid or a contig."""

    name: str
    bases: np.ndarray  # uint8, tokens
    coding: list[Span] | None  # of a GenBank record; None: a FASTA file says nothing about that
    where: str  # for messages


def read_genome(path: Path) -> Iterator[Record]:
    """The records of a FASTA or GenBank file, which its first line tells apart.

    Raises:
      ConfigError: it cannot be read, is neither, is truncated, or has a record that is empty, malformed or there twice;
        the message names the file, the record and the line.
    """
    lines = numbered(path)
    first, seen = _first(path, lines), dict[str, str]()
    kind = _fasta if first[1].startswith(b">") else _genbank
    for record in kind(path, first, lines):
        if record.name in seen:
            raise ConfigError(
                f"{record.where}: record {record.name!r} is there twice, first in {seen[record.name]}; leave one out"
            )
        seen[record.name] = record.where
        yield record


def _first(path: Path, lines: Lines) -> tuple[int, bytes]:
    """The first line that is not blank."""
    for number, line in lines:
        if line.startswith((b">", b"LOCUS ")):
            return number, line
        if line.strip():
            shown = line[:40].decode(errors="replace").strip()
            raise ConfigError(
                f"{path}, line {number}: begins with {shown!r}, but FASTA with a header, '>NAME', and GenBank with "
                f"LOCUS; give one of these"
            )
    raise ConfigError(f"{path} is empty, without any record; leave it out")


class _Sequence:
    """The bases of a record, line by line."""

    def __init__(self, path: Path, name: str, line: int):
        self.path, self.name, self.where = path, name, f"{path}, line {line}"
        self._bases = bytearray()

    def add(self, line: bytes, number: int, without: bytes) -> None:
        try:
            self._bases += tokens_of(line, without)
        except ValueError as error:
            raise ConfigError(
                f"{self.path}, line {number}: {error.args[0]!r} in record {self.name!r} is no base; give nucleotides, "
                f"as A, C, G, T, N and the other letters of IUPAC, without gaps"
            ) from error

    def __len__(self) -> int:
        return len(self._bases)

    def record(self, coding: list[Span] | None) -> Record:
        if not self._bases:
            raise ConfigError(
                f"{self.where}: record {self.name!r} has no bases; leave it out, or fetch it again with its sequence"
            )
        return Record(self.name, np.frombuffer(self._bases, np.uint8), coding, self.where)


def _fasta(path: Path, first: tuple[int, bytes], lines: Lines) -> Iterator[Record]:
    sequence = _headed(path, *first)
    for number, line in lines:
        if line.startswith(b">"):
            yield sequence.record(None)
            sequence = _headed(path, number, line)
        else:
            sequence.add(line, number, SPACE)
    yield sequence.record(None)


def _headed(path: Path, number: int, header: bytes) -> _Sequence:
    """A record by its header, of which the first word is the name."""
    words = header[1:].decode(errors="replace").split()
    if not words or header[1:2].isspace():
        raise ConfigError(f"{path}, line {number}: has no name behind '>'; give each record a name of its own")
    return _Sequence(path, words[0], number)


def _genbank(path: Path, first: tuple[int, bytes], lines: Lines) -> Iterator[Record]:
    found: _GenBank | None = _GenBank(path, *first)
    for number, line in lines:
        if line.startswith(b"//"):
            if found is not None:
                yield found.record()
            found = None
        elif found is not None:
            found.add(number, line)
        elif line.startswith(b"LOCUS "):
            found = _GenBank(path, number, line)
        elif line.strip():
            raise ConfigError(
                f"{path}, line {number}: is outside of any record; each begins with LOCUS, and ends with //"
            )
    if found is not None:
        raise ConfigError(
            f"{found.sequence.where}: record {found.sequence.name!r} does not end with //: the file is truncated; copy "
            f"it again"
        )


class _GenBank:
    """A record of GenBank, line by line: `section` is the last word at the start of a line."""

    def __init__(self, path: Path, number: int, locus: bytes):
        words = locus.decode(errors="replace").split()
        says = re.search(r"\s(\d+) bp", locus.decode(errors="replace"))
        if len(words) < 2 or re.search(rb"\s\d+ aa\s", locus):
            raise ConfigError(
                f"{path}, line {number}: LOCUS has no name, or is that of a protein; give a GenBank file of nucleotides"
            )
        self.sequence, self.section = _Sequence(path, words[1], number), "LOCUS"
        self._length = int(says[1]) if says else None
        self._coding: list[Span] = []
        self._location, self._location_line = "", 0  # of a coding sequence, as far as it has been read

    def add(self, number: int, line: bytes) -> None:
        if line[:1].isalpha():
            self._end_location()
            self.section = line.split(maxsplit=1)[0].decode(errors="replace")
            self._named(number, line)
        elif self.section == "ORIGIN":
            self.sequence.add(line, number, SPACE + DIGITS)
        elif self.section == "FEATURES":
            self._feature(number, line.decode(errors="replace"))

    def _named(self, number: int, line: bytes) -> None:
        if self.section == "LOCUS":
            raise ConfigError(
                f"{self.sequence.path}, line {number}: a record begins, but record {self.sequence.name!r} has not "
                f"ended with //; the file is truncated there, copy it again"
            )
        words = line.decode(errors="replace").split()
        if self.section == "VERSION" and len(words) > 1:
            self.sequence.name = words[1]

    def _feature(self, number: int, line: str) -> None:
        kind, rest = line[FEATURE].strip(), line[LOCATION].strip()
        if kind or rest.startswith("/"):
            self._end_location()
        if kind == CDS:
            self._location, self._location_line = rest, number
        elif not kind and self._location:
            self._location += rest

    def _end_location(self) -> None:
        if self._location:
            try:
                self._coding += spans_of_location(self._location, self._location_line)
            except ValueError as error:
                raise ConfigError(
                    f"{self.sequence.path}, line {self._location_line}: a {CDS} of record {self.sequence.name!r} has a "
                    f"location with {error.args[0]!r} in it; give places in this record, as in 12..345"
                ) from error
        self._location = ""

    def record(self) -> Record:
        self._end_location()
        sequence, length = self.sequence, len(self.sequence)
        if length and self._length not in (None, length):
            raise ConfigError(
                f"{sequence.where}: record {sequence.name!r} says {self._length} bp, but has {length} bases; the file "
                f"is truncated or was changed, fetch it again"
            )
        found = sequence.record(self._coding)
        check_spans(self._coding, found.name, length, sequence.path)
        return found
