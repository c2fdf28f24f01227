"""The names that are used of vLLM are in a table."""

import ast
from pathlib import Path

import hybrid_lightning.rollout.vllm as ours
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
