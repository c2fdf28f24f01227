"""What the package brings: configs by name, in whatever folder a command runs, and the page on what is wrong."""

import pkgutil
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from cli_runs import done, run
from test_imports import FILES

from hybrid_lightning.cli.shipped_configs import FOLDER, config_list, config_names, with_paths
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.reports.findings import SECTIONS
from hybrid_lightning.shared.explain import EXPLAIN, explanation, sections

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a config of the same name as one that is shipped, and another."""
    (tmp_path / "sub").mkdir()
    for name in ("grpo.yaml", "mine.yaml", "sub/dpo.yaml", "sft"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "taken", "shown"),
    [
        ("gspo", FOLDER / "gspo.yaml", "config gspo: shipped with"),
        ("loss/dapo", FOLDER / "loss/dapo.yaml", "config loss/dapo: shipped with"),
        ("configs/gspo.yaml", FOLDER / "gspo.yaml", "config configs/gspo.yaml: shipped with"),
        ("grpo", "grpo.yaml", "config grpo: grpo.yaml in this folder"),
        ("sft", "sft", "config sft: sft in this folder"),
        ("mine", "mine.yaml", "config mine: mine.yaml in this folder"),
        ("grpo.yaml", "grpo.yaml", ""),
        ("sub/dpo.yaml", "sub/dpo.yaml", ""),
        ("nowhere/gspo.yaml", "nowhere/gspo.yaml", ""),
        ("{model: {}}\n", "{model: {}}\n", ""),
    ],
)
def test_a_name_is_a_file_of_the_folder_or_a_shipped_config_and_it_says_which(folder, capsys, given, taken, shown):
    assert with_paths(["fit", "--config", given, f"--config={given}", "--model.name=gspo", "gspo"]) == [
        *("fit", "--config", str(taken), f"--config={taken}", "--model.name=gspo", "gspo")
    ]
    said = capsys.readouterr().err
    assert said.count("\n") == 2 * bool(shown) and shown in said


def test_a_name_of_neither_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no config is called 'loss/dapoo'; did you mean loss/dapo\?"):
        with_paths(["fit", "--config=loss/dapoo"])
    with pytest.raises(ConfigError, match="no config is called 'xyzzy'; the command 'configs' lists"):
        with_paths(["fit", "-c", "xyzzy"])


def test_the_command_lists_all_and_copies_one(folder):
    paths = sorted(path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
    lines = done(folder, "configs").out.splitlines()
    assert lines == config_list().splitlines() and sorted(line.split()[0] for line in lines) == paths == sorted(config_names())
    assert all(10 < len(line.partition(" ")[2].strip()) < 160 for line in lines), lines
    assert done(folder, "configs", "loss/dapo").out == (ROOT / "configs/loss/dapo.yaml").read_text()
    assert "no config is called 'gpso'; did you mean gspo?" in run(folder, "configs", "gpso").err


def test_each_section_on_what_is_wrong_is_printed_without_markup(folder):
    overview = done(folder, "explain").out
    assert "plan --fit prints the fewest options" in overview and f"{EXPLAIN} NAME prints a section" in overview
    named = set(sections()) - {""}
    assert named <= set(re.findall(r"[\w-]+", overview)) and len(named) > 20
    for name in named:
        assert "](" not in (text := explanation(name)) and set(re.findall(r"\(`explain (\S+)`\)", text)) <= named
    said = done(folder, "explain", "a-step-is-too-large").out
    assert said.startswith("A step is too large") and re.search(r"^ 8, 0\.003 \(as shipped\) +0\.18 +92%", said, re.MULTILINE)
    assert not re.search(r"[*`|\[\]]", said) and max(map(len, said.splitlines())) <= 80
    near = "error: no section is called 'a-step-too-large'; did you mean a-step-is-too-large or a-step-is-too-small?"
    assert run(folder, "explain", "a-step-too-large").last.startswith(near)
    assert run(folder, "explain", "memory").last.endswith("; did you mean out-of-memory?")
    assert run(folder, "explain", "xyzzy").last.endswith("; the command 'explain' lists all of them")


def test_messages_name_sections_that_the_package_has_and_no_page_that_it_has_not():
    text = "".join(path.read_text(encoding="utf-8") for path in FILES.values())
    named = re.findall(r"\{EXPLAIN\} ([\w-]+)", text)
    assert len(named) > 1 and {*named, *SECTIONS.values()} <= set(sections()) | {"NAME"}
    assert "troubleshooting.md#" not in text
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hybrid_lightning"]
    assert (
        "troubleshooting.md" in shipped and (FOLDER.parent / "troubleshooting.md").resolve() == ROOT / "docs/troubleshooting.md"
    )


def test_a_command_takes_names(folder):
    printed = yaml.safe_load(done(folder, "fit", "--config", "gspo", "--config=loss/dapo", "--print_config").out)
    assert printed["model"]["init_args"]["loss"]["class_path"].endswith("DAPOLoss")


def test_the_console_script_is_the_command():
    (script,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
    assert script[0] == "hybrid-lightning" and callable(pkgutil.resolve_name(script[1]))
