"""The generators of tasks for the alternatives: what is asked is what is answered, and a seed gives one file."""

import json
import re
import statistics
import subprocess
import sys
from itertools import islice

import pytest

from experiments.alternatives.listops import Bounds, expressions
from experiments.alternatives.recall import examples, length_of

BOUNDS = Bounds(least=50, most=200, depth=5, arguments=6)


def value_of(text: str) -> tuple[int, str]:
    """The value of the first expression of a text, and what follows it: by recursion, from the definition."""
    if text[0].isdigit():
        return int(text[0]), text[1:]
    name, rest, values = text[0], text[1:], []
    while rest[0] != "]":
        value, rest = value_of(rest)
        values.append(value)
    results = {"X": max(values), "N": min(values), "D": int(statistics.median(values)), "S": sum(values) % 10}
    return results[name], rest[1:]


def depth_of(text: str) -> int:
    depth = deepest = 0
    for token in text:
        depth += (token in "XNDS") - (token == "]")
        deepest = max(depth, deepest)
    return deepest


def test_expressions_have_their_values_and_stay_within_their_bounds():
    found = list(expressions(300, 0, BOUNDS))
    for text, value in found:
        assert value_of(text) == (value, "")
        assert 50 <= len(text) <= 200 and 1 <= depth_of(text) <= 5
    assert {value for _, value in found} == set(range(10))
    assert set("".join(text for text, _ in found)) == set("XNDS]0123456789")
    assert max(depth_of(text) for text, _ in found) == 5


def test_expressions_as_long_as_those_of_the_long_range_arena():
    for text, value in expressions(3, 7, Bounds(500, 2000, 10, 10)):
        assert 500 <= len(text) <= 2000 and value_of(text) == (value, "")


@pytest.mark.parametrize("distance", [64, 123, 1000])
def test_an_answer_is_what_was_read_at_its_distance(distance):
    for prompt, answer in examples(50, 0, distance):
        text = prompt + answer
        assert len(text) == length_of(distance) and text[-64:] == answer == text[-64 - distance : -distance]
        assert re.fullmatch(r"[0-9]{64}[a-p]{64}[0-9]*", prompt)
    assert set("".join(answer for _, answer in examples(50, 0, distance))) == set("abcdefghijklmnop")


@pytest.mark.parametrize("generate", [lambda n, s: expressions(n, s, BOUNDS), lambda n, s: examples(n, s, 123)])
def test_a_seed_gives_one_file_and_a_longer_one_begins_alike(generate):
    assert list(generate(5, 3)) == list(islice(generate(50, 3), 5))
    assert not set(generate(50, 3)) & set(generate(50, 4))


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        (lambda: expressions(1, 0, BOUNDS._replace(depth=0)), "depth=0, arguments=6 make no operation; use at least 1"),
        (lambda: expressions(1, 0, BOUNDS._replace(least=300)), "least=300, most=200 are no bounds on tokens"),
        (lambda: expressions(1, 0, Bounds(50, 60, 1, 5)), "least=50 tokens is more than the 7 that depth=1 and"),
        (lambda: expressions(0, 0, BOUNDS), "count=0, seed=0: give at least 1 expression"),
        (lambda: examples(1, 0, 63), "distance=63 is less than the 64 letters; use 64 or more"),
        (lambda: examples(1, -1, 123), "count=1, seed=-1: give at least 1 example and a seed"),
    ],
)
def test_what_cannot_be_is_one_line(generate, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        next(generate())


def test_the_command_writes_jsonl(tmp_path):
    out = tmp_path / "recall.jsonl"
    arguments = ["--out", str(out), "--count", "3", "--distance", "70"]
    subprocess.run([sys.executable, "-m", "experiments.alternatives.recall", *arguments], check=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["prompt"], line["answer"]) for line in lines] == list(examples(3, 0, 70))
