"""`LanguageModule`: a causal language model under Lightning, whatever it is trained by.

    LanguageModule <- EvaluatedModule <- SteppedModule <- PolicyModule        its own rollouts and rewards
                                                       <- SupervisedModule    completions that the data has
                                                       <- PreferenceModule    pairs of them, one preferred

It loads model and tokenizer, makes the optimizer with one learning rate for fully trained modules and one for LoRA, and refuses
what strategy, precision and quantization cannot do.
"""

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from transformers import PreTrainedTokenizerBase

from hybrid_lightning.adapters.apply import parameter_groups
from hybrid_lightning.engine.engine import Engine
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.policy.adaptation import AdaptedModule
from hybrid_lightning.policy.describe import describe_arguments
from hybrid_lightning.policy.loading import load_model, load_tokenizer, resolve_model, stop_token_ids
from hybrid_lightning.policy.modes import checkpoint_gradients
from hybrid_lightning.policy.optim import (
    ConstantSchedule,
    LearningRateSchedule,
    OptimizerCallable,
    build_optimizer,
    with_hyper_parameters,
)
from hybrid_lightning.policy.precision import check_precision, use_bfloat16_precision
from hybrid_lightning.policy.prompts import PromptEncoder
from hybrid_lightning.policy.quantization import Quantization, check_quantization
from hybrid_lightning.sharding.checks import check_strategy
from hybrid_lightning.types import PolicyBatch, Prompt


class LanguageModule(AdaptedModule):
    """Loading, optimizer and checks; a subclass calls `_save_arguments`, `_train_with` and `_load` in its constructor."""

    loss: Any  # of a type that says by `needs_reference` whether it compares with the start policy
    model: nn.Module
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    stop_ids: list[int]
    base_parameters: int
    max_tokens_per_micro_batch: int | None

    def _save_arguments(self) -> None:
        self.save_hyperparameters()
        if "_instantiator" not in self.hparams:  # made in Python and not by the command line, which saves its config
            plain = describe_arguments(dict(self.hparams))
            plain["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
            self._set_hparams(plain)
            self._hparams_initial = self._to_hparams_dict(plain)

    def _train_with(
        self,
        optimizer: OptimizerCallable,
        lr_full: float,
        lr_lora: float,
        schedule: LearningRateSchedule | None,
        max_tokens_per_micro_batch: int | None,
    ) -> None:
        if max_tokens_per_micro_batch is not None and max_tokens_per_micro_batch < 1:
            raise ConfigError(f"model.max_tokens_per_micro_batch must be at least 1, got {max_tokens_per_micro_batch}")
        for name, value in (("lr_full", lr_full), ("lr_lora", lr_lora)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"model.{name} must be a non-negative number, got {value}")
        self.optimizer_class, self.lr_full, self.lr_lora = optimizer, lr_full, lr_lora
        self.schedule = schedule or ConstantSchedule()
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch

    def _load(
        self,
        model: str,
        revision: str | None,
        dtype: str,
        quantization: Quantization | None,
        attn_implementation: str | None,
        gradient_checkpointing: bool,
        chat_template: str | None,
        chat_template_kwargs: dict[str, Any] | None,
    ) -> None:
        self.dtype_name, self.quantization = dtype, quantization
        source = resolve_model(model, revision)
        self.tokenizer = load_tokenizer(source)
        self.encoder = PromptEncoder(self.tokenizer, chat_template, chat_template_kwargs)
        loaded = load_model(source, dtype, attn_implementation)
        self.engine = Engine(loaded)
        self.base_parameters = sum(parameter.numel() for parameter in loaded.parameters())
        self.stop_ids = stop_token_ids(loaded, self.tokenizer)
        if gradient_checkpointing:
            checkpoint_gradients(loaded, self.engine.backend)
        self.model = loaded

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Two parameter groups, `full` and `lora`, each with its learning rate."""
        full, lora = parameter_groups(self.model)
        groups = {"full": (list(full.values()), self.lr_full), "lora": (list(lora.values()), self.lr_lora)}
        return build_optimizer(self.optimizer_class, groups, self.schedule, self.trainer.estimated_stepping_batches)  # type: ignore[return-value]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take moments and counters from the checkpoint, but the hyper-parameters of the optimizer from this run."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self.trainer.state.fn == "fit":
            rates = {"full": self.lr_full, "lora": self.lr_lora}
            for state in checkpoint.get("optimizer_states", []):
                state["param_groups"] = with_hyper_parameters(state["param_groups"], self.optimizer_class, rates)

    def setup(self, stage: str) -> None:
        """Check what cannot work before anything is spent (see `check_settings`)."""
        super().setup(stage)
        self.check_settings()

    def check_settings(self) -> None:
        """Called before scoring and before training.

        Raises:
            ConfigError: If the strategy cannot work, the precision cannot work or contradicts the dtype, or the loss needs a
                start policy that is not kept.
        """
        check_strategy(self.trainer, self.optimizer_class, self.dtype_name)
        if self.quantization is not None:
            check_quantization(self.quantization, self.trainer)
        check_precision(str(self.trainer.precision), self.dtype_name, self.optimizer_class)
        use_bfloat16_precision(self.trainer.strategy)
        if self.loss.needs_reference and self.plan is not None and not self.keep_start_weights:
            raise ConfigError(
                "the loss needs the start policy (a KL term with kl_coef > 0, or DPO); set adapter.keep_start_weights=true"
            )

    def _train_prompts(self) -> list[Prompt]:
        prompts = getattr(self.trainer.datamodule, "train_prompts", None)  # type: ignore[attr-defined]
        if prompts is None:
            raise ConfigError(
                "modules are scored on the train_prompts of the data module, but trainer.datamodule has none; give "
                "trainer.fit(datamodule=PromptDataModule(...)), or a plan to HybridAdapterSetup"
            )
        return list(prompts)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Prompts have nothing to move."""
        return batch.to(device) if isinstance(batch, PolicyBatch) else batch
