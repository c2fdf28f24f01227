"""Small runs: a model folder, sums as JSON lines, and policy, data module and Trainer with short defaults."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from tiny_models import VOCABULARY, build_model, build_tokenizer, build_wide_model
from torch.nn.utils.rnn import pad_sequence

from hybrid_lightning.adapters import ModuleBudget, Random, TailEnergy
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.data import FileSource, PlainFormat, PromptDataModule
from hybrid_lightning.environments import Environment, Step
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import Stops
from hybrid_lightning.trainer import Trainer
from hybrid_lightning.training import PolicyModule
from hybrid_lightning.types import Rollout, Sequences


class DigitShare(RewardFunction):
    """Share of digits in the completion: an untrained policy earns a bit of it, so that there is a gradient at once."""

    def __call__(self, completions, prompts):
        return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


class StartsWithDigit(RewardFunction):
    """1.0 or 0.0: about every fifth completion of an untrained policy is right."""

    def __call__(self, completions, prompts):
        return [float(text[:1].isdigit()) for text in completions]


class Constant(RewardFunction):
    """The same for every completion: no advantage, no gradient."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def __call__(self, completions, prompts):
        return [self.value] * len(completions)


class OftenDone(Sampler):
    """Every fourth token ends a completion, so that some of few tokens end and some do not, whatever is drawn."""

    def stops(self, tokenizer, ids=None, more=()):
        return Stops(tuple(range(2, VOCABULARY, 4)), None)


class Talk(Environment):
    """Answers with the seed's number and the message's length, and ends the episode after some turns."""

    def __init__(self, turns: int = 3, broken: str = "", length: int = 2) -> None:
        self.turns, self.broken, self.length = turns, broken, length

    def start(self, prompt, seed):
        self.said, self.seed = 0, seed
        return [{"role": "user", "content": f"go{seed % 10}"}] if self.broken != "begins" else str(id(self))

    def step(self, message):
        self.said += 1
        if self.broken == "fails" and len(message["content"]) % 2 and self.said == 2:
            raise ValueError("the board is gone")
        answer = {"role": "user", "content": f"n{len(message['content'])}" + "x" * (self.length - 2)}
        return Step(
            [answer],
            reward=0.25 * self.said + 0.01 * len(message["content"]),
            over=self.said == self.turns,
            counts={"heard": len(message["content"])},
        )


class WithHoles:
    """For an engine: the same as if an environment had added every third token, from the second on."""

    holes = True

    def play(self, runner, tokenizer, request, episodes, *rest):
        begun = super().play(runner, tokenizer, request, episodes, *rest)
        for episode in episodes if self.holes else ():
            added = range(1, len(episode.ids), 3)
            for place in added:
                episode.sampled[place], episode.logprobs[place] = False, 0.0
        return begun


class Interrupted(WithHoles, OftenDone):
    """Completions in which an environment added tokens."""


def in_two_rows(rollout: Rollout) -> Rollout:
    """The same episodes; of every other one, the tokens after the second are a row of their own, with a longer prompt."""
    sequences, rows, episodes = rollout.sequences, [], []
    columns = (sequences.completion_ids, sequences.weights_step, sequences.sampled_mask, rollout.sampling_logprobs)
    for number, real in enumerate(sequences.completion_mask):
        prompt = sequences.prompt_ids[number][sequences.prompt_mask[number]].tolist()
        own, length = [column[number][real] for column in columns], int(real.sum())
        cuts = [0, 2, length] if number % 2 == 0 and length > 2 else [0, length]
        for start, end in pairwise(cuts):
            rows.append([torch.tensor([*prompt, *own[0][:start].tolist()]).flip(0), *(column[start:end] for column in own)])
            episodes.append(number)
    ids, *own = (pad_sequence(column, batch_first=True) for column in zip(*rows, strict=True))
    mask, real = (pad_sequence([torch.ones_like(row[i]) > 0 for row in rows], batch_first=True) for i in (0, 1))
    split = Sequences(ids.flip(1), mask.flip(1), own[0], real, own[1], own[2])
    return replace(rollout, sequences=split, sampling_logprobs=own[3], episode_of_row=torch.tensor(episodes))


class Failing(PolicyModule):
    """One of every four completions of a prompt is left out: its rewards are not numbers."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        generation, score = self.task.generation, self.task.generation.score

        def some(rollout, arriving=None):
            rewards = score(rollout).rewards
            counted = torch.tensor(
                [[(prompt.index + i) % 4 > 0 for i in range(rollout.group_size)] for prompt in rollout.prompts]
            )
            lost = torch.where(counted, 0.0, torch.nan)
            parts = {name: part + lost for name, part in rewards.parts.items()}
            return replace(rollout, rewards=replace(rewards, total=rewards.total + lost, parts=parts, counted=counted))

        generation.score = some


class InTwoRows(PolicyModule):
    """Every other episode has two rows."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        generation, score = self.task.generation, self.task.generation.score
        generation.score = lambda rollout, arriving=None: in_two_rows(score(rollout, arriving))


class Rewritten(InTwoRows, Failing):
    """Both."""


class Log(Callback):
    """Notes metrics, micro-batches and gradients of a run: of a micro-batch after it, of an optimizer step before it."""

    def __init__(self):
        self.metrics, self.batches, self.losses, self.gradients = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.requires_grad})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))


def trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every trained weight."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def write_model(folder: Path, family: str = "llama", seed: int = 0, std: float = 0.1) -> Path:
    """A model folder in Hugging Face format, with tokenizer."""
    build_model(family, seed=seed, std=std).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def write_wide_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a model that can be quantized."""
    build_wide_model(family).to(dtype).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def write_sums(path: Path, count: int = 24) -> Path:
    """`count` different sums of one-digit numbers."""
    rows = (f'{{"question": "{i // 5}+{i % 5}=", "answer": "{i // 5 + i % 5}"}}' for i in range(count))
    path.write_text("\n".join(rows))
    return path


def build_policy(model: Path, kind: type[PolicyModule] = PolicyModule, **arguments: Any) -> PolicyModule:
    """A policy with rollouts of 4 prompts x 4 completions of at most 6 tokens."""
    defaults = {"loss": GRPOLoss(), "reward": DigitShare(), "sampler": Sampler(max_new_tokens=6)}
    sizes = {"prompts_per_rollout": 4, "samples_per_prompt": 4, "eval_samples": 2, "lr_full": 1e-3, "lr_lora": 1e-2}
    return kind(**{**defaults, **sizes, "model": str(model), **arguments})


def build_data(path: Path, **arguments: Any) -> PromptDataModule:
    """All sums for training; give `validation_fraction` or `test_fraction` for the other splits."""
    return PromptDataModule(FileSource(str(path), **arguments), PlainFormat())


def build_adapter(share: float = 0.2, **arguments: Any) -> HybridAdapterSetup:
    """A hybrid adapter of rank 2, scored on 4 prompts."""
    defaults = {"budget": ModuleBudget(share), "scorer": TailEnergy(), "rank": 2, "calibration_prompts": 4}
    return HybridAdapterSetup(**{**defaults, **arguments})


def build_trainer(root: Path, *callbacks: Any, kind: type[Any] = Trainer, **flags: Any) -> Any:
    """A silent Trainer on the CPU, without logger and checkpoints."""
    return kind(
        **{
            "max_steps": 2,
            "accelerator": "cpu",
            "default_root_dir": root,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
            **flags,
        }
    )


def check(policy: PolicyModule, root: Path, stage: str = "fit", **flags: Any) -> None:
    """Check the settings of a policy's run, as is done before it begins."""
    policy._trainer = build_trainer(root, **flags)
    policy.trainer.state.fn = TrainerFn(stage)
    policy.check_settings()


def fit(model: Path, sums: Path, root: Path, *callbacks: Any, policy=None, data=None, ckpt=None, **flags: Any) -> PolicyModule:
    """Train a policy, with a hybrid adapter unless one is among the callbacks: of modules chosen by name, without a rollout."""
    if not any(isinstance(callback, HybridAdapterSetup) for callback in callbacks):
        callbacks = (build_adapter(scorer=Random()), *callbacks)
    torch.manual_seed(11)
    module = build_policy(model, **(policy or {}))
    build_trainer(root, *callbacks, **flags).fit(module, datamodule=data or build_data(sums), ckpt_path=ckpt)
    return module
