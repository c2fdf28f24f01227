"""Under DDP every rank quantizes the base for itself, and the run is that of one process."""

import pytest
import torch
from ranks_of_tests import run
from rounding import metrics_of_runs
from runs_of_tests import train
from tiny_runs import write_sums
from wide_models import write_wide_model

from hybrid_lightning.policy.quantization import NF4, Int8

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", [NF4, Int8])
def test_ddp_on_a_quantized_base_is_the_same_run(tmp_path, kind):
    write_wide_model(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl", 24)
    policy = {"quantization": kind(), "lr_full": 0.05, "lr_lora": 0.1}
    (single,) = run(1, tmp_path / "process", train, folder=tmp_path, root=tmp_path / "single", policy=policy)
    ranks = run(2, tmp_path / "ranks", train, folder=tmp_path, root=tmp_path / "ddp", strategy="ddp", devices=2, policy=policy)
    for rank in ranks:
        assert rank["plan"] == single["plan"]
        for one, other in zip(rank["steps"], single["steps"], strict=True):
            assert one == pytest.approx(other, **metrics_of_runs())
        assert rank["weights"].keys() == single["weights"].keys()
        for name, weight in rank["weights"].items():
            torch.testing.assert_close(weight, single["weights"][name], atol=1e-5, rtol=1e-5)
