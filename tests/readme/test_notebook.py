"""The notebook runs, on a quiet screen, with the run folder of the command line."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from pages import ROOT

# Advice, tables of modules, and bars: a notebook would keep them.
NOISE = re.compile(r"\bTips?\b|FLOPs|Params|Warning|Seed set|Loading weights|it/s|━ ")
FILES = {
    *("plan.json", "plan.png", "summary.json", "evaluation.json", "hparams.yaml"),
    *("checkpoints/last.ckpt", "checkpoints/step=2.ckpt", "exported/model.safetensors"),
}


@pytest.mark.long
def test_the_notebook_runs_and_is_quiet(tmp_path):
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "what is committed has no outputs"
    for cell in cells:  # a shorter run
        cell.source = re.sub(r"max_steps=\d+", "max_steps=2", cell.source)
        cell.source = re.sub(r"(prompts_per_rollout|calibration_prompts|validation_prompts)=\d+", r"\1=8", cell.source)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    outputs = [output for cell in cells for output in cell.outputs]
    shown = ["".join(output.get("text") or output.data.get("text/plain", "")) for output in outputs]
    noise = [text for text in shown if NOISE.search(text)]
    assert not noise, noise
    assert len(outputs) < 25 and not any("widget" in kind for output in outputs for kind in output.get("data", {}))
    assert [text.partition(":")[0] for text in shown if text.startswith("Step ")] == ["Step 2/2"], "one line, which changes"
    assert any(text.startswith("Verdict:") for text in shown)
    run = tmp_path / "runs" / "default" / "version_0"
    assert {str(Path(path).relative_to(run)) for path in run.rglob("*") if path.is_file()} >= FILES
