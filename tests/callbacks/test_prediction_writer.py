import json
from types import SimpleNamespace

import pytest
from tiny_runs import StartsWithDigit, build_adapter, build_data, build_policy, build_trainer, write_model, write_sums

from hybrid_lightning.callbacks import PredictionWriter
from hybrid_lightning.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("predictions") / "model")


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("predictions") / "sums.jsonl", 24)


def predict(model, sums, root, writer, **flags):
    policy = build_policy(model, reward=StartsWithDigit(), eval_samples=3)
    data = build_data(sums, test_fraction=0.5)
    data.eval_batch_size = 5
    build_trainer(root, build_adapter(), writer, **flags).predict(policy, datamodule=data, return_predictions=False)
    return data


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_test_prompt_has_its_line(model, sums, tmp_path, capsys):
    data = predict(model, sums, tmp_path, PredictionWriter())
    records = read(tmp_path / "predictions.jsonl")
    assert [record["index"] for record in records] == [prompt.index for prompt in data.test_prompts] and len(records) == 12
    for record, prompt in zip(records, data.test_prompts, strict=True):
        assert (record["prompt"], record["answer"]) == (prompt.text, prompt.answer)
        assert record["rewards"] == record["reward_parts"]["starts_with_digit"]
        assert record["rewards"] == StartsWithDigit()(record["completions"], [prompt] * 3) and len(record["rewards"]) == 3
        assert record["correct"] == [value == 1 for value in record["rewards"]]
    assert f"Predictions written to {tmp_path / 'predictions.jsonl'}" in capsys.readouterr().out


def test_the_same_predictions_come_again_and_replace_the_file(model, sums, tmp_path):
    path = tmp_path / "new" / "folder" / "mine.jsonl"
    predict(model, sums, tmp_path, PredictionWriter(str(path)))
    first = read(path)
    predict(model, sums, tmp_path, PredictionWriter(str(path)))
    assert read(path) == first
    assert not (tmp_path / "predictions.jsonl").exists()


def test_an_interrupted_run_keeps_what_it_has(model, sums, tmp_path):
    class Interrupted(PredictionWriter):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
            raise RuntimeError("stopped")

    writer = Interrupted()
    with pytest.raises(RuntimeError, match="stopped"):
        predict(model, sums, tmp_path, writer)
    assert len(read(tmp_path / "predictions.jsonl")) == 5 and writer._file is None


def test_a_trial_run_leaves_no_file(model, sums, tmp_path):
    predict(model, sums, tmp_path, PredictionWriter(), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_other_languages_stay_readable(tmp_path):
    writer = PredictionWriter(str(tmp_path / "p.jsonl"))
    trainer = SimpleNamespace(fast_dev_run=True, log_dir=None, world_size=1)
    writer.on_predict_start(trainer, None)
    writer.on_predict_batch_end(trainer, None, [{"prompt": "für 你\u2028\n"}], None, 0)
    writer.on_predict_end(trainer, None)
    content = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert "für 你" in content and json.loads(content) == {"prompt": "für 你\u2028\n"}


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_writes_its_own_file(tmp_path, rank):
    writer = PredictionWriter(str(tmp_path / "p.jsonl"))
    trainer = SimpleNamespace(fast_dev_run=True, log_dir=None, world_size=2, global_rank=rank)
    writer.on_predict_start(trainer, None)
    writer.on_predict_end(trainer, None)
    assert [path.name for path in tmp_path.iterdir()] == [f"p.rank{rank}.jsonl"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"predictions\.path=.* is a folder; give a file name"):
        PredictionWriter(str(tmp_path))
