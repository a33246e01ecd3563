"""Recall at a controlled distance: what a model still knows of one pair, so many tokens before it is asked for it.

    python -m experiments.alternatives.recall --out recall.jsonl --count 1000 --length 2048 --distance 1024 --seed 0

Writes a line of JSON per example. Its `text` is `length` bytes of noise with some pairs of a key and a value in it,
`abc=q;`, and at its end the key of one of them, `?abc=`; its `label` is the value. From the value to the place where it
is asked for are `distance` bytes. The other pairs lie anywhere, with other keys, so that nothing but the key says which
value is meant. A model that recalls nothing is right in 1 of 16 cases.

Each example is a function of the seed and of its number alone.
"""

import argparse
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KEY, VALUES = 3, "abcdefghijklmnop"
PAIR = KEY + 3  # `abc=q;`
QUERY = KEY + 2  # `?abc=`
LARGEST_SEED = 2**32


class Shape(NamedTuple):
    """What every example is like, in bytes, which are tokens."""

    length: int
    distance: int  # from the value to behind the end of the text, where it is asked for
    pairs: int


def examples(count: int, seed: int, shape: Shape) -> Iterator[tuple[str, str]]:
    """Yields texts and the values that are asked for.

    Raises:
      ValueError: there are no such examples.
    """
    for problem in _problems(count, seed, shape):
        raise ValueError(problem)
    for number in range(count):
        yield _example(random.Random(seed * LARGEST_SEED + number), shape)


def _problems(count: int, seed: int, shape: Shape) -> Iterator[str]:
    nearest, farthest = QUERY + 2, shape.length - KEY - 1
    if count < 1 or not 0 <= seed < LARGEST_SEED:
        yield f"count={count}, seed={seed}: give at least 1 example and a seed of 0 to 2**32 - 1"
    if not nearest <= shape.distance <= farthest:
        yield (
            f"distance={shape.distance} does not fit into length={shape.length}; use {nearest} to {farthest}, "
            f"or a longer text"
        )
    room = (shape.length - QUERY) // PAIR - 2  # a pair at any place may lie across two others
    if not 1 <= shape.pairs <= max(room, 1):
        yield f"pairs={shape.pairs} do not fit into length={shape.length}; use 1 to {max(room, 1)}, or a longer text"


def _example(source: random.Random, shape: Shape) -> tuple[str, str]:
    text = source.choices(string.ascii_lowercase, k=shape.length)
    keys: list[str] = []
    while len(keys) < shape.pairs:
        key = "".join(source.choices(string.ascii_lowercase, k=KEY))
        keys += [key] * (key not in keys)
    asked, *others = keys
    start = shape.length - shape.distance - KEY - 1
    value = source.choice(VALUES)
    _put(text, start, f"{asked}={value};")
    offset = start % PAIR  # the others' places, in a grid with the first pair in it
    free = [at for at in range(offset, shape.length - QUERY - PAIR + 1, PAIR) if at != start]
    for at, key in zip(source.sample(free, len(others)), others, strict=True):
        _put(text, at, f"{key}={source.choice(VALUES)};")
    _put(text, shape.length - QUERY, f"?{asked}=")
    return "".join(text), value


def _put(text: list[str], at: int, piece: str) -> None:
    text[at : at + len(piece)] = piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL, written anew")
    parser.add_argument("--count", type=int, default=1000, help="examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=2048, help="bytes of a text")
    parser.add_argument("--distance", type=int, default=1024, help="bytes from a value to where it is asked for")
    parser.add_argument("--pairs", type=int, default=8)
    given = parser.parse_args()
    shape = Shape(given.length, given.distance, given.pairs)
    try:
        lines = [json.dumps({"text": text, "label": value}) for text, value in examples(given.count, given.seed, shape)]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    given.out.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
