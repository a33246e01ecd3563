"""The baselines of experiments/genomes, letter by letter: k-mers with a prior, and open reading frames."""

import collections

import numpy as np
import pytest
from genome_files import random_letters, reverse_complement

from experiments.genomes.kmers import bits_per_base, probabilities
from experiments.genomes.orfs import coding_bases, open_reading_frames
from lss_jax.data.bases import BaseText


def bases_of(letters):
    return BaseText().tokens_of(letters.encode()).astype(np.uint8)


def expected_probability(strands, context, base, prior):
    """That of the model, by recursion over the order, which is the length of the context."""
    lower = 0.25 if not context else expected_probability(strands, context[1:], base, prior)
    seen = collections.Counter(
        strand[at : at + len(context) + 1] for strand in strands for at in range(len(strand) - len(context))
    )
    return (seen[context + base] + prior * lower) / (sum(seen[context + other] for other in "ACGT") + prior)


@pytest.mark.parametrize("prior", [0.5, 8.0])
def test_k_mers_are_interpolated_counts_of_both_strands(prior):
    train, test, order = [random_letters(200), random_letters(150, seed=1)], random_letters(40, seed=2) + "N" + "ACG", 3
    strands = [strand for letters in train for strand in (letters, reverse_complement(letters))]
    found = dict(probabilities([bases_of(letters) for letters in train], {"x": bases_of(test)}, order, [1.0, prior]))
    for k in range(order + 1):
        for at, probability in enumerate(found[k]["x", prior], start=order):
            if "N" in test[at - k : at + 1]:
                assert np.isnan(probability)
            else:
                expected = expected_probability(strands, test[at - k : at], test[at], prior)
                assert probability == pytest.approx(expected)
    assert bits_per_base(np.array([0.5, np.nan, 0.125])) == 2.0


def expected_frames(letters, shortest):
    """All ORFs by reading codon after codon."""
    found = set()
    for strand in (letters, reverse_complement(letters)):
        for frame in range(3):
            start = frame  # the contig's edge is open
            for at in range(frame, len(letters) - 2, 3):
                codon = strand[at : at + 3]
                start = at if start is None and codon in ("ATG", "GTG", "TTG") else start
                is_last = at + 6 > len(letters)
                if start is not None and (codon in ("TAA", "TAG", "TGA") or is_last):
                    found.add((start, at + 3) if strand == letters else (len(letters) - at - 3, len(letters) - start))
                if codon in ("TAA", "TAG", "TGA"):
                    start = None
    return sorted(span for span in found if span[1] - span[0] >= shortest)


@pytest.mark.parametrize("length", [0, 2, 3, 4, 50, 400, 401, 402])
def test_open_reading_frames_are_those_that_codons_show(length):
    letters = random_letters(length, seed=length, letters="ACGTTTAN")
    for shortest in (3, 30):
        found = open_reading_frames(bases_of(letters), shortest)
        assert sorted(set(found)) == expected_frames(letters, shortest)


def test_frames_that_lie_in_longer_ones_do_not_count():
    letters, taken = random_letters(2000, seed=5), set()
    frames = expected_frames(letters, 45)
    for start, stop in sorted(frames, key=lambda span: span[0] - span[1]):
        if 2 * len(taken & {*range(start, stop)}) <= stop - start:
            taken |= {*range(start, stop)}
    assert np.flatnonzero(coding_bases(bases_of(letters), 45)).tolist() == sorted(taken)
    assert len(taken) < len(set().union(*(range(*span) for span in frames))), "some are left out"
