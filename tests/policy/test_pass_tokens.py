"""The tokens of a pass that the memory of a device has decided go into checkpoints, so that a resume splits rows alike."""

import pytest
import torch
from tiny_runs import build_adapter, build_data, build_policy, build_trainer, fit, write_model, write_sums

from hybrid_lightning.policy import language, update
from hybrid_lightning.policy.adaptation import CHECKPOINT_KEY

GIB = 2**30


@pytest.fixture
def device(monkeypatch):
    """Lets the CPU be a device with some memory, and chooses tokens by it."""

    def become(memory, tokens):
        monkeypatch.setattr(update, "memory_of", lambda device: memory)
        monkeypatch.setattr(update, "default_token_budget", lambda model, device: tokens)

    return become


@pytest.mark.parametrize(
    ("memory", "taken"), [(80 * GIB, 24), (141 * GIB, 24), (40 * GIB, 12), (None, 12)], ids=["same", "more", "less", "a CPU"]
)
def test_a_resume_takes_those_of_the_checkpoint_where_they_fit(tmp_path, device, monkeypatch, memory, taken):
    model, sums = write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl", 16)
    said = []
    monkeypatch.setattr(update, "rank_zero_info", said.append)
    device(80 * GIB, 24)
    first = fit(model, sums, tmp_path, build_adapter(), max_steps=1)
    path = tmp_path / "first.ckpt"
    first.trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)[CHECKPOINT_KEY]["tokens_of_pass"]
    assert saved == {"tokens": 24, "memory": 80 * GIB}
    device(memory, 12)
    policy = build_policy(model)
    build_trainer(tmp_path, build_adapter(), max_steps=2).fit(policy, datamodule=build_data(sums), ckpt_path=path)
    assert policy.tokens_of_pass == taken
    assert bool(said) == (memory == 40 * GIB) and all("this device has 40 GiB" in line for line in said)


def test_an_option_goes_before_and_a_cpu_keeps_nothing(tmp_path, device):
    model, sums = write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl", 16)
    for memory, options in ((80 * GIB, {"max_tokens_per_micro_batch": 100}), (None, {})):
        device(memory, 24)
        policy = fit(model, sums, tmp_path, build_adapter(), policy=options, max_steps=1)
        policy.trainer.save_checkpoint(tmp_path / "run.ckpt")
        assert "tokens_of_pass" not in torch.load(tmp_path / "run.ckpt", weights_only=True)[CHECKPOINT_KEY]
        assert policy.update.token_budget() == (100 if options else 24)


@pytest.mark.filterwarnings("ignore:two runs with one seed may differ")
@pytest.mark.parametrize(("kind", "told"), [("cpu", []), ("cuda", [False])])
def test_a_run_on_a_gpu_prepares_the_process_before_anything_is_allocated(tmp_path, monkeypatch, kind, told):
    policy = build_policy(write_model(tmp_path / "model"))
    policy._trainer = build_trainer(tmp_path, build_adapter(), max_steps=1)
    monkeypatch.setattr(type(policy.trainer.strategy), "root_device", property(lambda _: torch.device(kind)))
    heard = []
    monkeypatch.setattr(language, "prepare_gpu", lambda own_allocator: heard.append(own_allocator))
    policy.check_settings()
    assert heard == told
