"""A tiny training run that does the same work on any number of ranks."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from rounding import metrics_of_runs
from tiny_runs import DigitShare, WithHoles, build_adapter, build_data, build_policy, build_trainer
from torch.distributed.tensor import DTensor

from hybrid_lightning.adapters import Random
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.model.current_weights import CurrentWeights
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.batching import join_rollouts

STRATEGIES = {"ddp": "ddp", "fsdp2": "fsdp"}
# Where a gradient is nothing but rounding, Adam's step must not be.
ADAM = {"optimizer": partial(torch.optim.AdamW, eps=1e-3, weight_decay=0.1), "lr_full": 1e-3, "lr_lora": 1e-2}


class ByPrompt(WithHoles, Sampler):
    """Draws from each prompt's own numbers, whoever completes it. Completions of prompts in `short` end after two tokens."""

    def __init__(self, max_new_tokens=6, short=(), holes=False):
        super().__init__(max_new_tokens)
        self.short, self.holes = short, holes

    def sample(self, engine, tokenizer, request):
        parts = []
        for prompt, ids in zip(request.prompts, request.prompt_ids, strict=True):
            own = torch.Generator().manual_seed(1000 + prompt.index)
            sampler = Sampler(2 if prompt.index in self.short else self.max_new_tokens)
            alone = replace(request, prompts=[prompt], prompt_ids=[ids], draws=own, limits=None, on_completion=None)
            parts.append(sampler.sample(engine, tokenizer, alone))
        return join_rollouts(parts)


class Only(RewardFunction):
    """Only completions of these prompts earn different rewards; the others tie."""

    def __init__(self, prompts):
        self.prompts = prompts

    def __call__(self, completions, prompts):
        shares = DigitShare()(completions, prompts)
        return [share if prompt.index in self.prompts else 0.5 for share, prompt in zip(shares, prompts, strict=True)]


class Log(Callback):
    """What a run did: metrics of every step, and prompts of every rollout."""

    def __init__(self):
        self.steps, self.prompts, self.runs = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.rollout is not None:
            self.prompts.append([prompt.index for prompt in batch.rollout.prompts])
        self.runs.append(len(batch.sequences))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate():
            found = {n: float(v) for n, v in trainer.callback_metrics.items()}
            self.steps.append({n: v for n, v in found.items() if not n.startswith(("val/", "judge/seconds"))})


class Streamed(Callback):
    """All weights, and the trained ones alone, as a rollout engine gets them. Shapes are known without gathering the weights."""

    def on_train_end(self, trainer, pl_module):
        current = CurrentWeights(pl_module.model, pl_module.policy.weights, "base", 2, True)
        self.held = {"version": str(current.version), "weights": {}}
        for everything in (True, False):
            values = {}
            for weight in current.stream(everything):
                values[weight.name] = torch.empty(weight.shape)
                weight.write_rows(values[weight.name], 0)
            assert {name: tuple(value.shape) for name, value in values.items()} == current.shapes(everything)
            self.held["weights"][everything] = values


def weights(module) -> dict[str, torch.Tensor]:
    """The whole of every trained weight."""
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {name: whole(p.detach()).clone() for name, p in found.items()}


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def train(
    folder, root, strategy="auto", devices=1, policy=None, adapter=None, callbacks=(), ckpt_path=None, save=None, **flags
) -> dict[str, Any]:
    """Train, validate and return the results."""
    torch.manual_seed(11 + int(os.environ.get("LOCAL_RANK", 0)))  # ranks draw different LoRA starts: the first rank's counts
    torch.use_deterministic_algorithms(False)  # which an earlier run may have switched on
    # Prompts are a multiple of the ranks x minibatches, which are of whole prompts.
    sizes = {"prompts_per_rollout": 12, "minibatches_per_rollout": 2, "epochs_per_rollout": 1}
    defaults = {"loss": GSPOLoss(kl_coef=0.02), "optimizer": torch.optim.SGD, "lr_full": 0.05, "lr_lora": 0.1, **sizes}
    log, module = Log(), build_policy(folder / "model", **{**defaults, **(policy or {})})
    limits = {"max_steps": 4, "gradient_clip_val": 0.05, "val_check_interval": 4, "check_val_every_n_epoch": None}
    limits |= {"strategy": strategy() if callable(strategy) else strategy, "devices": devices}
    # How ranks score is tested by itself.
    trainer = build_trainer(
        root, build_adapter(**{"scorer": Random(), **(adapter or {})}), log, *callbacks, **{**limits, **flags}
    )
    trainer.fit(module, datamodule=build_data(folder / "sums.jsonl", validation_fraction=0.2), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    validation = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {
        "steps": log.steps,
        "weights": weights(module),
        "plan": module.plan.to_dict(),
        "validation": validation,
        "prompts": log.prompts,
        "rows": log.runs,
        "global_step": trainer.global_step,
        "why_slow_decoding": module.policy.runner.passes()["fast decoding"] if log.steps else "",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "held": next((callback.held for callback in callbacks if hasattr(callback, "held")), None),
    }


def train_each(jobs: dict[Any, dict[str, Any]], **arguments: Any) -> dict[Any, dict[str, Any]]:
    """Several runs one after another: name -> arguments. Each run may have a strategy of its own."""
    root = arguments.pop("root")
    return {name: train(root=root / str(name), **{**arguments, **job}) for name, job in jobs.items()}


def predict(folder: Path, root: Path, strategy: Any, devices: int, **flags: Any) -> list[dict[str, Any]]:
    """Predictions of the start policy on all test prompts of this rank."""
    data = build_data(folder / "sums.jsonl", test_fraction=0.2)
    data.eval_batch_size = 2
    trainer = build_trainer(root, strategy=strategy() if callable(strategy) else strategy, devices=devices, **flags)
    batches = trainer.predict(build_policy(folder / "model", sampler=Sampler(6)), datamodule=data)
    return [record for batch in batches for record in batch]


def assert_same_plan(found: dict[str, Any], expected: dict[str, Any], case: str = "") -> None:
    """A plan has the content of another one, and its scores up to the order in which ranks add gradients up."""
    scores, others = ([module["score"] for module in plan["candidates"]] for plan in (found, expected))
    assert scores == pytest.approx(others, rel=1e-5), case
    same = [{**module, "score": score} for module, score in zip(found["candidates"], others, strict=True)]
    assert {**found, "candidates": same, "digest": None} == {**expected, "digest": None}, case


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], case: str = "", rtol: float = 0.0) -> None:
    """A run has the plan, the metrics of its last steps, the weights and the validation of another one."""
    assert_same_plan(found["plan"], expected["plan"], case)
    for one, other in zip(found["steps"], expected["steps"][-len(found["steps"]) :], strict=True):
        assert one == pytest.approx(other, **metrics_of_runs()), case
    torch.testing.assert_close(found["weights"], expected["weights"], atol=1e-5, rtol=rtol, msg=lambda text: f"{case}: {text}")
    assert found["validation"] == pytest.approx(expected["validation"], abs=1e-6), case
