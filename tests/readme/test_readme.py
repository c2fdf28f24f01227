"""README and docs: commands parse, examples run, paths and links exist, options and classes are there."""

import importlib.util
import json
import re
import shlex
import sys
import tomllib

import hub_contents
import pages
import pytest
import torch
import yaml
from cli_runs import command, parse
from lightning.pytorch import Trainer
from pages import ALL_PAGES, PAGES, README, ROOT

from hybrid_lightning.rollout.vllm import BACKEND

PARTS = ("loss", "reward", "scorer", "source", "callback")
FILES = {
    "function": "my_reward.py",
    "tool": "my_tools.py",
    "environment": "my_environment.py",
    "agent": "my_agent.py",
    "own_reward": "my_score.py",
}
FILES |= {name: f"{name}.yaml" for name in ("yaml", "own_part_yaml", "mcp", "sets")} | {"own_data_yaml": "mine.yaml"}
SMALL = ["--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0"]
SMALL += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--checkpoint.monitor=null"]
SMALL += ["--model.prompts_per_rollout=4", "--model.samples_per_prompt=4", "--adapter.calibration_prompts=4"]


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
    for name, file in FILES.items():
        (tmp_path / file).write_text(example(name))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("mine", "my_environment", "my_agent"):
        sys.modules.pop(name, None)


# ---- commands


def test_the_two_commands_are_marked_for_those_who_run_them():
    first, test = (re.search(rf"<!-- {name} command -->\n```bash\n(.*)\n```\n", README)[1] for name in ("first", "test"))
    assert first.endswith("-m hybrid_lightning fit --config configs/gspo.yaml") and test.endswith("/bin/pytest -n 4")


def together():
    """The commands with options. Each takes long, so commands of one config with options about different things are joined."""
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
    return [[*head, *options] for head, options, _ in groups if options or "help" in " ".join(head)]


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


def test_every_server_is_started_with_what_a_run_asks_of_it():
    servers = [words for words in pages.shell_commands() if "vllm.entrypoints.openai.api_server" in words]
    assert len(servers) >= 2
    for words in servers:
        options = dict(zip(words, [*words[1:], ""], strict=True))
        assert "VLLM_SERVER_DEV_MODE=1" in words and "--enable-scale-out" in words and options["--host"] == "127.0.0.1"
        assert options["--logprobs-mode"] == "processed_logprobs" and options["--generation-config"] == "vllm"
        assert json.loads(options["--weight-transfer-config"])["backend"] in ("nccl", BACKEND)


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


# Parts of one entry train together, each by the options of its own command.
OWN = [("mine.", PARTS, 10), ("my_reward.py:", ("function",), 10), ("my_tools.py:", ("tool",), 20)]
OWN += [("my_environment.", ("environment",), 20), ("my_agent.py:", ("agent",), 12)]


@pytest.mark.parametrize(("file", "names", "most"), OWN, ids=lambda value: value if isinstance(value, str) else None)
def test_parts_of_ones_own_have_few_lines_and_train(file, names, most, here, monkeypatch):
    arguments, titles = [], []
    for name in names:
        assert len([line for line in example(name).splitlines() if line.strip()]) <= most
        titles.append(file + re.search(r"^(?:class|async def|def) (\w+)", example(name), re.MULTILINE)[1])
        (found,) = [each for each in pages.commands() if any(re.search(rf"\b{titles[-1]}\b", word) for word in each)]
        arguments += [word for word in found if word not in arguments]
    few = [] if "source" in names else ["--data.source.train_size=50"]
    command([*arguments, *SMALL, *few], monkeypatch)
    (saved,) = here.glob("runs/*/*/config.yaml")
    assert all(title in saved.read_text() for title in titles)
    assert names != ("function",) or re.search(r"arguments:\n +tolerance: 5\.0\n", saved.read_text())
    summary = json.loads(saved.with_name("summary.json").read_text())
    assert summary["steps"] == 1 and summary["full_modules"]


def test_data_and_reward_on_the_first_page_have_few_lines_and_train(here, monkeypatch):
    for name in ("own_data_yaml", "own_reward"):
        assert len([line for line in example(name).splitlines() if line.strip()]) <= 10
    rows = [{"question": f"How much is {number} + 5?", "answer": str(number + 5)} for number in range(60)]
    (here / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny = hub_contents.write_model(here / "tiny", "qwen3")
    words = next(words for words in pages.commands() if "mine.yaml" in words)[1:]
    few = [f"--model.model={tiny}", "--model.dtype=float32", "--trainer.precision=32-true", "--adapter.scorer=Random"]
    command(["fit", *words, *SMALL, *few], monkeypatch)
    (saved,) = here.glob("runs/your_data/*/config.yaml")
    assert "my_score.py:closeness" in saved.read_text() and "4 + 5" in saved.read_text()
    assert json.loads(saved.with_name("summary.json").read_text())["steps"] == 1


def test_the_configs_on_top_of_another_train(here, monkeypatch):
    configs = ("configs/gspo.yaml", "yaml.yaml", "own_part_yaml.yaml")
    command(["fit", *(f"--config={name}" for name in configs), *SMALL, "--data.source.train_size=50"], monkeypatch)
    (saved,) = here.glob("runs/*/*/config.yaml")
    assert "FormatReward" in saved.read_text() and "mine.CappedLoss" in saved.read_text()
    assert saved.with_name("summary.json").is_file()


def test_tools_of_a_server_and_environments_of_sets_train_over_a_config(here, monkeypatch):
    """Twenty of the rows on the page, with numbers of their own."""
    pytest.importorskip("mcp", reason="needs mcp: pip install 'hybrid-lightning[mcp]'")
    tiny = hub_contents.write_model(here / "tiny", "qwen3")
    started = shlex.join([sys.executable, "-S", str(ROOT / "tests" / "environments" / "mcp_server.py")])
    code = (here / "mcp.yaml").read_text()
    (here / "mcp.yaml").write_text(code.replace("command: uvx mcp-server-time", f"command: {started}"))
    steps = [*SMALL, "--trainer.max_steps=2", "--adapter.scorer=Random"]
    few = [f"--model.model={tiny}", "--model.dtype=float32", "--trainer.precision=32-true", "--model.sampler.max_new_tokens=6"]
    for name, config, options in (("mcp", "qwen3", few), ("sets", "tools", [])):
        rows = [json.loads(row) for row in re.findall(r"^#   (\{.*\})$", example(name), re.MULTILINE)]
        rows = [{**row, "question": f"{row['question']}{number}"} for number in range(10) for row in rows]
        (here / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command(["fit", f"--config=configs/{config}.yaml", f"--config={name}.yaml", *steps, *options], monkeypatch)
        (saved,) = (here / "runs" / config).glob("*/summary.json")
        assert json.loads(saved.read_text())["steps"] == 2
    assert re.search(r"tools_column: tools\n", saved.with_name("config.yaml").read_text())


def names_of(code, steps=1):
    """The names that a page's code leaves, after this many steps on a CPU."""
    code = re.sub(r"max_steps=\d+", f"max_steps={steps}, accelerator='cpu', enable_progress_bar=False", code)
    names = {"__name__": "example"}
    exec(compile(code, "example.md", "exec"), names)
    return names


def test_the_python_example_trains_saves_and_loads(here, capsys):
    code = example("python").replace("_per_rollout=2,", "_per_rollout=2, prompts_per_rollout=4, eval_samples=2,")
    names = names_of(code.replace("rank=8", "rank=8, calibration_prompts=4").replace("Source()", "Source(train_size=50)"))
    assert len(names["policy"].plan.full_modules) == 3
    assert re.search(r"^\('(\[[\d ]*\])?\d+',\)$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", ["rows", "own_data"])
def test_rows_functions_and_data_modules_of_ones_own_train(name, here):
    small = "lr_lora=3e-3, prompts_per_rollout=4, samples_per_prompt=4, eval_samples=1"
    names = names_of(example(name).replace("lr_lora=3e-3", small).replace("(100, 140)", "(100, 110)"))
    assert (
        names["policy"].plan.full_modules and names["policy"].evaluation.last[""]["problems"] == {"rows": 8, "own_data": 20}[name]
    )


def test_the_module_that_is_not_a_policy_is_adapted(here, capsys):
    torch.manual_seed(0)
    names = names_of(example("adaptable"), steps=2)
    assert names["module"].plan.full_modules and str(names["module"].plan.full_modules) in capsys.readouterr().out


def test_the_folder_for_a_server_has_the_model_and_no_weights(here):
    names_of(re.sub(r"resolve_model\(.*\)", 'resolve_model("embedded")', example("served")))
    names = {path.name for path in (here / "served").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".bin"))]
    assert json.loads((here / "served" / "config.json").read_text())["hidden_size"] > 0


def test_every_python_and_yaml_block_is_run():
    marked = sum(len(re.findall(r"^<!-- run: \w+ -->\n```(?:python|yaml)$", text, re.MULTILINE)) for text in PAGES.values())
    there = sum(len(pages.blocks(language, text)) for text in PAGES.values() for language in ("python", "yaml"))
    assert marked == there - 1, "all but the reference's, which its test reads"
    assert pages.examples().keys() == {
        *PARTS,
        *FILES,
        "python",
        "rows",
        "own_data",
        "adaptable",
        "served",
        "text_part",
        "estimator",
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
    pattern = r"(?<![\w/.])(?:hybrid_lightning|callbacks|configs|examples|results|tests|benchmarks|docs|\.ci)/[\w./-]*\w/?"
    named = {(page, path) for page, text in ALL_PAGES.items() for path in re.findall(pattern, text)}
    assert len(named) > 50
    missing = sorted((page, path) for page, path in named if not path.startswith("docs/_build") and not (ROOT / path).exists())
    assert not missing, f"pages name what is not there: {missing}"


def test_the_tree_of_the_architecture_has_every_room_and_nothing_that_is_not_there():
    named = {entry.rstrip("/") for entry in pages.tree("docs/architecture.md")}
    assert not [entry for entry in named if not (ROOT / entry).exists()]
    rooms = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "hybrid_lightning").glob("*/__init__.py")}
    assert len(rooms) > 10 and rooms <= named


def test_the_first_run_takes_the_same_time_on_every_page():
    texts = [README, PAGES["docs/quickstart.md"], *((ROOT / "configs" / f"{name}.yaml").read_text() for name in ("gspo", "grpo"))]
    found = [re.findall(r"(?:in|about) (\d+) seconds", text) for text in texts]
    assert all(map(len, found)) and len({number for numbers in found for number in numbers}) == 1


def test_readme_and_changelog_are_short():
    assert len(README.splitlines()) <= 150
    assert len((ROOT / "CHANGELOG.md").read_text().splitlines()) <= 60


def test_the_examples_have_the_numbers_of_their_own_page():
    here, there = (
        dict(re.findall(r"^\| \[\w+\]\((?:examples/)?(\w+)/README\.md\) \| [^|]* \| ([^|]*) \|", text, re.MULTILINE))
        for text in (README, (ROOT / "examples" / "README.md").read_text())
    )
    assert len(here) == 8 and here == there


def test_badges_show_what_the_project_has():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=") + "+"
    for name, value in {"license": project["license"], "python": python, "version": project["version"]}.items():
        badge = (ROOT / "docs" / "static" / f"{name}.svg").read_text()
        assert f'aria-label="{name}: {value}"' in badge and badge.count(f">{value}</text>") == 1
        assert f"(docs/static/{name}.svg)" in README
    assert f"![Version: {project['version']}]" in README


# ---- options, classes, defaults


def test_the_reference_is_what_signatures_and_docstrings_say(generate):
    stale = [name for name, make in generate.PAGES.items() if PAGES[f"docs/reference/{name}"] != make()]
    assert not stale, f"{stale}: run python docs/generate.py"
    unexplained = re.findall(r"^- \*\*.*\): (?:Not described|(?:As in|See) `|.{0,7}$).*", PAGES[pages.GENERATED[1]], re.MULTILINE)
    assert not unexplained, "\n".join(unexplained)


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


def test_files_for_others_can_be_read_and_name_one_version_and_no_place_that_is_not_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    flow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert [step["run"].split()[0] for step in flow["jobs"]["check"]["steps"] if "run" in step] == [".ci/run"]
    forms = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")]
    assert len(forms) == 2 and all(form["name"] and form["description"] and form["body"] for form in forms)
    docs = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())
    assert (ROOT / docs["sphinx"]["configuration"]).is_file()
    extras = re.findall(r"/source\[(.*)\]", (ROOT / "Dockerfile").read_text())[0].split(",")
    assert {*extras, *docs["python"]["install"][0]["extra_requirements"]} <= project["optional-dependencies"].keys()
