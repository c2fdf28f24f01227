import torch
from peft import PeftModel
from tiny_runs import build_adapter, fit

from hybrid_lightning.adapters.scorers import PreconditionedTail
from hybrid_lightning.model import passes
from hybrid_lightning.training.checkpoint import CHECKPOINT_KEY


def test_a_resume_takes_the_tokens_of_a_pass_from_the_checkpoint_where_they_fit(model, sums, tmp_path, monkeypatch):
    """The limits that a device's memory has decided, so that rows are split alike."""
    said, path, gib = [], tmp_path / "first.ckpt", 2**30
    monkeypatch.setattr(passes, "rank_zero_info", said.append)
    monkeypatch.setattr(passes, "accelerator_memory", lambda device: 80 * gib)  # as if the CPU were such a device
    monkeypatch.setattr(passes, "default_token_budget", lambda model, device, beside: 24)
    fit(model, sums, tmp_path, max_steps=1).trainer.save_checkpoint(path)
    monkeypatch.setattr(passes, "default_token_budget", lambda model, device, beside: 12)
    policy = fit(model, sums, tmp_path, ckpt=path, max_steps=2)
    saved = torch.load(path, weights_only=True)[CHECKPOINT_KEY]
    assert policy.task.passes._chosen == 24 and saved["tokens_of_pass"] == {"tokens": 24, "memory": 80 * gib}
    for memory, given, taken in ((141, None, 24), (None, None, 12), (80, 100, 100), (40, None, 12)):
        assert not said
        monkeypatch.setattr(passes, "accelerator_memory", lambda device, memory=memory: memory and memory * gib)
        resumed = passes.Passes(policy.policy, max_tokens=given)
        resumed.restore(saved, policy.device)
        assert resumed.token_budget() == taken, "an option goes before"
        assert bool(resumed.state(policy.device)) == bool(memory and not given), "a CPU and an option keep none"
    assert len(said) == 1 and "this device has 40 GiB" in said[0]


def test_the_tokens_of_a_pass_of_scoring_are_not_those_of_training(model, sums, tmp_path, monkeypatch):
    """While modules are scored there is neither an adapter nor an optimizer, so a pass has more memory."""
    asked = []
    monkeypatch.setattr(
        passes, "default_token_budget", lambda model, device, beside: asked.append(isinstance(model, PeftModel)) or 12
    )
    fit(model, sums, tmp_path, build_adapter(scorer=PreconditionedTail()), max_steps=1)
    assert asked == [False, True]
