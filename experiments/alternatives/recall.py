"""Recall at a controlled distance: what a model still knows of some letters, so many tokens after it has read them.

    python -m experiments.alternatives.recall --out recall.jsonl --count 1000 --distance 1024 --seed 0

Writes a line of JSON per example: the copying memory problem (Hochreiter & Schmidhuber 1997; Arjovsky et al. 2016,
arXiv 1511.06464). Its `prompt` is noise, 64 random letters out of 16, and noise again; its `answer` is the letters once
more, each `distance` bytes after it was read. A model that recalls nothing needs 4 bits for each, and one that recalls
all needs none. Each example is a function of the seed and of its number alone.
"""

import argparse
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

LETTERS, NOISE = string.ascii_lowercase[:16], string.digits
RECALLED = 64  # letters
LEAD = 64  # bytes of noise before them, so that they are not the first tokens, which some masks favour
LARGEST_SEED = 2**32


def length_of(distance: int) -> int:
    """The bytes of an example, prompt and answer."""
    return LEAD + distance + RECALLED


def examples(count: int, seed: int, distance: int) -> Iterator[tuple[str, str]]:
    """Yields prompts and answers.

    Raises:
      ValueError: there are no such examples.
    """
    if count < 1 or not 0 <= seed < LARGEST_SEED:
        raise ValueError(f"count={count}, seed={seed}: give at least 1 example and a seed of 0 to 2**32 - 1")
    if distance < RECALLED:
        raise ValueError(f"distance={distance} is less than the {RECALLED} letters; use {RECALLED} or more")
    for number in range(count):
        source = random.Random(seed * LARGEST_SEED + number)
        letters = "".join(source.choices(LETTERS, k=RECALLED))
        noise = "".join(source.choices(NOISE, k=LEAD + distance - RECALLED))
        yield noise[:LEAD] + letters + noise[LEAD:], letters


def lines(count: int, seed: int, distance: int) -> str:
    """The file of these examples."""
    found = ({"prompt": prompt, "answer": answer} for prompt, answer in examples(count, seed, distance))
    return "".join(f"{json.dumps(example)}\n" for example in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL, written anew")
    parser.add_argument("--count", type=int, default=1000, help="examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distance", type=int, default=1024, help="bytes from a letter to the same one in the answer")
    given = parser.parse_args()
    try:
        text = lines(given.count, given.seed, given.distance)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    given.out.write_text(text)


if __name__ == "__main__":
    main()
