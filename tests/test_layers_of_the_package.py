"""Folders import only from folders below them, files of a folder in no circle, and nothing imports configs or tests.

Of the tests: none imports another, and the oracle imports nothing that it judges.
"""

import ast
import graphlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PACKAGE = Path(__file__).parents[1] / "lss_jax"
TESTS = Path(__file__).parent
COMMANDS = "the commands at the top"
FLOORS = [  # from the top
    COMMANDS,
    "reports",
    "inspection",
    "generation",
    "training",
    "huggingface",
    "tasks",
    "models",
    "attention",
    "data",
    "storage",
    "parallel",
    "runtime",
    "config",
]
HEIGHT = {folder: -number for number, folder in enumerate(FLOORS)}
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The modules of the package, and of the project, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in whole}
    return found


def folder_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else COMMANDS


def test_every_folder_has_a_floor():
    assert {folder_of(module) for module in FILES} == set(FLOORS)


def test_folders_import_from_below():
    for module, path in FILES.items():
        if module == "lss_jax":
            continue  # names alone, imported when somebody asks for one
        for name in imported(path):
            assert name.partition(".")[0] not in ("configs", "experiments", "tests"), f"{path} imports {name}"
            here, there = folder_of(module), folder_of(name)
            if name.partition(".")[0] == "lss_jax" and here != there:
                assert HEIGHT[there] < HEIGHT[here], f"{path}, on the floor {here!r}, imports {name}, on {there!r}"


def test_nobody_asks_for_a_strategy_a_family_or_a_task_by_its_name():
    """What each can and needs is declared on it."""
    names = {"lss", "ring", "ulysses", "performer", "longformer", "decoder", "hierarchical", "language_model"}
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.MatchValue):
                asked = names & {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not asked, f"{path}, line {node.lineno}, asks for {asked}"


def test_files_of_a_folder_import_in_no_circle():
    graph = {module: imported(path) & FILES.keys() for module, path in FILES.items() if module != "lss_jax"}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_tests_import_no_other_test():
    for path in TESTS.rglob("*.py"):
        others = {name for name in imported(path) if name.rpartition(".")[2].startswith("test_")}
        assert not others, f"{path} imports {others}: what two tests need lives in a module of its own"


def test_the_oracle_shares_no_code_with_what_it_judges():
    assert {name.partition(".")[0] for name in imported(TESTS / "oracle.py")} == {"jax", "numpy", "typing"}
    assert {name.partition(".")[0] for name in imported(TESTS / "oracle_pairs.py")} == {"jax", "numpy", "oracle"}
