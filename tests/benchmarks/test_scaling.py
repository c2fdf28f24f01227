"""The growth of step time: the measured quantities, the tables of known times, and one small measurement."""

import json
import math
from contextlib import nullcontext
from operator import attrgetter

import pytest

from benchmarks.speed import scaling


def test_what_counts_as_linear_and_as_sublinear():
    series = {one.name: one for one in scaling.all_series(scaling.build_parser().parse_args([]))}
    for name, curve, reached in (
        ("samples", lambda x: 5 + 2 * x, True),
        ("completion", lambda x: x**1.5, False),
        ("completion", lambda x: 1000 - 2 * x, False),
        ("prompt", lambda x: x**0.85, True),
        ("prompt", lambda x: x**0.88, False),
    ):
        one = series[name]
        # A discarded step and three measured ones around the wanted median.
        times = [(1000.0, y, 0.9 * y, 1.2 * y) for y in (curve(float(x)) for x, _ in one.points)]
        result = scaling.summarize(one, [[{"seconds": value} for value in each] for each in times])
        assert result["reached"] == reached
    # By hand, from the logarithms of 8 (prompt + 16) at the ends (48 and 528) and beside the middle (80 and 272).
    assert result["naive_exponent"] == pytest.approx((2 * math.log2(528 / 48) + math.log2(272 / 80)) / 10)
    assert result["exponent"] == pytest.approx(0.88)


def test_one_size_varies_and_all_of_a_series_take_turns_with_the_files_of_their_prompts(capsys, monkeypatch, tmp_path):
    """With measurements that are given; `benchmarks/pairs.py` makes them as for the comparison with TRL."""
    monkeypatch.setattr(scaling, "prepared", lambda loads, plan: nullcontext([load.prompt_tokens for load in loads]))
    turns, sizes_of = [], attrgetter("prompt_tokens", "samples", "max_new_tokens")

    def take_turns(jobs, plan):
        turns.append([sizes_of(workload) for _, workload, _ in jobs])
        assert all(workload.full_length and workload.prompts == 3 for _, workload, _ in jobs)
        assert len({workload.name for _, workload, _ in jobs}) == 3, "or workers would share a log"
        assert all(folder == workload.prompt_tokens for _, workload, folder in jobs) and plan.pairs == 1
        return [], [[{"seconds": 9.0}, {"seconds": 0.5 + sum(sizes_of(workload))}] for _, workload, _ in jobs]

    monkeypatch.setattr(scaling, "take_turns", take_turns)
    sizes = "--completion-tokens 4 8 16 --samples 2 4 6 --prompt-tokens 8 16 32 --fixed 8 2 4 --prompts 3"
    assert scaling.main(f"{sizes} --model embedded --rounds 1 --threads 1 --out {tmp_path}".split()) == 0
    assert turns[0] == [(8, 2, 4), (8, 2, 8), (8, 2, 16)] and turns[1] == [(8, 2, 4), (8, 4, 4), (8, 6, 4)]
    assert turns[2] == [(8, 2, 4), (16, 2, 4), (32, 2, 4)]
    result = json.loads((tmp_path / "scaling.json").read_text())["series"]["prompt"]
    assert result["x"] == [16, 32, 64], "prompt tokens x G"
    assert [seconds["median"] for seconds in result["seconds"]] == [14.5, 22.5, 38.5] and "| 22.50 (" in capsys.readouterr().out
