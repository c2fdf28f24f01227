"""The names that are used of vLLM are in a table; a missing one is reported by name."""

import ast
from pathlib import Path

import pytest

import hybrid_lightning.rollout.vllm as ours
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.vllm import names

COMPLETIONS = "weight_versions in its completions"


def test_all_that_is_imported_of_vllm_is_in_the_table():
    used = names.IN_PROCESS | names.RECEIVER | names.NCCL
    known = {f"{module}.{name.split('.')[0]}" for module, listed in used.items() for name in listed.split()}
    assert set(names.SINCE) <= {f"{m}.{n}" for m, listed in used.items() for n in listed.split()} | {*names.PATHS, COMPLETIONS}
    imported = {
        f"{node.module}.{alias.name}"
        for path in Path(ours.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
        for alias in node.names
    }
    assert imported and imported <= known


@pytest.mark.parametrize(
    ("module", "listed", "missing"),
    [
        ("json", "loads JSONDecoder.decode", None),
        ("json", "loads JSONDecoder.sleep", "json.JSONDecoder.sleep"),
        ("json", "JSONDecode.decode", "json.JSONDecode.decode"),
        ("json.nothing", "loads", "json.nothing.loads"),
    ],
)
def test_a_version_is_refused_by_the_first_name_that_it_does_not_have(module, listed, missing):
    entries = {module: listed}
    if missing is None:
        names.check_names(entries, "9.9", "here")
        return
    with pytest.raises(ConfigError, match=f"^here has vLLM 9.9 without {missing}, which vLLM 0.31 has; install vLLM 0.32$"):
        names.check_names(entries, "9.9", "here")
