"""Executes the notebooks, each from a clean kernel and in a copy of the checkout.

    python -m experiments.notebooks.run           # fails at the first error
    python -m experiments.notebooks.run --write   # also writes the outputs here

Takes three to four minutes on two cores. The copy has only the files under version control, so that a notebook finds no
earlier run and leaves none behind.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NOTEBOOKS = ("tour.ipynb", "your_text.ipynb")
LIMIT = 1_000_000  # bytes per notebook with its outputs
SETTINGS = ("JAX_", "XLA_", "TF_")  # environment variables that a reader's kernel would not have


def executed(name: str) -> nbformat.NotebookNode:
    """The notebook with its outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(HERE / name, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        copy = checkout(Path(folder) / "lss_jax")
        place = {"metadata": {"path": str(copy / HERE.relative_to(ROOT))}}
        clean = {key: value for key, value in os.environ.items() if not key.startswith(SETTINGS)}
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place, record_timing=False)
        client.execute(env=clean)
    notebook.metadata.pop("kernelspec", None)  # its name differs between machines
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def checkout(folder: Path) -> Path:
    """A copy of the files under version control, as they are now."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in names.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """The faults for which a notebook is not to be published."""
    text, cells = nbformat.writes(notebook), [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    counts = [cell.execution_count for cell in cells]
    places = (sys.prefix, str(ROOT), str(Path.home()), tempfile.gettempdir())
    found = [f"a path of this machine: {place}" for place in places if f"{place}/" in text]
    found += [f"text on stderr: {output.text}" for output in outputs if output.get("name") == "stderr"]
    found += [f"an error: {output.evalue}" for output in outputs if output.output_type == "error"]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"not executed from a clean kernel, in order: {counts}")
    if len(text) > LIMIT:
        found.append(f"{len(text):,} bytes, more than {LIMIT:,}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute the notebooks from a clean kernel.", allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="write the notebooks with their outputs")
    arguments = parser.parse_args()
    for name in NOTEBOOKS:
        notebook = executed(name)
        if problems := faults(notebook):
            print(f"{name}: ", *problems, sep="\n  ", file=sys.stderr)
            return 1
        if arguments.write:
            nbformat.write(notebook, HERE / name)
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
