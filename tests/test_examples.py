"""The examples in docstrings and in the README are programs, and run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
from helpers import sampled

ROOT = Path(__file__).parents[1]
DOCTESTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "lss_jax").rglob("*.py")
    if ">>> " in path.read_text()
)
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
QUOTED = re.findall(r"```py\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("module", sampled(DOCTESTS, set(DOCTESTS) - {"lss_jax"}))  # it trains, as does test_api.py
def test_examples_of_a_module_print_what_they_say(module):
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert attempted and not failed


def test_recipes_run():
    """All but those for what is not installed by default, which `test_peers` runs."""
    names: dict = {}
    for section in re.split(r"^## ", (ROOT / "docs" / "recipes.md").read_text(), flags=re.MULTILINE):
        if not section.startswith(("Equinox", "Gemma")):
            for program in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
                exec(compile(program, "recipes.md", "exec"), names)
    assert {"q_BLHK", "model", "sharded", "document_BL"} <= set(names)


def test_examples_of_the_readme_run():
    assert PROGRAMS
    for program in PROGRAMS:
        names: dict = {}
        exec(compile(program, "README.md", "exec"), names)
        assert names["losses"][-1] < names["losses"][0]


@pytest.mark.parametrize(
    ("quoted", "path"), [*zip(QUOTED, ("attention/lss.py", "parallel/gradients.py"), strict=True)], ids=["lss", "law"]
)
def test_the_readme_quotes_the_code_as_it_is(quoted, path):
    code = (ROOT / "lss_jax" / path).read_text()
    assert quoted in code
    assert code.count("\n") < 80, "the paper on one screen"


def test_the_readme_stays_short():
    assert len(README.encode()) <= 10 * 1024


def test_what_one_calls_has_an_example():
    assert {
        "lss_jax",
        "lss_jax.storage.workdir",
        "lss_jax.attention.global_attention",
        "lss_jax.attention.flax_attention",
    } <= set(DOCTESTS)
