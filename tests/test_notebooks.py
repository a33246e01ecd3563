"""The notebooks run from a clean kernel, and are committed as they ran."""

import nbformat
import pytest

from experiments.notebooks.run import HERE, NOTEBOOKS, executed, faults


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_with_its_outputs(name):
    notebook = nbformat.read(HERE / name, as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook) == []
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_a_clean_kernel(name):
    assert faults(executed(name)) == []
