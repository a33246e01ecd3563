"""The rule of the longest open reading frames: what coding sequences look like to one who knows the genetic code alone.

An open reading frame (ORF) goes from a start codon to the next stop codon in its frame, on either strand; the first
start codon behind a stop counts. At the ends of a contig it may lack either. All bases of ORFs of at least some length
are called coding; an ORF that lies by more than half in longer ones is left out.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lss_jax.data.bases import COMPLEMENT, LETTERS

STOPS, STARTS = ("TAA", "TAG", "TGA"), ("ATG", "GTG", "TTG")  # of bacteria, translation table 11


def open_reading_frames(bases: np.ndarray, shortest: int) -> list[tuple[int, int]]:
    """All ORFs of at least `shortest` bases, in all six frames, as spans on the given strand."""
    length, other = len(bases), COMPLEMENT[bases][::-1]
    forward = [span for span in _of_strand(bases) if span[1] - span[0] >= shortest]
    backward = [(length - b, length - a) for a, b in _of_strand(other) if b - a >= shortest]
    return forward + backward


def _of_strand(bases: np.ndarray) -> Iterator[tuple[int, int]]:
    """The ORFs in the three frames of a strand, the stop codon included."""
    codons = bases[:-2].astype(np.int32) * 25 + bases[1:-1] * 5 + bases[2:] if len(bases) > 2 else np.zeros(0, np.int32)
    for frame in range(3):
        in_frame = codons[frame::3]
        stops = np.flatnonzero(np.isin(in_frame, _numbers(STOPS)))
        starts = np.flatnonzero(np.isin(in_frame, _numbers(STARTS)))
        opened = np.concatenate(([0], stops + 1))  # the codon behind each stop; the contig's edge is open
        first = np.append(starts, len(in_frame))[np.searchsorted(starts, opened)]
        first[0] = 0
        closed = np.append(stops + 1, len(in_frame))
        for start, stop in zip(first, closed, strict=True):
            if start < stop:
                yield frame + 3 * int(start), frame + 3 * int(stop)


def _numbers(codons: Sequence[str]) -> list[int]:
    places = [[LETTERS.index(letter.encode()) for letter in codon] for codon in codons]
    return [a * 25 + b * 5 + c for a, b, c in places]


def coding_bases(bases: np.ndarray, shortest: int) -> np.ndarray:
    """Which bases the rule calls coding, bool."""
    coding = np.zeros(len(bases), bool)
    for start, stop in sorted(open_reading_frames(bases, shortest), key=lambda span: span[0] - span[1]):
        if 2 * np.count_nonzero(coding[start:stop]) <= stop - start:
            coding[start:stop] = True
    return coding
