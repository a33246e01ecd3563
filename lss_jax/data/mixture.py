"""Which windows of which sources a batch has: a function of (seed, step) alone, which replays nothing of the past."""

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

BLOCK = 1024  # consecutive training windows of which the sources' shares are kept

Place = tuple[int, int]  # the number of a source, and that of a window in its split


def drawn(step: int, windows: Sequence[int], weights: Sequence[float], *, batch_size: int, seed: int) -> list[Place]:
    """The windows of training step `step`, from sources that have so many `windows` each.

    In every block of 1,024 windows each source has its share by weight (without weights: by size), in random order. A
    source's windows come in its own epochs, each a fresh permutation of all of them.
    """
    shares = tuple(map(Fraction, weights or windows))
    places = []
    for number in range(step * batch_size, (step + 1) * batch_size):
        source_of, turn_of = _block(seed, number // BLOCK, shares)
        source, turn = int(source_of[number % BLOCK]), int(turn_of[number % BLOCK])
        epoch, index = divmod(turn, windows[source])
        places.append((source, int(_permutation(seed, epoch, source, windows[source])[index])))
    return places


def in_order(counts: Sequence[int], *, batch_size: int) -> np.ndarray:
    """The windows of each evaluation batch, `[batches, batch_size, 2]`, for sources that have so many windows each.

    Together they are all windows once. Sources take turns in proportion to their sizes, so that some first batches are
    a sample of all. The last batch is filled with windows behind the end.
    """
    numbers = [np.arange(count) for count in counts]
    places = np.concatenate([np.stack((np.full(len(n), source), n), 1) for source, n in enumerate(numbers)])
    turns = np.concatenate([(n + 0.5) / max(len(n), 1) for n in numbers])
    places = places[np.argsort(turns, kind="stable")]
    missing = -len(places) % batch_size
    behind = np.stack((np.full(missing, len(counts) - 1), counts[-1] + np.arange(missing)), 1)
    return np.concatenate((places, behind)).reshape(-1, batch_size, 2)


def allotted(count: int, shares: Sequence[Fraction]) -> list[int]:
    """How many of the first `count` windows are of each source; none of these numbers ever falls as `count` grows."""
    found, left, rest = [], count, sum(shares)
    for share in shares:
        found.append(int(left * share // rest))
        left, rest = left - found[-1], rest - share
    return found


@functools.lru_cache(maxsize=4)
def _block(seed: int, block: int, shares: tuple[Fraction, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each window of a block, and how many windows of that source came before in the whole run."""
    before, after = (np.array(allotted(blocks * BLOCK, shares)) for blocks in (block, block + 1))
    in_turn = np.repeat(np.arange(len(shares)), after - before)
    source = np.random.default_rng((seed, block, 0, 1)).permutation(in_turn)  # as no permutation of windows is seeded
    turn = np.empty(BLOCK, np.int64)
    for number, first in enumerate(before):
        mine = source == number
        turn[mine] = first + np.arange(np.count_nonzero(mine))
    return source, turn


@functools.lru_cache(maxsize=64)  # two epochs of 32 sources
def _permutation(seed: int, epoch: int, source: int, windows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, source)).permutation(windows)
