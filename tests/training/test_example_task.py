"""Supervised and preference training against losses and gradients of separate, unpadded sequences."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from tiny_examples import KINDS, build_examples, build_module, fit, write_rows
from tiny_models import build_model, build_tokenizer
from tiny_runs import Log, StartsWithDigit, build_adapter, build_trainer

from hybrid_lightning.callbacks import StepTimer
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.training import ExampleModule
from hybrid_lightning.training.example_task import ExampleTask
from hybrid_lightning.types import Prompt

BETA = 0.5


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("examples") / "rows.jsonl")


@pytest.fixture(autouse=True)
def holes(monkeypatch):
    """Of a demonstration every third token, from the second on, is not to be learned."""
    make = ExampleTask.sequences_of

    def with_holes(*arguments):
        sequences = make(*arguments)
        learned = is_learned(torch.arange(sequences.completion_ids.shape[1]))
        return replace(sequences, sampled_mask=sequences.completion_mask & learned)

    monkeypatch.setattr(ExampleTask, "sequences_of", with_holes)


def is_learned(place):
    return place % 3 != 1


def plain_sum(model, prompt, text):
    """Log-probability of what is learned of a completion with its end, by an unpadded forward pass; and of how many tokens."""
    tokenizer = build_tokenizer()
    asked, said = tokenizer(prompt).input_ids, [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    logits = model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1]
    places = [place for place in range(len(said)) if is_learned(place)]
    return logits.log_softmax(-1)[range(len(said)), said][places].sum(), len(places)


def loss_by_hand(kind, model, base, prompts):
    """The loss of examples, sequence by sequence."""
    if kind == "supervised":
        values, tokens = zip(*(plain_sum(model, prompt.text, prompt.completions[0]) for prompt in prompts), strict=True)
        return -sum(values) / sum(tokens)
    losses = []
    for prompt in prompts:
        ratios = [plain_sum(model, prompt.text, text)[0] - plain_sum(base, prompt.text, text)[0] for text in prompt.completions]
        losses.append(-F.logsigmoid(BETA * (ratios[0] - ratios[1])))
    return sum(losses) / len(losses)


class ByHand(Callback):
    """Compares every step's gradient with the gradient of separate sequences."""

    def __init__(self, kind):
        self.kind, self.base, self.steps, self.losses = kind, build_model("llama", std=0.1), 0, []

    def on_train_start(self, trainer, pl_module):
        self.prompts = []
        look_up = pl_module.task.begin

        def noting(prompts, generator, draw_more):
            self.prompts = list(prompts)
            return look_up(prompts, generator)

        pl_module.task.begin = noting

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        trained = {name: p for name, p in pl_module.model.named_parameters() if p.requires_grad}
        expected = loss_by_hand(self.kind, pl_module.model, self.base, self.prompts)
        gradients = torch.autograd.grad(expected, list(trained.values()))
        for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
        self.expected, self.steps = float(expected.detach()), self.steps + 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(float(trainer.callback_metrics["loss"]))
            assert self.losses[-1] == pytest.approx(self.expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_separate_sequences(kind, model, rows, tmp_path):
    check = ByHand(kind)
    callbacks, flags = (StepTimer(), log := Log(), check), {"accumulate_grad_batches": 2, "max_steps": 2}
    module = fit(kind, model, rows, tmp_path, *callbacks, arguments={"max_tokens_per_micro_batch": 20}, **flags)
    assert check.steps == 2 and check.losses[0] != check.losses[1]
    if kind == "preference":
        assert check.losses[0] == pytest.approx(math.log(2), abs=1e-5), "it begins at the start policy"
    logged = {name.partition("/")[0] for step in log.metrics for name in step} - {"val"}
    assert {"loss", "time"} <= logged <= module.task.training_metrics, "the names of logged metrics are known before"


@pytest.mark.parametrize("kind", KINDS)
def test_validation_measures_held_out_examples(kind, model, rows, tmp_path):
    module = build_module(kind, model, reward=StartsWithDigit(), eval_samples=2)
    module.task.generation.sampler.max_new_tokens = 4
    data = build_examples(kind, rows, validation_fraction=0.25)
    data.eval_batch_size = 4
    (found,) = build_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    base = build_model("llama", std=0.1)
    with torch.no_grad():
        assert found["val/loss"] == pytest.approx(float(loss_by_hand(kind, base, base, data.validation_prompts)), abs=1e-5)
    assert 0 <= found["val/avg@2"] <= 1 and "val/greedy_accuracy" in found
    module.task.generation.reward = None
    (found,) = build_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert "val/loss" in found and not any("accuracy" in name for name in found)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_are_scored_by_the_loss_itself(kind, model, rows, tmp_path):
    module = build_module(kind, model, max_tokens_per_micro_batch=20, examples_per_step=4)
    data, trainer = build_examples(kind, rows), build_trainer(tmp_path)
    trainer.strategy._lightning_module, trainer.datamodule, module.trainer = module, data, trainer
    data.trainer = trainer
    order = torch.randperm(24, generator=torch.Generator().manual_seed(7919)).tolist()
    base, reference = build_model("llama", std=0.1).requires_grad_(True), build_model("llama", std=0.1)
    assert module.calibration_losses().info["prompts"] == 4
    losses = module.calibration_losses(6)
    total = 6 * module.task.loss.rows_per_example
    assert losses.info == {"signal": "examples", "sequences": total, "useful_sequences": total, "prompts": 6}
    module.model.requires_grad_(True)
    (sum(losses) / len(losses)).backward()
    loss_by_hand(kind, base, reference, [data.train_prompts[i] for i in order[:6]]).backward()
    assert len(losses) > 1
    found, expected = (each.model.layers[0].mlp.down_proj.weight.grad for each in (module.model, base))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "format", "number", "message"),
    [
        ("preference", "supervised", 8, r"row \d+ has 1 completions, but DPOLoss needs two"),
        ("supervised", "supervised", 26, "examples_per_step=26 is more than the 24"),
        ("supervised", "supervised", 7, "examples_per_step=7 must be a multiple of the 1 devices"),
    ],
)
def test_what_is_refused_at_start(kind, format, number, message, model, rows, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message):
        trainer = build_trainer(tmp_path, build_adapter(), accumulate_grad_batches=2)
        trainer.fit(build_module(kind, model, examples_per_step=number), datamodule=build_examples(format, rows))


def test_no_loss_and_a_row_that_the_model_cannot_read_are_refused(model):
    with pytest.raises(ConfigError, match=r"needs model\.loss; set it, or use SupervisedModule or PreferenceModule"):
        ExampleModule(model=str(model))
    module = build_module("supervised", model)
    long = Prompt(text="1+1=", completions=("2" * 130,), index=7, source="rows.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl row 7 has 135 tokens \(4 in the prompt\), more than the model's 128"):
        module.task.check_prompts([long])
