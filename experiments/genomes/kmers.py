"""K-mer models: the next base from counts of the bases before it, for every order up to one.

A model of order k has seen, on both strands, how often each base follows each k bases. It interpolates: what order
k - 1 predicts counts like `prior` more sightings in each context, and order 0 rests on the uniform distribution. So a
context that was never seen, or seldom, is left to shorter ones (a hierarchical Dirichlet prior, MacKay and Peto 1995).
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lss_jax.data.bases import COMPLEMENT, UNKNOWN


def words_of(bases: np.ndarray, length: int) -> np.ndarray:
    """All words of so many bases, each as a number in base 4, int64; -1 for those with an unknown base."""
    count = max(len(bases) - length + 1, 0)
    words, unknown = np.zeros(count, np.int64), np.zeros(count, bool)
    for at in range(length):
        letters = bases[at : at + count]
        words = words * 4 + letters
        unknown |= letters == UNKNOWN
    return np.where(unknown, -1, words)


def both_strands(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The sequences and their reverse complements."""
    return [strand for bases in sequences for strand in (bases, COMPLEMENT[bases][::-1])]


class Counts:
    """How often each word of so many bases occurs in some sequences."""

    def __init__(self, sequences: Sequence[np.ndarray], length: int):
        words = np.concatenate([words_of(bases, length) for bases in sequences])
        self._words, counts = np.unique(words[words >= 0], return_counts=True)
        self._before = np.concatenate(([0], np.cumsum(counts)))  # of the words before each

    def of_bases_and_contexts(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How often each of these words occurs, and how often all words that differ in the last base alone."""
        different, place = np.unique(words, return_inverse=True)  # in order they are found many times faster
        context = different // 4 * 4
        seen, all_seen = self._between(different, different + 1), self._between(context, context + 4)
        return seen[place], all_seen[place]

    def _between(self, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        return self._before[np.searchsorted(self._words, stop)] - self._before[np.searchsorted(self._words, first)]


def probabilities(
    trained_on: Sequence[np.ndarray], tested_on: Mapping[str, np.ndarray], order: int, priors: Sequence[float]
) -> Iterator[tuple[int, dict[tuple[str, float], np.ndarray]]]:
    """By order k, from 0 on, the probability of each base from the `order` one on; by test sequence and prior.

    So all orders are measured on the same bases. Where one of the k bases before is unknown it is nan.
    """
    strands = both_strands(trained_on)
    found = {(name, prior): np.full(len(bases) - order, 0.25) for name, bases in tested_on.items() for prior in priors}
    for k in range(order + 1):
        counts = Counts(strands, k + 1)
        for name, bases in tested_on.items():
            words = words_of(bases[order - k :], k + 1)
            seen, all_seen = counts.of_bases_and_contexts(words)
            for prior in priors:
                mixed = (seen + prior * found[name, prior]) / (all_seen + prior)
                found[name, prior] = np.where(words < 0, np.nan, mixed)
        yield k, dict(found)


def bits_per_base(probability: np.ndarray) -> float:
    """The mean of minus the binary logarithm, over the bases that have a probability."""
    return float(-np.nanmean(np.log2(probability)))
