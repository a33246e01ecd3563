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


def words_before(stop: int, bases: np.ndarray, length: int) -> np.ndarray:
    """The word of so many bases that ends before a place, or none."""
    return words_of(bases[max(stop - length, 0) : stop], length)


class Counts:
    """How often each word of so many bases occurs in some sequences; -1 is none."""

    def __init__(self, sequences: Sequence[np.ndarray], length: int):
        self._sequences, self._length = sequences, length
        words = np.sort(np.concatenate([words_of(bases, length) for bases in sequences]))
        self._set(words, np.ones(len(words), np.int64))

    def _set(self, words: np.ndarray, counts: np.ndarray) -> None:
        """Takes words in their order, of which some may be equal."""
        words, counts = words[words >= 0], counts[words >= 0]
        firsts = np.flatnonzero(np.diff(words, prepend=-1))
        self._words = words[firsts]
        self._before = np.append(0, np.cumsum(np.add.reduceat(counts, firsts)))  # of the words before each

    def shorten(self) -> None:
        """Goes on to the words that are a base shorter, which is much faster than to count them anew.

        They are the beginnings of the longer ones; and, before an unknown base or an end, of none.
        """
        self._length -= 1
        stops = [(np.append(np.flatnonzero(bases == UNKNOWN), len(bases)), bases) for bases in self._sequences]
        last = [words_before(int(stop), bases, self._length) for places, bases in stops for stop in places]
        ends, words, counts = np.concatenate(last), self._words // 4, np.diff(self._before)
        places = np.searchsorted(words, ends)
        self._set(np.insert(words, places, ends), np.insert(counts, places, 1))

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
    counts, counted = Counts(both_strands(trained_on), order + 1), {}
    for k in range(order, -1, -1):
        for name, bases in tested_on.items():
            words = words_of(bases[order - k :], k + 1)
            counted[k, name] = words < 0, *counts.of_bases_and_contexts(words)
        if k:
            counts.shorten()
    found = {(name, prior): np.full(len(bases) - order, 0.25) for name, bases in tested_on.items() for prior in priors}
    for k in range(order + 1):
        for name, prior in found:
            unknown, seen, all_seen = counted[k, name]
            mixed = (seen + prior * found[name, prior]) / (all_seen + prior)
            found[name, prior] = np.where(unknown, np.nan, mixed)
        yield k, dict(found)


def bits_per_base(probability: np.ndarray) -> float:
    """The mean of minus the binary logarithm, over the bases that have a probability."""
    return float(-np.nanmean(np.log2(probability)))
