"""`LanguageModule`: a causal language model under Lightning, whatever it is trained by.

    LanguageModule <- EvaluatedModule <- SteppedModule <- PolicyModule        its own rollouts and rewards
                                                       <- SupervisedModule    completions that the data has
                                                       <- PreferenceModule    pairs of them, one preferred

It loads model and tokenizer, makes the optimizer with one learning rate for fully trained modules and one for LoRA, and refuses
what strategy, precision and quantization cannot do.

The command line makes it `unloaded` and loads when data, reward and settings have been checked (see `Trainer.check`), so that a
wrong column is found in the time that it takes to read a file.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from hybrid_lightning.engine import Backend
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.policy.adaptation import AdaptedModule
from hybrid_lightning.policy.describe import describe_arguments
from hybrid_lightning.policy.loading import (
    ModelSource,
    check_dtype,
    check_weights,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve_model,
    stop_token_ids,
)
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

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine


@dataclass(frozen=True)
class _ToLoad:
    """What is loaded, and how."""

    source: ModelSource
    attn_implementation: str | None
    gradient_checkpointing: bool
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None


# Attribute -> what loads it where it is asked for before `load`, as by a row that is tokenized to be checked.
_LOADERS = {
    "tokenizer": "_load_tokenizer",
    "encoder": "_load_tokenizer",
    "model_config": "_load_config",
    "stop_ids": "_load_stop_ids",
    "model": "_load_weights",
    "engine": "_load_weights",
    "base_parameters": "_load_weights",
}


class LanguageModule(AdaptedModule):
    """Loading, optimizer and checks; a subclass calls `_save_arguments`, `_train_with` and `_load` in its constructor."""

    loss: Any  # of a type that says by `needs_reference` whether it compares with the start policy
    model: nn.Module
    model_config: PretrainedConfig
    engine: "Engine"
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    stop_ids: list[int]
    base_parameters: int
    max_tokens_per_micro_batch: int | None
    _loads_later = False
    _to_load: _ToLoad | None = None

    @classmethod
    def unloaded(cls, *arguments: Any, **named: Any) -> Self:
        """Make the module, all its arguments checked, without model and tokenizer: `load` loads them.

        Args:
            *arguments: Of the class.
            **named: Likewise.
        """
        module = cls.__new__(cls)
        module._loads_later = True
        module.__init__(*arguments, **named)  # type: ignore[misc]
        return module

    def load(self) -> None:
        """Load what is not there yet.

        Raises:
            ModelError: If model or tokenizer cannot be loaded.
        """
        if self._to_load is not None:
            for name in ("tokenizer", "model"):
                getattr(self, name)

    def check_model(self) -> None:
        """Make sure that there is such a causal language model, with all its files; of a GGUF file, that would take seconds.

        Raises:
            ModelError: If there is none.
        """
        if self._to_load is not None and "gguf_file" not in self._to_load.source.arguments:
            _ = self.model_config
            check_weights(self._to_load.source)

    def skeleton(self) -> nn.Module:
        """The modules of the base model without weights, on the meta device."""
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(deepcopy(self.model_config))
        return model

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are there."""
        return "model" in self._modules

    def __getattr__(self, name: str) -> Any:
        """Load what has not been loaded yet, and is asked for, such as by the constructor of a subclass."""
        if name in _LOADERS and self._to_load is not None and name not in self._modules:
            getattr(self, _LOADERS[name])(self._to_load)
            return getattr(self, name)
        return super().__getattr__(name)

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
        check_dtype(dtype)
        self.dtype_name, self.quantization = dtype, quantization
        self._to_load = _ToLoad(
            resolve_model(model, revision), attn_implementation, gradient_checkpointing, chat_template, chat_template_kwargs
        )
        if not self._loads_later:
            self.load()

    def _load_tokenizer(self, what: _ToLoad) -> None:
        self.tokenizer = load_tokenizer(what.source)
        self.encoder = PromptEncoder(self.tokenizer, what.chat_template, what.chat_template_kwargs)

    def _load_config(self, what: _ToLoad) -> None:
        self.model_config = load_config(what.source)

    def _load_stop_ids(self, what: _ToLoad) -> None:
        self.stop_ids = stop_token_ids(load_generation_config(what.source, self.model_config), self.tokenizer)

    def _load_weights(self, what: _ToLoad) -> None:
        from hybrid_lightning.engine import Engine  # with PEFT, which takes a second to import

        loaded = load_model(what.source, self.dtype_name, what.attn_implementation, self.model_config)
        self.engine = Engine(loaded)
        self.base_parameters = sum(parameter.numel() for parameter in loaded.parameters())
        self.stop_ids = stop_token_ids(loaded.generation_config, self.tokenizer)
        if what.gradient_checkpointing:
            checkpoint_gradients(loaded, self.engine.backend)
        self.model = loaded

    def _put(self, model: nn.Module) -> None:
        super()._put(model)
        self.engine = self.engine.of(model)

    def _backend(self) -> Backend:
        return self.engine.backend

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Two parameter groups, `full` and `lora`, each with its learning rate."""
        from hybrid_lightning.adapters.apply import parameter_groups  # PEFT is slow to import

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
        if self.is_loaded:  # and adapted, since callbacks come first
            self.engine.report()

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
