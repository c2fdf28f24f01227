"""Calibration losses: the mean of their gradients is the gradient of the loss on all calibration rollouts."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_model, plain_distribution, plain_logprobs
from tiny_runs import Constant, DigitShare, Failing, Interrupted, build_data, build_policy, build_trainer

from hybrid_lightning.data import FileSource, PlainFormat, PromptDataModule
from hybrid_lightning.errors import CalibrationError, ConfigError
from hybrid_lightning.losses import BNPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss
from hybrid_lightning.rollout.batching import join_rollouts, pad_left, pad_right
from hybrid_lightning.rollout.sampler import Sampler
from hybrid_lightning.types import Sequences

TEMPERATURE = 0.8


class HalfEqual(DigitShare):
    """All rewards of every other problem are equal, so that rows without advantage are left out."""

    def __call__(self, completions, prompts):
        values = super().__call__(completions, prompts)
        return [value if prompt.index % 2 else 0.5 for value, prompt in zip(values, prompts, strict=True)]


def calibrate(model, sums, prompts=8, data=None, **arguments):
    """The policy, its rollouts, and the calibration losses; the policy's weights want gradients."""
    settings = {"sampler": Sampler(6, temperature=TEMPERATURE), "max_tokens_per_micro_batch": 40}
    policy = build_policy(model, **{**settings, **arguments})
    policy._device = torch.device("meta")  # scoring is where the model is: Lightning has not moved the module itself yet
    policy.policy.load()
    trainer = build_trainer(model.parent)
    data = data or build_data(sums)
    policy.trainer = trainer
    trainer.datamodule, data.trainer = data, trainer
    rollouts = []
    generate = policy.task.generation.generate

    def listen(*args, **kwargs):
        rollouts.append(generate(*args, **kwargs))
        return rollouts[-1]

    policy.task.generation.generate = listen
    losses = policy.calibration_losses(prompts)
    policy.model.requires_grad_(True)
    return policy, join_rollouts(rollouts), losses


def mean_gradient(policy, losses):
    policy.model.zero_grad()
    values = [float(loss.detach()) for loss in losses if loss.backward() is None]
    assert len(values) == len(losses)
    return {name: p.grad / len(values) for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "loss",
    [GRPOLoss(kl_coef=0.1), GSPOLoss(), DAPOLoss(entropy_coef=0.3), DrGRPOLoss(), BNPOLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_rewards_give_the_policy_gradient_at_the_start_policy_of_what_was_sampled_and_counts(model, sums, loss):
    """At the start the ratio is 1, and its gradient equals the log-probability's. The KL term has no gradient."""
    options = {"kind": Failing, "sampler": Interrupted(6, temperature=TEMPERATURE), "max_tokens_per_micro_batch": 20}
    options["mask_truncated_completions"] = masked = type(loss) in (GRPOLoss, DAPOLoss)
    policy, rollouts, losses = calibrate(model, sums, loss=loss, reward=HalfEqual(), **options)
    base, terms, tokens, useful = build_model("llama", std=0.1).requires_grad_(True), [], 0, 0
    kept = rollouts.finished.flatten() | (not masked)
    assert masked != bool(kept.all())
    for number, prompt in enumerate(rollouts.prompts):
        group = [4 * number + row for row in range(4) if (prompt.index + row) % 4]
        rewards = torch.tensor(HalfEqual()([rollouts.completions[row] for row in group], [prompt] * 3))
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for row, advantage in zip(group, advantages, strict=True):
            if kept[row]:
                useful += loss.needs_entropy or bool(advantage)
                logprobs = plain_distribution(base, rollouts.sequences, row, TEMPERATURE)
                sampled = [place for place in range(len(logprobs)) if place % 3 != 1]
                of_row = advantage * plain_logprobs(base, rollouts.sequences, row, TEMPERATURE)[sampled]
                tokens += len(sampled)
                entropies = -(logprobs.exp() * logprobs).sum(-1)[sampled]
                of_row = of_row.mean() if type(loss) in (GRPOLoss, GSPOLoss) else of_row.sum()
                terms.append(of_row + loss.entropy_coef * entropies.sum())
    count = {GRPOLoss: 24, GSPOLoss: 24, DrGRPOLoss: 6 * 24}.get(type(loss), tokens)
    assert len(losses) > 2
    assert losses.info == {"signal": "reward", "sequences": 32, "useful_sequences": useful, "prompts": 8}
    assert_same_gradient(mean_gradient(policy, losses), -sum(terms) / count, base)


def assert_same_gradient(gradient, loss, model):
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradient.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, atol=1e-5 * scale, rtol=1e-4, msg=name)


def test_calibration_rollouts_are_the_seeds_and_take_nothing_from_training(model, sums):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _, first, _ = calibrate(model, sums)
    assert torch.equal(torch.get_rng_state(), before)
    _, again, _ = calibrate(model, sums)
    _, other, _ = calibrate(model, sums, seed=1)
    assert first.completions == again.completions and first.prompts == again.prompts
    assert first.prompts != other.prompts and len({prompt.index for prompt in first.prompts}) == 8
    _, every, _ = calibrate(model, sums, prompts=1000)
    assert sorted(prompt.index for prompt in every.prompts) == list(range(16)), "where fewer are there than asked for"


def test_where_all_rewards_are_equal_the_answers_are_trained_on(model, sums):
    policy, rollouts, losses = calibrate(model, sums, reward=Constant())
    assert losses.info == {"signal": "answers", "sequences": 8, "useful_sequences": 8, "prompts": 8}
    base = build_model("llama", std=0.1).requires_grad_(True)

    texts = [policy.tokenizer(prompt.text).input_ids for prompt in rollouts.prompts]
    answers = [[*policy.tokenizer(prompt.answer).input_ids, 2] for prompt in rollouts.prompts]
    sequences = Sequences(*pad_left(texts, 0, "cpu"), *pad_right(answers, 0, "cpu"))
    total = -sum(plain_logprobs(base, sequences, row, TEMPERATURE).mean() for row in range(8)) / 8
    assert_same_gradient(mean_gradient(policy, losses), total, base)


def test_neither_rewards_nor_answers_is_an_error_nor_is_there_anything_without_prompts(model, tmp_path):
    (tmp_path / "open.jsonl").write_text("\n".join(f'{{"question": "{i}?"}}' for i in range(16)))
    data = PromptDataModule(FileSource(str(tmp_path / "open.jsonl"), answer_column=None), PlainFormat())
    with pytest.raises(CalibrationError, match=r"all rewards of the 8 calibration prompts .* or give adapter\.plan"):
        calibrate(model, None, data=data, reward=Constant())
    with pytest.raises(ConfigError, match=r"trainer\.datamodule has none; give trainer\.fit\(policy, data"):
        calibrate(model, None, data=SimpleNamespace(train_dataloader=list))
