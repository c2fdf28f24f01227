"""The memory that a run reports equals the memory of its tensors."""

import json

import pytest
from tiny_runs import fit, write_wide_model

from hybrid_lightning.model import NF4

pytest.importorskip("bitsandbytes")

from benchmarks.memory import quantization


def test_bytes_of_weights_gradients_and_optimizer(sums, tmp_path):
    wide, reports = write_wide_model(tmp_path / "model"), {}
    for name, kind in (("plain", None), ("nf4", NF4())):
        report = quantization.MemoryReport(str(tmp_path / f"{name}.json"))
        policy = fit(wide, sums, tmp_path, report, policy={"quantization": kind})
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())
    plain, nf4 = reports["plain"], reports["nf4"]
    trained = 4 * policy.plan.trainable_parameters()
    for values in reports.values():
        assert values["trained weights"] == values["gradients"] == trained
        steps = 4 * sum(parameter.requires_grad for parameter in policy.parameters())  # AdamW counts them in float32
        assert values["optimizer state"] == 2 * trained + steps
        # The kernel counts pages in batches of a thread: a peak may be some of them short.
        assert values["peak of training"] + 2**20 >= values["process at start"] > values["frozen weights"]
    quantized = [module.shape[0] * module.shape[1] for module in policy.plan.candidates if module.mode == "lora"]
    # Half a byte instead of four; a byte for each block of 64 and a float for 256 of these; two tables and an offset.
    scales = [size // 64 + 4 * -(-size // 64 // 256) + 4 * (16 + 256 + 1) for size in quantized]
    shared = 4 * (16 + 256) * (len(quantized) - 1)  # the tables may be one for all
    saved = plain["frozen weights"] - nf4["frozen weights"]
    assert sum(quantized) * 3.5 - sum(scales) <= saved <= sum(quantized) * 3.5 - sum(scales) + shared
