"""Worker: TRL's GRPOTrainer with PEFT."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from benchmarks.worker import Gate
from benchmarks.workloads import ANSWER, Settings, fastest_settings, hashed_reward


class HashedReward:
    """The shared reward with TRL's signature; records the completions' lengths."""

    __name__ = "hashed_reward"

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        self.lengths = [len(ids) for ids in completion_ids]
        if isinstance(completions[0], list):  # the messages of an episode, see `called`
            self.lengths = [sum(message.get("tokens", 0) for message in messages) for messages in completions]
        return [*hashed_reward(list(map(str, completions)))]


def answer() -> str:
    """Answer immediately."""
    return ANSWER


def called(tokenizer: PreTrainedTokenizerBase, ids: list[int], **_: Any) -> dict[str, Any]:
    """Replaces TRL's parser: every message of the policy calls the tool, until TRL makes no more calls."""
    call = {"type": "function", "function": {"name": "answer", "arguments": {}}}
    return {"role": "assistant", "content": tokenizer.decode(ids), "tool_calls": [call], "tokens": len(ids)}


class Gated(TrainerCallback):
    """Lets one rollout and all its optimizer steps through at a time."""

    def __init__(self, gate: Gate, reward: HashedReward, optimizer_steps: int) -> None:
        self.gate, self.reward, self.optimizer_steps = gate, reward, optimizer_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self.gate.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last optimizer step of a rollout, report and wait for the next rollout. Only this wait is not timed."""
        if state.global_step % self.optimizer_steps == 0:
            self.gate.done(self.reward.lengths, state.global_step)
            control.should_training_stop = not self.gate.wait()


def config(settings: Settings, chosen: dict[str, Any], folder: str) -> GRPOConfig:
    """The workload as TRL's configuration, with the fastest settings."""
    workload = settings.workload
    rows_per_step = workload.rows // workload.minibatches
    # No more rows at once than an optimizer step has; the rest of the step is accumulated.
    at_once = min(int(chosen["per_device_train_batch_size"]), rows_per_step)
    half = chosen.get("dtype", workload.dtype) == "bfloat16"
    values: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": settings.device == "cpu",
        "bf16": half,
        "seed": settings.seed,
        "max_steps": settings.rollouts * workload.minibatches,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": rows_per_step // at_once,
        "steps_per_generation": workload.rows // at_once,
        "num_generations": workload.samples,
        "max_completion_length": workload.episode_tokens,
        "max_tool_calling_iterations": workload.turns - 1,
        "generation_kwargs": {"max_new_tokens": workload.max_new_tokens},
        "shuffle_dataset": False,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,  # torch's default for AdamW, as on our side
        "max_grad_norm": 1.0,
        "loss_type": "grpo",
        "importance_sampling_level": "sequence" if workload.sequence_ratio else "token",
        "epsilon": workload.clip_low,
        "epsilon_high": workload.clip_high,
        "beta": 0.0,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    own = ("per_device_train_batch_size", "attn_implementation", "dtype")
    return GRPOConfig(**{**values, **{name: value for name, value in chosen.items() if name not in own}})


def build_trainer(
    settings: Settings, chosen: dict[str, Any], folder: str, reward: Callable[..., Any], callback: TrainerCallback
) -> GRPOTrainer:
    """TRL's trainer for the workload, with LoRA on all linear layers."""
    workload = settings.workload
    model = AutoModelForCausalLM.from_pretrained(
        settings.folder,
        dtype=getattr(torch, chosen.get("dtype", workload.dtype)),
        attn_implementation=chosen.get("attn_implementation"),  # both the model's and not GRPOConfig's, but may be tried too
    )
    tokenizer = AutoTokenizer.from_pretrained(settings.folder, padding_side="left")
    prompts: list[Any] = settings.prompts
    if workload.turns > 1:
        # Only texts, as on our side. TRL requires a template that shows calls, although the policy writes them itself.
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}{% endfor %}"
        )
        tokenizer.response_template = {}  # TRL requires one, but `called` replaces the parser
        grpo_trainer.parse_response = called
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config(settings, chosen, folder),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        tools=[answer] if workload.turns > 1 else None,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=workload.rank, lora_alpha=workload.alpha, target_modules="all-linear"),
        callbacks=[callback],
    )


def main() -> None:
    settings = Settings.from_arguments()
    gate, reward = Gate(settings), HashedReward()
    chosen = {**fastest_settings(settings.workload), **settings.overrides}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(settings, chosen, folder, reward, Gated(gate, reward, settings.workload.minibatches))
        assert isinstance(trainer.model, torch.nn.Module) and isinstance(trainer.processing_class, PreTrainedTokenizerBase)
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        gate.ready(trainer.processing_class(settings.prompts)["input_ids"], trained, settings=chosen)
        trainer.train()


if __name__ == "__main__":
    main()
