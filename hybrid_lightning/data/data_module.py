"""`PromptDataModule`: the splits of a source, formatted as prompts, for Lightning's Trainer."""

import random
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from hybrid_lightning.data.formatting import PromptFormat
from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Splits
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.shared.configurable import Configurable
from hybrid_lightning.types import Prompt

Encode = Callable[[Prompt], list[int]]

# Stage -> the splits that it uses; the first one must not be empty.
_STAGES = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


class PromptDataModule(Configurable, LightningDataModule):
    """Prompts for training, validation, test and prediction.

    Rollouts are the training data: `train_dataloader` returns the policy's `rollout_loader(train_prompts)`. The other
    dataloaders return lists of `Prompt`. On several ranks, the sampler that Lightning adds to them may repeat prompts;
    `Prompt.index` is unique within a split and set, so that metrics can count each prompt once.

    Args:
        source: Source of the problems.
        format: Turns a problem into a prompt.
        max_prompt_tokens: Longer prompts are dropped, never truncated, and their number is logged. None for no limit.
        validation_prompts: Number of prompts to validate on, drawn at random with `seed`; None for all.
        test_prompts: Number of prompts to test on, drawn in the same way; None for all.
        eval_batch_size: Prompts per batch of validation, test and prediction.
        seed: Seed for drawing validation and test prompts.
    """

    def __init__(
        self,
        source: PromptSource,
        format: PromptFormat,
        max_prompt_tokens: int | None = None,
        validation_prompts: int | None = None,
        test_prompts: int | None = None,
        eval_batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        limits = {
            "max_prompt_tokens": max_prompt_tokens,
            "validation_prompts": validation_prompts,
            "test_prompts": test_prompts,
            "eval_batch_size": eval_batch_size,
        }
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; give at least 1" + ("" if name == "eval_batch_size" else ", or null"))
        self.source = source
        self.format = format
        self.max_prompt_tokens = max_prompt_tokens
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.limits = {"train": None, "validation": validation_prompts, "test": test_prompts}  # most prompts of each split
        self._encode: Encode | None = None
        self._prompts: dict[str, list[Prompt]] = {}

    def setup(self, stage: str | None = None, encode: Encode | None = None) -> None:
        """Load, format and filter the splits of a stage, unless that has been done already.

        Args:
            stage: "fit", "validate", "test" or "predict"; None for all splits.
            encode: Returns the token ids of a prompt, which are counted for `max_prompt_tokens`. None uses the `encode` of the
                policy that the trainer runs.

        Raises:
            DataError: If the data is malformed, or has nothing for this stage.
        """
        self._encode = encode or self._encode
        splits = ("train", "validation", "test") if stage is None else _STAGES[stage]
        for split in splits:
            self._formatted(split)
        if stage is not None and not self._formatted(splits[0]):
            raise DataError(
                f"{type(self.source).__name__} has no {splits[0]} rows, but {str.__str__(stage)} needs some; give data.source a "
                f"{splits[0]} split"
            )

    def set_names(self, split: str) -> list[str]:
        """Names of the sets in a split ("" for rows that belong to no set); reads the rows, but does not format them."""
        return list(dict.fromkeys(row.set_name for row in getattr(self._splits, split)))

    @property
    def train_prompts(self) -> list[Prompt]:
        """Training prompts, from which rollouts are sampled."""
        return self._formatted("train")

    @property
    def validation_prompts(self) -> list[Prompt]:
        """Prompts to validate on."""
        return self._formatted("validation")

    @property
    def test_prompts(self) -> list[Prompt]:
        """Prompts to test on and to predict."""
        return self._formatted("test")

    def train_dataloader(self) -> Any:
        """Loader of rollouts of the training prompts, made by the policy that is being trained.

        Raises:
            ConfigError: If the trainer's module does not make rollouts.
        """
        rollout_loader = getattr(self.trainer and self.trainer.lightning_module, "rollout_loader", None)
        if rollout_loader is None:
            raise ConfigError("the trained module has no rollout_loader(prompts); use PolicyModule, or a module with that method")
        return rollout_loader(self.train_prompts)

    def val_dataloader(self) -> "DataLoader[Prompt] | list[Prompt]":
        """Batches of validation prompts; if there are none, an empty list, with which `fit` skips validation."""
        return self._loader(self.validation_prompts) if self.validation_prompts else []

    def test_dataloader(self) -> "DataLoader[Prompt]":
        """Batches of test prompts."""
        return self._loader(self.test_prompts)

    def predict_dataloader(self) -> "DataLoader[Prompt]":
        """Batches of test prompts, which are also the prompts to predict."""
        return self._loader(self.test_prompts)

    def _loader(self, prompts: list[Prompt]) -> "DataLoader[Prompt]":
        # Each iteration draws a seed for workers. Drawn from the global generator, it would change training after a validation.
        options: Any = {"shuffle": False, "collate_fn": list, "generator": torch.Generator()}
        return DataLoader(prompts, batch_size=self.eval_batch_size, **options)  # type: ignore[arg-type]

    @cached_property
    def _splits(self) -> Splits:
        return self.source.load()

    def _formatted(self, split: str) -> list[Prompt]:
        if split not in self._prompts:
            prompts = [self.format.format(row) for row in getattr(self._splits, split)]
            prompts = self._draw(split, self._short_enough(split, prompts))
            check = getattr(self.trainer and self.trainer.lightning_module, "check_prompts", None)
            if check is not None:  # finds rows that the reward cannot score now, not after hours of training
                check(prompts)
            self._prompts[split] = prompts
        return self._prompts[split]

    def _short_enough(self, split: str, prompts: list[Prompt]) -> list[Prompt]:
        if self.max_prompt_tokens is None or not prompts:
            return prompts
        encode = self._encode or getattr(self.trainer and self.trainer.lightning_module, "encode", None)
        if encode is None:
            raise ConfigError(
                f"max_prompt_tokens={self.max_prompt_tokens} needs a tokenizer; call setup(encode=policy.encode), or train a "
                "policy with a method encode(prompt)"
            )
        lengths = [len(encode(prompt)) for prompt in prompts]
        kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= self.max_prompt_tokens]
        if not kept:
            raise DataError(
                f"all {len(prompts)} {split} prompts are longer than max_prompt_tokens={self.max_prompt_tokens} (from "
                f"{min(lengths)} to {max(lengths)} tokens); raise it"
            )
        if len(kept) < len(prompts):
            dropped = f"{len(prompts) - len(kept)} of {len(prompts)} {split} prompts"
            rank_zero_info(f"dropped {dropped} longer than max_prompt_tokens={self.max_prompt_tokens}")
        return kept

    def _draw(self, split: str, prompts: list[Prompt]) -> list[Prompt]:
        limit = self.limits[split]
        if limit is None or limit >= len(prompts):
            return prompts
        drawn = random.Random(self.seed).sample(range(len(prompts)), limit)
        return [prompts[position] for position in sorted(drawn)]
