"""The growth of step time: what the command refuses, what it makes of known times, and one small measurement."""

import json
import math

import pytest
from benchmark_modules import fork_workers, pairs

# isort: split
import commands
import scaling
import scaling_report

SMALL = ["--completion-tokens", "4", "8", "16", "--samples", "2", "4", "6", "--prompt-tokens", "8", "16", "32"]


def series_of(*arguments):
    return {one.name: one for one in scaling.all_series(scaling.parse(arguments))}


@pytest.fixture
def series():
    return series_of(*SMALL, "--fixed", "8", "2", "4", "--prompts", "3")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--prompts", "0"), "--prompts must be at least 1, got 0"),
        (("--fixed", "128", "8", "0"), "--fixed must be at least 1, got 0"),
        (("--fixed", "128", "1", "64"), "--fixed needs at least 2 samples of a prompt, got 1"),
        (("--samples", "1", "2", "3"), "--samples must be at least 2, got 1"),
        (("--completion-tokens", "0", "2", "3"), "--completion-tokens must be at least 1, got 0"),
        (("--completion-tokens", "16", "32"), "--completion-tokens needs at least 3 sizes, all different, smallest first"),
        (("--prompt-tokens", "8", "8", "16"), "--prompt-tokens needs at least 3 sizes, all different, smallest first"),
        (("--samples", "8", "4", "2"), "--samples needs at least 3 sizes, all different, smallest first, got [8, 4, 2]"),
        (("--device", "cuda"), "--device cuda: torch finds no CUDA device"),
    ],
)
def test_impossible_values(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.setattr(commands, "cuda_devices", lambda: 0)
    assert scaling.main(["--model", "embedded", "--out", str(tmp_path / "out"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert expected in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("--round", "2"), ("--fixed", "128", "8"), ("--samples", "few")])
def test_impossible_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        scaling.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_results_cannot_be_written_into_a_file(capsys, tmp_path):
    (tmp_path / "out").write_text("")
    assert scaling.main(["--model", "embedded", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(tmp_path / "out") in said


def sizes(one):
    """Prompt tokens, G and completion tokens at each point."""
    return [(load.prompt_tokens, load.samples, load.max_new_tokens) for _, load in one.points]


def test_one_size_varies_and_completions_have_the_full_length(series):
    assert sizes(series["completion"]) == [(8, 2, 4), (8, 2, 8), (8, 2, 16)]
    assert sizes(series["samples"]) == [(8, 2, 4), (8, 4, 4), (8, 6, 4)]
    assert sizes(series["prompt"]) == [(8, 2, 4), (16, 2, 4), (32, 2, 4)]
    assert [x for x, _ in series["completion"].points] == [4, 8, 16]
    assert [x for x, _ in series["samples"].points] == [2, 4, 6]
    assert [x for x, _ in series["prompt"].points] == [16, 32, 64]  # prompt tokens x G
    assert all(load.full_length and load.prompts == 3 for one in series.values() for _, load in one.points)
    names = [load.name for one in series.values() for _, load in one.points]
    assert len(set(names)) == len(names)  # or workers would share a log


def test_one_folder_for_each_prompt_length(monkeypatch, tmp_path, series):
    asked = []

    def prepare(loads, folder, plan):
        asked.extend(load.prompt_tokens for load in loads)
        return [folder / str(load.prompt_tokens) for load in loads]

    monkeypatch.setattr(scaling, "prepare", prepare)
    plan = pairs.Plan(1, "cpu", 1, 0, ("ours",), tmp_path)
    folders = scaling.prepare_all(list(series.values()), tmp_path, plan)
    assert asked == [8, 16, 32]
    assert folders == {length: tmp_path / str(length) for length in asked}


def test_tokens(series):
    load = series["prompt"].points[2][1]  # P = 3, prompt 32, G = 2, completion 4
    assert scaling_report.naive_tokens(load) == 3 * 2 * (32 + 4)
    assert scaling_report.shared_tokens(load) == 3 * (32 + 2 * 4)


def test_fits_of_known_curves():
    x = [1.0, 2.0, 4.0, 8.0]
    assert scaling_report.line(x, [3 + 2 * v for v in x]) == pytest.approx({"slope": 2, "intercept": 3, "r2": 1})
    # By hand: x and y have means 1 and 2, the sums of products are 2, 2 and 6.
    assert scaling_report.line([0.0, 1.0, 2.0], [1.0, 1.0, 4.0]) == pytest.approx({"slope": 1.5, "intercept": 0.5, "r2": 0.75})
    assert scaling_report.exponent(x, [5 * v**0.7 for v in x]) == pytest.approx(0.7)


def steps(seconds):
    """A discarded step and three measured ones around the wanted median."""
    return [{"seconds": value} for value in (1000.0, seconds, 0.9 * seconds, 1.2 * seconds)]


def summarize(one, curve):
    return scaling_report.summarize(one, [steps(curve(float(x))) for x, _ in one.points])


@pytest.mark.parametrize("name", ["completion", "samples"])
@pytest.mark.parametrize(
    ("curve", "reached"),
    [
        (lambda x: 2 * x, True),
        (lambda x: 5 + 2 * x, True),
        (lambda x: x**1.5, False),
        (lambda x: x**2, False),
        (lambda x: 5 * math.log(x), False),
        (lambda x: 1000 - 2 * x, False),
    ],
)
def test_what_counts_as_linear(name, curve, reached):
    assert summarize(series_of()[name], curve)["reached"] == reached


@pytest.mark.parametrize(("power", "reached"), [(0.4, True), (0.85, True), (0.88, False), (1.0, False), (1.2, False)])
def test_what_counts_as_sublinear(power, reached):
    result = summarize(series_of()["prompt"], lambda x: x**power)
    # By hand, from the logarithms of 8 (prompt + 16) at the ends (48 and 528) and beside the middle (80 and 272).
    assert result["naive_exponent"] == pytest.approx((2 * math.log2(528 / 48) + math.log2(272 / 80)) / 10)
    assert result["exponent"] == pytest.approx(power)
    assert result["reached"] == reached


def test_the_tables_show_them(series):
    curves = {"completion": lambda x: 1 + 0.5 * x, "samples": lambda x: x**2, "prompt": lambda x: 0.25 * x**0.5}
    results = {name: summarize(series[name], curve) for name, curve in curves.items()}
    assert results["completion"]["seconds_median"] == pytest.approx([3.0, 5.0, 9.0])
    text = scaling_report.tables(results)
    rows = [line.split() for line in text.splitlines()]
    assert ["completion", "8", "5.00", "(4.50-6.00)", "96", "72"] in rows
    fits = {line.split("  ")[0]: line for line in text.splitlines()}
    assert fits["completion tokens (G = 2, prompt 8)"].split()[7:11] == ["1.00", "+0.5000", "x", "1.0000"]
    assert fits["completion tokens (G = 2, prompt 8)"].endswith("R^2 >= 0.98, exponent <= 1.1  yes")
    assert fits["G (completion 4, prompt 8)"].endswith("NO")
    assert fits["prompt tokens x G (G = 2, completion 4)"].endswith("exponent < 0.79               yes")
    assert text.endswith("step time grew 2.00 times; the tokens of separate sequences, 3.00 times.")


def test_one_small_measurement_from_beginning_to_end(capsys, monkeypatch, tmp_path):
    fork_workers(monkeypatch)
    all_series = scaling.all_series
    monkeypatch.setattr(scaling, "all_series", lambda parsed: [one for one in all_series(parsed) if one.name == "prompt"])
    arguments = [*SMALL, "--fixed", "8", "2", "4", "--model", "embedded", "--rounds", "1", "--threads", "1"]
    code = scaling.main([*arguments, "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 0, err
    turns = [line.split(",")[0] for line in err.splitlines() if ", warm-up:" in line or ", round " in line]
    assert turns == ["prompt_8", "prompt_16", "prompt_32"] * 2
    written = json.loads((tmp_path / "scaling.json").read_text())
    result = written["series"]["prompt"]
    assert result["x"] == [16, 32, 64]
    for settings, (warm_up, step), seconds in zip(result["settings"], result["steps"], result["seconds_median"], strict=True):
        assert step["lengths"] == [4, 4]
        assert (warm_up["optimizer_steps"], step["optimizer_steps"]) == (1, 2)
        assert seconds == step["seconds"]
        assert f"{seconds:.2f} ({seconds:.2f}-{seconds:.2f})" in out
        assert settings["rank"] == 16
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
