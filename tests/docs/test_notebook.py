"""The notebook, with the parameters of a run that takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples/adapt_blip_to_your_clips.ipynb"
TINY = """
num_stills = 32
num_train_clips, num_val_clips, num_test_clips = 8, 4, 6
still_epochs, clip_epochs = 1, 2
batch_size = 4
device = "cpu"
"""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_is_stored_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.processes
def test_notebook_runs(notebook, tmp_path):
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    parameters.source = TINY
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    printed = "".join(
        output.get("text", "") for c in notebook.cells for output in c.get("outputs", ())
    )
    assert "mean_recall" in printed and "adapter.safetensors" in printed
    pictures = [
        output
        for c in notebook.cells
        for output in c.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3  # curves, and the best matches of two queries
