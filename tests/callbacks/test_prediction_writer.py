import json
from datetime import date
from decimal import Decimal
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from lightning.pytorch.callbacks import LambdaCallback
from tiny_runs import StartsWithDigit, build_adapter, build_data, build_policy, build_trainer

from hybrid_lightning.callbacks import PredictionWriter
from hybrid_lightning.errors import ConfigError


def predict(model, sums, root, *callbacks, times=1):
    data = build_data(sums, test_fraction=0.5)
    data.eval_batch_size = 5
    trainer = build_trainer(root, build_adapter(), *callbacks)
    for _ in range(times):
        policy = build_policy(model, reward=StartsWithDigit(), eval_samples=3)
        trainer.predict(policy, datamodule=data, return_predictions=False)
    return data


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_test_prompt_has_its_line_and_who_predicts_again_gets_the_same_in_another_file(model, sums, tmp_path, capsys):
    data = predict(model, sums, tmp_path, PredictionWriter(), times=2)
    records, again = (read(tmp_path / "version_0" / f"{name}.jsonl") for name in ("predictions", "predictions-v1"))
    assert records == again
    assert [record["index"] for record in records] == [prompt.index for prompt in data.test_prompts] and len(records) == 12
    for record, prompt in zip(records, data.test_prompts, strict=True):
        assert (record["prompt"], record["answer"]) == (prompt.text, prompt.answer)
        assert record["rewards"] == record["reward_parts"]["starts_with_digit"]
        assert record["rewards"] == StartsWithDigit()(record["completions"], [prompt] * 3) and len(record["rewards"]) == 3
        assert record["correct"] == [value == 1 for value in record["rewards"]]
        greedy = record["greedy"]
        assert [greedy["reward"]] == StartsWithDigit()([greedy["completion"]], [prompt]) and record["columns"] == prompt.columns
    assert f"Predictions written to {tmp_path / 'version_0' / 'predictions.jsonl'}" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_writes_its_own_file_and_refuses_where_one_would(tmp_path, rank):
    writer, folder = PredictionWriter(str(tmp_path / "new" / "folder" / "p.jsonl")), tmp_path / "new" / "folder"
    trainer = SimpleNamespace(fast_dev_run=True, world_size=2, global_rank=rank)
    writer.setup(trainer, None, "predict")
    writer.on_predict_start(trainer, None)
    writer.on_predict_end(trainer, None)
    assert [path.name for path in folder.iterdir()] == [f"p.rank{rank}.jsonl"]
    with pytest.raises(ConfigError, match=rf"predictions\.path: .*p\.rank{rank}\.jsonl exists; give another path, or remove it"):
        writer.setup(SimpleNamespace(fast_dev_run=True, world_size=2, global_rank=1 - rank), None, "predict")
    writer.setup(trainer, None, "fit")


def test_an_interrupted_run_keeps_what_it_has(model, sums, tmp_path):
    stops = LambdaCallback(on_predict_batch_end=Mock(side_effect=RuntimeError("stopped")))
    with pytest.raises(RuntimeError, match="stopped"):
        predict(model, sums, tmp_path, writer := PredictionWriter(), stops)
    assert len(read(tmp_path / "version_0" / "predictions.jsonl")) == 5 and writer._file is None


def test_other_languages_stay_readable_and_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match=r"predictions\.path=.* is a folder; give a file name"):
        PredictionWriter(str(tmp_path))
    writer = PredictionWriter(str(tmp_path / "p.jsonl"))
    trainer = SimpleNamespace(fast_dev_run=True, world_size=1, global_rank=0)
    writer.on_predict_start(trainer, None)
    row = {"prompt": "für 你\u2028\n", "day": date(2026, 1, 2), "scores": np.arange(2), "price": Decimal("1.50")}
    writer.on_predict_batch_end(trainer, None, [row], None, 0)
    writer.on_predict_end(trainer, None)
    content = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert "für 你" in content and json.loads(content) == row | {"day": "2026-01-02", "scores": [0, 1], "price": "1.50"}
