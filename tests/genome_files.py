"""Writers of small FASTA and GenBank files, and the bases of one strand as the other reads them, letter by letter."""

import gzip
from pathlib import Path

import numpy as np

PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}


def random_letters(count: int, seed: int = 0, letters: str = "ACGT") -> str:
    return "".join(np.random.default_rng(seed).choice(list(letters), count))


def reverse_complement(letters: str) -> str:
    return "".join(PAIRS[letter] for letter in reversed(letters))


def fasta(records: dict[str, str], width: int = 60) -> str:
    lines = []
    for name, letters in records.items():
        lines += [f">{name} a description", *(letters[at : at + width] for at in range(0, len(letters), width))]
    return "\n".join(lines) + "\n"


def genbank(name: str, letters: str, locations: list[str] = ()) -> str:
    """A record; a location may have several lines."""
    lines = [f"LOCUS       {name} {len(letters)} bp    DNA     linear   BCT 01-JAN-2020", f"VERSION     {name}.1"]
    lines += ["FEATURES             Location/Qualifiers", f"     source          1..{len(letters)}"]
    for location in locations:
        first, *rest = location.split("\n")
        lines += ["     gene            " + first] + [" " * 21 + line for line in rest]
        lines += ["     CDS             " + first] + [" " * 21 + line for line in rest]
        lines += [" " * 21 + '/product="said in', " " * 21 + '1..2 lines"']
    lines.append("ORIGIN")
    for at in range(0, len(letters), 60):
        tens = (letters[start : start + 10].lower() for start in range(at, min(at + 60, len(letters)), 10))
        lines.append(f"{at + 1:>9} {' '.join(tens)}")
    return "\n".join([*lines, "//", ""])


def write(path: Path, text: str) -> Path:
    """Writes a file, gzipped if its name says so."""
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
