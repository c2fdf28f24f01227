"""The frontier of the study: its start policies and puzzles, what is claimed, and its page."""

import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from study_records import keep, record
from test_study_runs import task  # noqa: F401  (the fixture)

from benchmarks.study import frontier, pretrain
from benchmarks.study.estimates import holm, p_value
from benchmarks.study.frontier_report import LORA, at_one_size, beside_others, claims_table, line_at, points_of, report
from benchmarks.study.methods import METHODS
from benchmarks.study.policies import POLICY_OF, RECIPES, folder_of
from benchmarks.study.pool import HERE
from benchmarks.study.puzzles import LookUp, Sorting, Tracking
from benchmarks.study.records import Job, load, save
from benchmarks.study.runner import make_run, measure_memory
from benchmarks.study.spread import KeptSpectra, ranks_of
from benchmarks.study.store import Store, read
from hybrid_lightning.adapters.plan import model_digest
from hybrid_lightning.data.arithmetic import hashed_split
from hybrid_lightning.errors import ConfigError


def test_holm_rejects_in_order_and_stops_at_the_first_that_is_not_small_enough():
    """Of four at 5%: the smallest at most 0.0125, the next 0.0167, 0.025, 0.05 (Holm, 1979)."""
    assert holm([0.04, 0.012, 0.016, 0.03]) == [False, True, True, False]
    assert holm([0.013, 0.001, 0.9, 0.0166]) == [True, True, False, True]
    assert holm([]) == []


def test_a_p_value_is_that_of_students_test():
    assert p_value([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.0132, abs=1e-4)  # t = 3 / sqrt(2.5 / 5) = 4.243, 4 degrees
    assert p_value([1.0]) == p_value([0.0, 0.0]) == 1.0 and p_value([2.0, 2.0]) == 0.0


@pytest.mark.parametrize("name", ["own", "own_mlp", "shuffled"])
def test_ranks_by_the_spectra_of_the_runs_own_steps(task, tmp_path, name):  # noqa: F811
    made = load(make_run(Job(task, f"{name}_r4", 1e-2, 0, "frontier", extra_steps=1), tmp_path / "results"))
    budget = 4 * 4 * (4 * (128 + 128) + 3 * (128 + 384))
    assert len(set(made.ranks.values())) > 1 and budget - 512 < made.trainable_parameters <= budget
    assert KeptSpectra.taken() == {}  # nothing is left for the next run
    assert [point["step"] for point in made.curve] == [0, 5]


def test_shuffled_ranks_stay_within_modules_of_one_shape():
    shapes = {f"{n}.{kind}": shape for n in range(8) for kind, shape in (("attn.q", (8, 8)), ("mlp.up", (24, 8)))}
    rng = random.Random(0)
    spectra = {name: sorted((rng.random() ** 4 for _ in range(8)), reverse=True) for name in shapes}
    ranks, shuffled, other = (
        ranks_of(*given) for given in (("own", shapes, 2, spectra), *(("shuffled", shapes, 2, spectra, s) for s in (1, 2)))
    )
    for kind in ("attn.q", "mlp.up"):
        values = [sorted(found[name] for name in shapes if name.endswith(kind)) for found in (ranks, shuffled, other)]
        assert values[0] == values[1] == values[2]
    assert ranks != shuffled != other
    assert shuffled == ranks_of("shuffled", shapes, 2, spectra, 1)


def test_the_peak_of_full_fine_tuning_has_its_weights_gradients_and_moments(task, tmp_path):  # noqa: F811
    peaks = {}
    for method in ("lora_r1", "fft"):
        job = Job(task, method, 1e-2, 0, "frontier")
        measure_memory(job.memory, tmp_path / "results")
        peaks[method] = read(tmp_path / "results" / job.memory.file)["bytes"]
    weights = 4 * (4 * 128 * 128 + 3 * 128 * 384)  # of the embedded policy's candidates; LoRA of rank 1 trains 1% of that
    assert 0.9 < (peaks["fft"] - peaks["lora_r1"]) / (12 * weights) < 1.5


def _points(tmp_path, **accuracies):
    for name, (trained, values) in accuracies.items():
        keep(
            tmp_path,
            *(record(name, seed=seed, purpose="frontier", accuracy=v, trainable=trained) for seed, v in enumerate(values)),
        )
    return points_of(Store(tmp_path), "sums")


def test_a_distance_is_to_the_line_at_the_same_size(tmp_path):
    points = _points(tmp_path, lora_r1=(100, (0.2, 0.3)), lora_r4=(400, (0.4, 0.7)), fft=(6400, (0.8, 0.9)))
    assert line_at(points, LORA, 100) == pytest.approx({0: 0.2, 1: 0.3})
    assert line_at(points, LORA, 200) == pytest.approx({0: 0.3, 1: 0.5})  # half of the way by the logarithm
    assert line_at(points, LORA, 1600) == pytest.approx({0: 0.6, 1: 0.8})
    assert line_at(points, LORA, 99) == line_at(points, LORA, 6401) == {}


def test_methods_that_began_at_different_policies_are_not_compared(tmp_path):
    keep(tmp_path, record("lora_r4", seed=3, purpose="frontier"))
    job, other = record("fft", seed=3, purpose="frontier")
    keep(tmp_path, (job, replace(other, model_digest="abc")))
    with pytest.raises(SystemExit, match=r"seed 3 of sums .* policy abc, and from or for 0: .* another machine"):
        points_of(Store(tmp_path), "sums")


def test_what_a_start_policy_adds_to_all_methods_is_not_in_the_intervals_of_the_figure(tmp_path):
    points = _points(tmp_path, lora_r4=(400, (0.2, 0.5, 0.8)), own_r4=(400, (0.3, 0.61, 0.89)))
    found = beside_others(points)
    assert found["lora_r4"].value == pytest.approx(0.5) and found["own_r4"].value == pytest.approx(0.6)
    assert all(0 < estimate.high - estimate.low < 0.05 for estimate in found.values())


def test_a_method_with_easy_seeds_alone_stands_where_it_would_with_all(tmp_path):
    points = _points(tmp_path, lora_r4=(400, (0.8, 0.5, 0.2)), mlp_r4=(400, (0.8, 0.5, 0.2)), own_r4=(400, (0.9, 0.62)))
    assert beside_others(points)["own_r4"].value == pytest.approx(0.61)
    points = _points(tmp_path / "none", lora_r4=(400, (0.8, 0.5)), own_r4=(400, (0.9, 0.62, 0.3)))
    del points["own_r4"].records[0]  # seeds 0 and 1, 1 and 2
    assert beside_others(points)["own_r4"].value == pytest.approx(0.62)


def test_claims_are_marked_where_holms_correction_leaves_them(tmp_path):
    steady, doubtful = [0.5, 0.52, 0.48, 0.5], [0.5, 0.58, 0.41, 0.53]
    points = _points(
        tmp_path,
        lora_r4=(400, [value - 0.2 - 0.001 * n for n, value in enumerate(steady)]),
        own_r4=(400, steady),
        mlp_r4=(400, doubtful),
    )
    lines = claims_table({"sums": points, "others": points}, {}).splitlines()
    (above,) = [line for line in lines if line.startswith("| own_r4 less lora_r4")]
    (level,) = [line for line in lines if line.startswith("| own_r4 less mlp_r4")]
    assert above.count("**") == 6 and "20.2 [" in above and "**" not in level


def test_a_claim_is_made_on_the_tasks_that_have_its_methods(tmp_path):
    both = _points(tmp_path, lora_r4=(400, (0.3, 0.4)), own_r4=(400, (0.5, 0.62)), mlp_r4=(400, (0.5, 0.61)))
    one = {name: point for name, point in both.items() if name != "mlp_r4"}
    lines = {line.split(" | ")[0]: line for line in claims_table({"sums": both, "others": one, "no": {}}, {}).splitlines()}
    differences, mean = lines["| own_r4 less lora_r4"].split(" | ")[1:4], lines["| own_r4 less lora_r4"].split(" | ")[4]
    assert differences[0] == differences[1] == mean.removesuffix(" |") and differences[2] == "-"
    alone = lines["| mlp_r4 less lora_r4"].split(" | ")[1:]
    assert alone[0].startswith("20.5") and alone[1:] == ["-", "-", "- |"]  # the mean of one task would be a second claim


def test_a_rule_for_rates_stands_beside_the_ratio_that_tuning_chose(tmp_path):
    points = _points(tmp_path, hybrid=(400, (0.4, 0.5)), hybrid_one_rate=(400, (0.6, 0.71)), hybrid_by_width=(400, (0.5, 0.6)))
    ratios = {"sums": {"hybrid_by_width": "hybrid_one_rate"}, "others": {"hybrid_by_width": "hybrid"}}
    table = claims_table({"sums": points, "others": points}, ratios)
    (line,) = [line for line in table.splitlines() if "that tuning chose" in line]
    assert line.startswith("| hybrid_by_width less the fixed ratio that tuning chose | -10.5 [") and "| **10.0 [" in line


def test_all_tasks_stand_beside_each_other_at_the_size_of_a_hybrid(tmp_path):
    points = _points(
        tmp_path,
        lora_r4=(100, (0.1, 0.2)),
        lora_r8=(200, (0.3, 0.4)),
        mlp_r4=(100, (0.2, 0.3)),
        fft=(800, (0.5, 0.6, 0.9)),
        hybrid_10_r8_one_rate=(400, (0.6, 0.7)),
    )
    assert at_one_size({"sums": points, "no": {}}).splitlines()[2:] == ["| sums | 2 | 50 | 15.0 | 45.0 | 45.0 | 65.0 | 55.0 |"]
    assert at_one_size({"sums": {name: point for name, point in points.items() if name != "mlp_r4"}}) == ""


def test_the_default_ratio_is_one_rate_unless_the_policy_is_wider(tmp_path):
    points = _points(
        tmp_path, hybrid_one_rate=(400, (0.6, 0.71)), hybrid=(400, (0.4, 0.5)), hybrid_three_quarters_rate=(400, (0.5, 0.61))
    )
    ratios = {name: {"default ratio": "hybrid"} for name in ("facts", "products_direct")}
    table = claims_table({"facts": points, "products_direct": points}, ratios)
    (line,) = [line for line in table.splitlines() if line.startswith("| default ratio less")]
    assert [cell.strip(" |*").split(" ")[0] for cell in line.split(" | ")[1:]] == ["20.5", "10.5", "15.5"]


def test_the_report_has_every_point_and_a_figure(tmp_path):
    _points(tmp_path, lora_r4=(400, (0.4, 0.5)), own_r4=(410, (0.5, 0.6)), fft=(6400, (0.8, 0.9)))
    report(Store(tmp_path), ["sums", "nothing"], tmp_path / "out")
    page = (tmp_path / "out" / "frontier.md").read_text()
    assert "| own_r4 | 2 | 0.01 | 410 | - | 55.0 [" in page and "## nothing" not in page
    assert (tmp_path / "out" / "frontier_sums.png").stat().st_size > 10_000


def test_methods_of_the_frontier_are_there_and_what_does_not_score_trains_longer():
    assert set(frontier.FRONTIER) <= set(METHODS)
    longer = {name for name in frontier.FRONTIER if frontier.extra_steps(METHODS[name])}
    assert longer == {name for name in frontier.FRONTIER if name.startswith(("lora", "mlp", "fft", "random"))}
    assert frontier.tuned_as("shuffled_r8") == "own_r8" and frontier.tuned_as("own_mlp_r4") == "own_mlp_r4"


def test_a_run_of_the_frontier_needs_its_start_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"wide-7 is not there: run python -m benchmarks.study.pretrain --policy wide --seeds 7"):
        frontier.jobs_of(Store(tmp_path), "tasks/facts.yaml", ["lora"], [7])


def test_a_run_beside_others_needs_the_start_policy_that_they_had(tmp_path, monkeypatch):
    """Seen before it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "wide", replace(RECIPES["wide"], steps=1, batch_size=4))
    for rate in (0.005, 0.01, 0.02):
        keep(tmp_path, *(record("lora", rate, seed, "sweep", accuracy=rate / (1 if rate < 0.02 else 4)) for seed in (1000, 1001)))
    (tmp_path / "sweep" / "sums").rename(tmp_path / "sweep" / "facts")
    pretrain.make("wide", 7, own_folder=True)
    digest = model_digest(AutoModelForCausalLM.from_pretrained(folder_of("wide", 7)))[:16]
    for there, complaint in (
        (digest, nullcontext()),
        ("abc", pytest.raises(SystemExit, match=f"seed 7 of facts .* abc, .* {digest}")),
    ):
        _, made = record("fft", seed=7, purpose="frontier")
        save(replace(made, model_digest=there), tmp_path / "frontier" / "facts" / "fft" / "lr=0.01-seed=7.json")
        with complaint:
            assert [job.seed for job in frontier.jobs_of(Store(tmp_path), "tasks/facts.yaml", ["lora"], [7])] == [7]


def test_a_start_policy_for_each_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "wide", replace(RECIPES["wide"], steps=1, batch_size=4))
    for seed in (3, 4, 3):
        pretrain.make("wide", seed, own_folder=True)
    assert {path.name for path in folder_of("wide").parent.iterdir()} == {"wide-3", "wide-4"}
    assert "wide-3 is there already" in capsys.readouterr().out


def test_a_start_policy_that_has_not_learned_is_drawn_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    losses = iter([2.3, 0.7, 0.7])
    monkeypatch.setattr(pretrain, "answer_loss", lambda *_: next(losses))
    monkeypatch.setitem(RECIPES, "tracker", replace(RECIPES["tracker"], steps=1, batch_size=4))
    pretrain.make("tracker", 3, own_folder=True)
    pretrain.make("tracker", 3, own_folder=True)
    said = capsys.readouterr().out
    assert "tracker-3 has not learned (2.30 nats a token): it is drawn anew" in said and "tracker-3 is there already" in said


def test_a_guess_among_the_states_has_not_learned():
    torch.manual_seed(0)
    recipe = RECIPES["tracker"]
    tokenizer = recipe.tokenizer()
    assert pretrain.answer_loss(recipe.model(tokenizer), tokenizer, recipe) > 2.3 > recipe.learned_below


@pytest.mark.parametrize("name", sorted(POLICY_OF))
def test_every_task_has_a_recipe_that_knows_its_characters(name):
    (path,) = (HERE / "tasks").rglob(f"{name}.yaml")
    config = yaml.safe_load(path.read_text())
    policy = config["model"].get("init_args", config["model"])["model"]
    assert policy == "embedded" or policy.endswith(POLICY_OF[name])
    recipe = RECIPES[POLICY_OF[name]]
    rows = recipe.lines(20, 0).read().train
    assert len(rows) == 20 and all(set(row.question) | set(row.columns["completion"]) <= set(recipe.characters) for row in rows)


@pytest.mark.parametrize("kind", [Tracking, LookUp, Sorting])
def test_puzzles(kind):
    splits = kind(train_size=300, validation_size=20, test_size=20).read()
    assert {len(splits.train), len(splits.validation), len(splits.test)} == {300, 20}
    for split, rows in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        assert all(hashed_split(row.question) == split for row in rows)
    again, other = kind(train_size=300).read().train, kind(table=1, train_size=300).read().train
    assert [row.answer for row in again] == [row.answer for row in splits.train]
    assert sum(row.answer != before.answer for row, before in zip(other, again, strict=True)) > 290
    doubted = kind(train_size=300, doubt=0.5).read().train
    right = sum(row.answer == before.answer for row, before in zip(doubted, again, strict=True))
    assert 10 < right < 220 and [row.question for row in doubted] == [row.question for row in again]
    with pytest.raises(ConfigError, match="doubt=2 must be from 0 to 1"):
        kind(doubt=2)


def test_what_the_puzzles_ask():
    row = Tracking(train_size=1).read().train[0]
    assert len(row.question) == 5 and len(row.answer) == 3 and row.answer.isdigit()
    ways = {}  # each letter is a function of the state, and never leads two states to one
    for row in Tracking(train_size=3000).read().train:
        for before, letter, after in zip(row.question[0] + row.answer, row.question[1:-1], row.answer, strict=False):
            assert ways.setdefault((before, letter), after) == after
    assert all(
        len({after for (_, letter), after in ways.items() if letter == each}) == len([w for w in ways if w[1] == each])
        for each in "abc"
    )
    for row in LookUp(train_size=50).read().train:
        pairs, asked = row.question[1:-1].split(".")
        values = [pairs[pairs.index(name, 0) + 1] for name in asked]
        assert len(row.answer) == 3 and [values[i] == values[j] for i in range(3) for j in range(i)] == [
            row.answer[i] == row.answer[j] for i in range(3) for j in range(i)
        ]
    for row in Sorting(train_size=50).read().train:
        assert sorted(row.answer) == sorted(row.question[1:-1])


def test_the_frontier_is_made_from_the_command_line(tmp_path, monkeypatch, capsys):
    """With no seeds it only writes the page of what is there, and needs no start policy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        ["frontier", "--task", "products", "--seeds", "--records", str(tmp_path / "r"), "--results", str(tmp_path / "out")],
    )
    with pytest.raises(SystemExit, match="no runs of the frontier of products"):
        frontier.main()
    keep(tmp_path / "r", *(record("own_r4", seed=seed, purpose="frontier", accuracy=0.5 + 0.1 * seed) for seed in range(2)))
    (tmp_path / "r" / "frontier" / "sums").rename(tmp_path / "r" / "frontier" / "products")
    frontier.main()
    assert (tmp_path / "out" / "frontier.md").read_text().startswith("# Accuracy against trained parameters")


def test_tuning_seeds_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["frontier", "--seeds", "1000"])
    with pytest.raises(SystemExit, match="by which learning rates are tuned"):
        frontier.main()
