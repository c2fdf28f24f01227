"""Runs with a teacher: the gradient of each optimizer step from the equation, sampled token by token in its full context."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import build_model, build_tokenizer, plain_distribution, tokens_of
from tiny_runs import (
    Constant,
    Interrupted,
    Log,
    OftenDone,
    StartsWithDigit,
    Talk,
    build_adapter,
    build_data,
    build_policy,
    build_trainer,
    check,
    fit,
    trained,
    write_model,
)

from hybrid_lightning import losses
from hybrid_lightning.adapters import Random
from hybrid_lightning.advantages import GroupAdvantage, NoAdvantage
from hybrid_lightning.environments import EpisodeLimits
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout import DynamicSampling
from hybrid_lightning.rollout.batching import pad_left
from hybrid_lightning.runner import Backend
from hybrid_lightning.training import ModelTeacher, SelfTeacher
from hybrid_lightning.types import Prompt

TEMPERATURE, HINT = 0.9, "{prompt}{answer}#"


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("teacher"), seed=5)


def with_hint(rollouts):
    """The rollout's sequences after the prompts that a teacher with `HINT` sees."""
    texts = [f"{prompt.text}{prompt.answer}#" for prompt in rollouts.prompts for _ in range(rollouts.group_size)]
    ids, mask = pad_left([build_tokenizer()(text)["input_ids"] for text in texts], 0, "cpu")
    return replace(rollouts.sequences, prompt_ids=ids, prompt_mask=mask)


class ByEquation(Callback):
    """Of on-policy steps with `GRPOLoss`: the mean over sequences of the mean over their sampled tokens."""

    def __init__(self, distillation, teacher, hinted=False, rewarded=False):
        self.distillation, self.teacher, self.hinted, self.rewarded, self.steps = distillation, teacher, hinted, rewarded, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rollout = batch.rollout

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        sequences = self.rollout.sequences
        seen = with_hint(self.rollout) if self.hinted else sequences
        advantages = GroupAdvantage()(self.rollout.rewards.total).flatten() if self.rewarded else torch.zeros(16)
        total, kl = torch.zeros(()), []
        for row in range(16):
            sampled = sequences.sampled_mask[row, : int(sequences.completion_mask[row].sum())]
            policy = plain_distribution(pl_module.model, sequences, row, TEMPERATURE)[sampled]
            with torch.no_grad():
                of_teacher = self.teacher if self.teacher is not None else pl_module.model
                theirs = plain_distribution(of_teacher, seen, row, TEMPERATURE)[sampled]
            chosen = torch.tensor(tokens_of(sequences, row)[1])[sampled][:, None]
            new, of_teacher = (values.gather(1, chosen).squeeze(1) for values in (policy, theirs))
            kl += (new - of_teacher).tolist()
            if isinstance(self.distillation, losses.SampledReverseKL):
                terms = -(advantages[row] + self.distillation.coef * (of_teacher - new).detach()) * (new - new.detach()).exp()
            else:
                terms = -advantages[row] * (new - new.detach()).exp()
                terms = terms + self.distillation.coef * self.distillation(policy, theirs)
            total = total + terms.mean() / 16
        weights = [parameter for parameter in pl_module.model.parameters() if parameter.requires_grad]
        wanted = torch.autograd.grad(total, weights)
        scale = max(float(gradient.abs().max()) for gradient in wanted)
        assert scale > 1e-4
        for parameter, gradient in zip(weights, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-4 * scale, rtol=0)
        torch.testing.assert_close(trainer.callback_metrics["loss"], total.detach(), atol=2e-5, rtol=1e-4)
        assert float(trainer.callback_metrics["teacher/kl"]) == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-5)
        self.steps += 1


CASES = {
    "sampled tokens and the reward": (losses.SampledReverseKL(0.5), "model", True),
    "forward, most probable": (losses.ForwardKL(top_k=5), "model", False),
    "the start policy with a hint": (losses.SampledReverseKL(), "start", False),
    "the current policy with a hint": (losses.JensenShannon(), "current", True),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_follow_the_equation(case, model, teacher_folder, sums, tmp_path):
    distillation, kind, rewarded = CASES[case]
    of_model = kind == "model"
    teacher = ModelTeacher(str(teacher_folder)) if of_model else SelfTeacher(HINT, start=kind == "start")
    by_hand = build_model("llama", seed=5, std=0.1) if of_model else build_model("llama", std=0.1) if kind == "start" else None
    by_equation = ByEquation(distillation, by_hand, not of_model, rewarded)
    policy = {"teacher": teacher, "distillation": distillation, "reward": StartsWithDigit(), "max_tokens_per_micro_batch": 40}
    policy |= {"advantage": None if rewarded else NoAdvantage(), "sampler": Interrupted(6, temperature=TEMPERATURE)}
    fit(model, sums, tmp_path, by_equation, policy=policy, max_steps=3)
    assert by_equation.steps == 3


def test_blocks_of_logits_and_a_wider_vocabulary_change_nothing(model, sums, tmp_path, monkeypatch):
    wide = build_model("llama", seed=5, std=0.1, vocab_size=64)  # padded: its tokenizer has fewer
    wide.save_pretrained(tmp_path / "wide")
    build_tokenizer().save_pretrained(tmp_path / "wide")
    found = []
    for most in (2**23, 200):
        monkeypatch.setattr(Backend, "most_logits", lambda self, device, most=most: most)
        policy = {"teacher": ModelTeacher(str(tmp_path / "wide")), "distillation": losses.ReverseKL()}
        found.append(trained(fit(model, sums, tmp_path, policy=policy, max_steps=1)))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


def test_rows_without_advantage_teach_and_modules_are_scored_by_the_teacher(model, teacher_folder, sums, tmp_path):
    log, policy = Log(), {"reward": Constant(), "advantage": NoAdvantage(), "samples_per_prompt": 1, "loss": losses.GSPOLoss()}
    policy |= {"teacher": ModelTeacher(str(teacher_folder)), "distillation": losses.ReverseKL()}
    module = fit(model, sums, tmp_path, build_adapter(), log, policy=policy, max_steps=1)
    assert len(log.batches[0].sequences) == 4 and log.metrics[0]["teacher/divergence"] > 0
    assert module.plan.calibration["signal"] == "reward", "not reference answers, the signal where nothing has an advantage"


def test_a_run_that_is_resumed_in_the_middle_of_a_rollout_has_the_same_weights(model, sums, tmp_path):
    policy = {"teacher": SelfTeacher(HINT), "distillation": losses.ReverseKL(), "epochs_per_rollout": 3}
    whole = trained(fit(model, sums, tmp_path, policy=policy, max_steps=4))
    torch.manual_seed(11)
    trainer = build_trainer(tmp_path, build_adapter(scorer=Random()), max_steps=2)
    trainer.fit(build_policy(model, **policy), datamodule=build_data(sums))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = trained(fit(model, sums, tmp_path, policy=policy, max_steps=4, ckpt=tmp_path / "half.ckpt"))
    torch.testing.assert_close(resumed, whole, atol=0, rtol=0)


def test_the_weights_of_a_teacher_return_to_the_host_as_they_were(teacher_folder, model, monkeypatch):
    student = build_policy(model).task.passes
    teacher = ModelTeacher(str(teacher_folder))
    assert build_policy(model, teacher=teacher).task.passes._beside == teacher.held_bytes and teacher.held_bytes(student) > 0
    weights = list(teacher.passes(student).policy.model.parameters())
    before = [weight.data for weight in weights]
    moved = []

    class Device:  # no accelerator here: weights are exchanged as by `Module.to`
        type = "cuda"

    def to(self, device):
        moved.append(device)
        for weight in self.parameters():
            weight.data = weight.data.clone()

    monkeypatch.setattr(type(teacher.passes(student).policy.model), "to", to)
    monkeypatch.setattr("hybrid_lightning.model.policy.Policy.device", property(lambda self: Device()))
    teacher.passes(student)
    assert len(moved) == 1 and all(weight.data is not old for weight, old in zip(weights, before, strict=True))
    teacher.release()
    assert all(weight.data_ptr() == old.data_ptr() for weight, old in zip(weights, before, strict=True))


def test_a_teacher_with_context_reads_what_the_environment_begins_with(model, sums, tmp_path, monkeypatch):
    read, logprobs = [], SelfTeacher.logprobs
    monkeypatch.setattr(SelfTeacher, "logprobs", lambda *given: read.append(given[2]) or logprobs(*given))
    policy = {"teacher": SelfTeacher("{prompt}{answer}#"), "environment": Talk(), "reward": None, "sampler": OftenDone(5)}
    policy |= {"episodes": EpisodeLimits(max_tokens=60), "turn_template": "{content}"}
    log = Log()
    fit(model, sums, tmp_path, log, policy=policy, max_steps=1)
    rollouts, tokenizer = log.batches[0].rollout, build_tokenizer()
    own, seen = (tokenizer.batch_decode(s.prompt_ids, skip_special_tokens=True) for s in (rollouts.sequences, read[0]))
    for row, (text, other) in enumerate(zip(own, seen, strict=True)):
        prompt = rollouts.prompts[row // 4]
        assert "=go" in text and other == text.replace(prompt.text, f"{prompt.text}{prompt.answer}#")


def test_context_takes_the_row_and_in_a_chat_the_last_question():
    with pytest.raises(ConfigError, match=r"does not have \{prompt\}"):
        SelfTeacher("{answer}")
    with pytest.raises(ConfigError, match="with start=false and no context"):
        SelfTeacher(start=False)
    teacher = SelfTeacher("{prompt} ({answer}, {hint})")
    row = {"answer": "4", "columns": {"hint": "two pairs"}}
    assert teacher.with_context(Prompt(text="2+2=", **row)).text == "2+2= (4, two pairs)"
    turns = tuple({"role": role, "content": text} for role, text in (("system", "s"), ("user", "2+2="), ("user", "now")))
    assert [m["content"] for m in teacher.with_context(Prompt(messages=turns, **row)).messages] == [
        "s",
        "2+2=",
        "now (4, two pairs)",
    ]


def test_prompts_that_are_too_long_for_the_teacher_are_refused_with_the_data(model, sums, tmp_path):
    build_model("llama", seed=5, max_position_embeddings=8).save_pretrained(tmp_path / "short")
    build_tokenizer().save_pretrained(tmp_path / "short")
    message = (
        r"prompts are too long for the teacher, first .*sums.jsonl row \d+ with {} tokens: model.sampler.max_new_tokens=6 leaves"
    )
    for teacher, error, numbers in (
        (SelfTeacher("{prompt}" + "?" * 130), "shorten model.teacher.context or the columns that it shows", (134, 122, 128)),
        (ModelTeacher(str(tmp_path / "short")), "lower model.sampler.max_new_tokens to 4 or less", (4, 2, 8)),
    ):
        policy = {"teacher": teacher}
        error = f"{message.format(numbers[0])} {numbers[1]} of the teacher's {numbers[2]} positions; {error}"
        with pytest.raises(ConfigError, match=error):
            build_trainer(tmp_path).check(build_policy(model, **policy), build_data(sums))
        with pytest.raises(ConfigError, match=error):
            fit(model, sums, tmp_path, policy=policy, max_steps=1)
    with pytest.raises(ConfigError, match=r"uses \{hint\}, which .* row 0 does not have"):
        build_trainer(tmp_path).check(build_policy(model, teacher=SelfTeacher("{prompt}{hint}")), build_data(sums))


def test_tokenizers_that_differ_are_refused_by_what_differs(model, teacher_folder, tmp_path):
    other = build_tokenizer()
    other.add_tokens(["plus"])
    build_model("llama", vocab_size=64).save_pretrained(tmp_path / "more")
    other.save_pretrained(tmp_path / "more")
    policy = build_policy(model, teacher=ModelTeacher(str(tmp_path / "more")))
    with pytest.raises(ConfigError, match="1 tokens differ, first 'plus', with id None for the policy and 47 for the"):
        check(policy, tmp_path)
    check(build_policy(model, teacher=ModelTeacher(str(teacher_folder))), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation": losses.ReverseKL()}, "ReverseKL needs a teacher; set model.teacher"),
        ({"advantage": NoAdvantage()}, "NoAdvantage needs a teacher"),
        ({"teacher": SelfTeacher(), "loss": losses.GSPOLoss()}, "GSPOTokenLoss for GSPO.*distillation=ReverseKL"),
        ({"teacher": SelfTeacher(), "dynamic_sampling": DynamicSampling()}, "model.teacher also teaches on prompts"),
    ],
)
def test_options_that_do_not_go_together_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        build_policy(model, **options)
