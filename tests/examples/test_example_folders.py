"""Every example trains for two steps by its README's command, in a copy of its folder; every other command is parsed."""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import hub_contents
import lightning
import pytest
from cli_runs import done, empty_picture, parse

from benchmarks.examples import EXAMPLES, NAMES, NEEDS, overview, readme_command
from hybrid_lightning.callbacks import hybrid_adapter_setup

SMALL = ["prompts_per_rollout=4", "samples_per_prompt=4", "sampler.max_new_tokens=6", "eval_samples=2"]
OPTIONS = [f"--model.{option}" for option in SMALL]
OPTIONS += [f"--trainer.{option}" for option in ("max_steps=2", "val_check_interval=2", "accelerator=cpu")]
OPTIONS += ["--data.validation_prompts=2", "--adapter.calibration_prompts=4", "--checkpoint.monitor=val/avg@2"]


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A copy of the example's folder, which is the working directory and first on Python's path."""
    here = shutil.copytree(EXAMPLES / request.param, tmp_path / request.param)
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    yield here
    for file in here.glob("*.py"):
        sys.modules.pop(file.stem, None)


def commands(folder: Path) -> list[list[str]]:
    """Every command of the README's shell blocks, in words."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split("&&")]


def skip_without(package: str) -> None:
    pytest.importorskip(package, reason=f"needs {package}, which the example's README says how to install")


CONFIGS = [name for name in NAMES if name != "python_script"]


@pytest.mark.parametrize(("name", "folder"), [(name, name) for name in CONFIGS], indirect=["folder"], ids=CONFIGS)
def test_it_trains(name, folder):
    given = []
    if name == "smollm2_sums":  # a random model stands in for one that takes minutes
        given = [f"--model.model={hub_contents.write_model(folder / 'tiny', 'qwen3')}"]
    elif name in NEEDS:
        skip_without(NEEDS[name])
    done(folder, *readme_command(EXAMPLES / name)[2:], *OPTIONS, *given)
    (run,) = folder.glob("runs/*/version_0")
    assert json.loads((run / "summary.json").read_text())["steps"] == 2 and (run / "report.json").is_file()
    assert run.parent.name in ("textarena_guess", name)


@pytest.mark.parametrize("folder", ["python_script"], indirect=True)
def test_the_script_trains(folder, monkeypatch, capsys):
    small = {"max_steps": 2, "val_check_interval": 2}
    trainer = lightning.Trainer
    monkeypatch.setattr(lightning, "Trainer", lambda **flags: trainer(**{**flags, **small}))
    monkeypatch.setattr(hybrid_adapter_setup, "draw_heatmap", empty_picture)
    monkeypatch.setattr(sys, "argv", ["train.py", "1"])
    code = (folder / "train.py").read_text().replace("(100, 1000, 7)", "(100, 120)").replace("% 10 == 0", "% 2 == 0")
    (folder / "train.py").write_text(code.replace("prompts_per_rollout=32", "prompts_per_rollout=4"))
    runpy.run_path("train.py", run_name="__main__")
    assert re.search(r"^step 2: worked out \d+%, reward 0\.\d\d$", capsys.readouterr().out, re.MULTILINE)
    assert (folder / "runs" / "python_script" / "version_0" / "report.json").is_file()


@pytest.mark.parametrize("folder", NAMES, indirect=True)
def test_every_command_is_one_that_there_is(folder, monkeypatch):
    first = ["python", *readme_command(EXAMPLES / folder.name)]
    assert ["cd", f"examples/{folder.name}"] in commands(folder)
    for words in commands(folder):
        if words[0] not in ("python", "pip", "cd"):
            raise AssertionError(words)
        if words[0] == "python" and words != first:
            package = next((name for name in ("textarena", "textworld", "skyrl_gym") if name in " ".join(words)), None)
            if package is not None:
                skip_without(package)
            parse(words[3:], monkeypatch)


@pytest.mark.parametrize("folder", ["own_rows"], indirect=True)
def test_the_lines_on_the_page_make_the_rows(folder):
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").unlink()
    exec(compile(code, "README.md", "exec"), {})
    assert (folder / "rows.jsonl").read_text() == rows and f"{len(rows.splitlines())} products" in (
        folder / "README.md"
    ).read_text()


def test_each_folder_has_a_page_of_one_screen_a_picture_and_a_line_on_the_page_of_all():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(NAMES)
    assert overview() in (EXAMPLES / "README.md").read_text()
    for name in NAMES:
        text = (EXAMPLES / name / "README.md").read_text()
        assert len(text.splitlines()) <= 60 and "](curve.svg)" in text, name
        assert (EXAMPLES / name / "curve.svg").stat().st_size < 30_000, name
