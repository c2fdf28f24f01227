"""`PreferenceModule`: a causal language model that is trained to say the one thing rather than the other."""

from typing import Any

from torch.optim import AdamW

from hybrid_lightning.losses import DPOLoss, ExampleLoss
from hybrid_lightning.policy.examples import ExampleModule
from hybrid_lightning.policy.optim import LearningRateSchedule, OptimizerCallable
from hybrid_lightning.policy.quantization import Quantization
from hybrid_lightning.rewards import RewardFunction
from hybrid_lightning.rollout.sampler import Sampler


class PreferenceModule(ExampleModule):
    """Preference alignment by a loss of pairs, such as DPO.

    Data is a `PromptDataModule` whose format is a `PreferenceFormat`; chosen and rejected completion share their prompt's forward
    and backward pass. The start policy, with which the loss compares, is the model with its adapter switched off: there is no
    second one. `HybridAdapterSetup` scores the modules by the gradient of the loss at the start policy.

    Args:
        loss: Loss of pairs; None takes `DPOLoss()`.
        model: `embedded`, a folder, a GGUF file, `package:NAME/FILE`, or a hub id.
        revision: Branch, tag or commit of a hub model.
        dtype: Weights in memory: `float32`, or `bfloat16` together with `trainer.precision=bf16-mixed` or `bf16-true`.
        quantization: Of the frozen base once the modules are scored, such as `NF4()`; None keeps it in `dtype`.
        attn_implementation: Such as `sdpa`, `eager`, `flash_attention_2`; None lets transformers choose.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        chat_template: Jinja template for chat prompts; None takes the tokenizer's own.
        chat_template_kwargs: Variables of the chat template.
        examples_per_step: Pairs of an optimizer step, over all devices and micro-batches.
        max_tokens_per_micro_batch: Tokens that one forward and backward pass takes, which changes memory and not the gradient.
            None chooses by the sizes of the model (see `default_token_budget`).
        reward: Scores completions of held-out prompts; validation and test then generate, too. None measures the loss alone.
        sampler: Decoding parameters of that evaluation; None takes `Sampler()`.
        eval_samples: Completions per prompt in that evaluation (the n of avg@n), beside the greedy one.
        optimizer: Called with the parameter groups.
        lr_full: Learning rate of fully trained modules.
        lr_lora: Learning rate of LoRA weights, about 10 times `lr_full`.
        schedule: Learning rate schedule; None takes `ConstantSchedule()`.
        seed: Of the order of examples and of the evaluation.

    Raises:
        ConfigError: If a value is impossible.
        ModelError: If the model cannot be loaded.
    """

    completions_wanted = "two, the chosen and the rejected one: give data.format=PreferenceFormat"
    shown_metrics = ("loss", "rewards/accuracies")

    def __init__(
        self,
        loss: ExampleLoss | None = None,
        model: str = "embedded",
        revision: str | None = None,
        dtype: str = "float32",
        quantization: Quantization | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        examples_per_step: int = 32,
        max_tokens_per_micro_batch: int | None = None,
        reward: RewardFunction | None = None,
        sampler: Sampler | None = None,
        eval_samples: int = 8,
        optimizer: OptimizerCallable = AdamW,
        lr_full: float = 1e-5,
        lr_lora: float = 1e-4,
        schedule: LearningRateSchedule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._save_arguments()
        self._set_examples(loss or DPOLoss(), reward, sampler, examples_per_step, eval_samples, seed)
        self._train_with(optimizer, lr_full, lr_lora, schedule, max_tokens_per_micro_batch)
        self._load(
            model,
            revision,
            dtype,
            quantization,
            attn_implementation,
            gradient_checkpointing,
            chat_template,
            chat_template_kwargs,
        )
