"""ListOps as in the Long Range Arena (Tay et al. 2020, arXiv 2011.04006, Sec. 2.2.1): nested operations on digits.

    python -m experiments.alternatives.listops --out listops.jsonl --count 1000 --seed 0

Writes a line of JSON per expression, with its `text` and, as `label`, the digit that is its value. The operations are
those of Nangia & Bowman (2018, arXiv 1804.06028): maximum, minimum, median (rounded down) and sum modulo 10, of up to
10 arguments, nested up to 10 deep; an argument is itself an operation with probability 1/4. Written from the
description. The published files have a word for each of the tokens, as in `[MAX 2 9 [MIN 4 7 ] 0 ]`; here a token is a
byte, so that a sequence is as long as they say: `X29N47]0]`.

Each expression is a function of the seed and of its number alone, so that files of other lengths begin alike. Splits
take other seeds.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "X": max,
    "N": min,
    "D": lambda digits: sum(sorted(digits)[(len(digits) - 1) // 2 : len(digits) // 2 + 1]) // (2 - len(digits) % 2),
    "S": lambda digits: sum(digits) % 10,
}
CLOSE = "]"
NESTED = 0.25  # of the arguments
LARGEST_SEED = 2**32


class Bounds(NamedTuple):
    """What expressions may be like; the Long Range Arena has 500 to 2,000 tokens, and 10 of the others."""

    least: int  # tokens
    most: int
    depth: int
    arguments: int


def expressions(count: int, seed: int, bounds: Bounds) -> Iterator[tuple[str, int]]:
    """Yields expressions and their values.

    Raises:
      ValueError: there are no expressions within the bounds.
    """
    for problem in _problems(count, seed, bounds):
        raise ValueError(problem)
    for number in range(count):
        source = random.Random(seed * LARGEST_SEED + number)
        text, value = _operation(source, bounds, 1)
        while not bounds.least <= len(text) <= bounds.most:
            text, value = _operation(source, bounds, 1)
        yield text, value


def _problems(count: int, seed: int, bounds: Bounds) -> Iterator[str]:
    if count < 1 or not 0 <= seed < LARGEST_SEED:
        yield f"count={count}, seed={seed}: give at least 1 expression and a seed of 0 to 2**32 - 1"
    if bounds.depth < 1 or bounds.arguments < 2:
        yield f"depth={bounds.depth}, arguments={bounds.arguments} make no operation; use at least 1 and 2"
    elif not 4 <= bounds.least <= bounds.most:
        yield f"least={bounds.least}, most={bounds.most} are no bounds on tokens; use 4 <= least <= most"
    elif bounds.least > _longest(bounds):
        yield (
            f"least={bounds.least} tokens is more than the {_longest(bounds)} that depth={bounds.depth} and arguments="
            f"{bounds.arguments} allow; use less, or nest deeper"
        )


def _longest(bounds: Bounds) -> int:
    """Tokens of an expression in which all arguments are operations, down to the last."""
    length = 1
    for _ in range(bounds.depth):
        length = 2 + bounds.arguments * length
    return length


def _operation(source: random.Random, bounds: Bounds, depth: int) -> tuple[str, int]:
    """A random operation with its arguments, and its value; it stops growing where it is too long anyway."""
    name = source.choice(list(OPERATIONS))
    texts: list[str] = []
    values: list[int] = []
    for _ in range(source.randint(2, bounds.arguments)):
        if depth < bounds.depth and source.random() < NESTED and len("".join(texts)) <= bounds.most:
            text, value = _operation(source, bounds, depth + 1)
        else:
            value = source.randrange(10)
            text = str(value)
        texts.append(text)
        values.append(value)
    return f"{name}{''.join(texts)}{CLOSE}", OPERATIONS[name](values)


def lines(count: int, seed: int, bounds: Bounds) -> str:
    """The file of these expressions."""
    found = ({"text": text, "label": str(value)} for text, value in expressions(count, seed, bounds))
    return "".join(f"{json.dumps(expression)}\n" for expression in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL, written anew")
    parser.add_argument("--count", type=int, default=1000, help="expressions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=int, default=500, help="tokens of an expression")
    parser.add_argument("--most", type=int, default=2000)
    parser.add_argument("--depth", type=int, default=10, help="of nested operations")
    parser.add_argument("--arguments", type=int, default=10, help="of an operation")
    given = parser.parse_args()
    try:
        text = lines(given.count, given.seed, Bounds(given.least, given.most, given.depth, given.arguments))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    given.out.write_text(text)


if __name__ == "__main__":
    main()
