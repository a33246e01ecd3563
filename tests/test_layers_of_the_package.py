"""A module imports only from the rows above its own, and nothing imports the configs or the experiments."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lss_jax"
ROWS = [
    {"config", "mesh", "layout", "dropout", "tensor_parallel", "hlo", "peers", "sampling", "interrupt"},
    {"rules"},
    {"distributed", "topology", "attention", "embeddings", "checksums", "workdir"},
    {"layers", "global_attention", "cache"},
    {"models", "data", "flax_attention"},
    {"losses", "gradients", "optimizer", "state", "checkpoint", "metrics", "skips", "figures", "profile"},
    {"step", "page", "runs"},
    {"trainer", "cli", "contract", "operations", "memory", "decode"},
    {"by_position"},
    {"train", "evaluate", "generate", "audit", "plan"},
    {"report"},
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from ([node.module] if node.module != "lss_jax" else [f"lss_jax.{a.name}" for a in node.names])


def test_imports_go_up():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if unit == "__init__":
            continue
        seen.add(unit)
        for name in imported(path):
            root, _, rest = name.partition(".")
            assert root not in ("configs", "experiments", "tests"), f"{path} imports {name}"
            other = rest.partition(".")[0]
            if root == "lss_jax" and other != unit:
                assert ROW[other] < ROW[unit], f"{unit} (row {ROW[unit]}) imports {other} (row {ROW[other]})"
    assert seen == set(ROW), "every module has a row"
