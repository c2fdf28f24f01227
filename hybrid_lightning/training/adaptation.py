"""`AdaptedModule`: a LightningModule with a hybrid adapter, which trains some modules fully and others by LoRA.

It applies the adapter plan, makes an optimizer with one learning rate for fully trained modules and one for LoRA, and saves and
loads checkpoints. A checkpoint holds the trainable weights alone, the optimizer's state keyed by parameter name, and under the
key `hybrid_lightning` the adapter plan and the digest of the base model, so that the module can be rebuilt from it.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import AdamW

from hybrid_lightning.adapters.plan import AdapterPlan, model_digest
from hybrid_lightning.configurable import Configurable, describe_arguments
from hybrid_lightning.engine import Backend
from hybrid_lightning.errors import CheckpointError, PlanError
from hybrid_lightning.model.precision import dtype_of_precision
from hybrid_lightning.model.quantization import Quantization, quantize_base
from hybrid_lightning.sharding.checkpoints import write_whole_files
from hybrid_lightning.sharding.fsdp1 import FSDP1Strategy
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.sharding.parameters import name_optimizer_state, parameter_names, trained_names
from hybrid_lightning.sharding.sharded_folder import is_sharded_checkpoint, read_weights
from hybrid_lightning.sharding.weights import Weights, weights_of
from hybrid_lightning.training.optim import (
    ConstantSchedule,
    LearningRateSchedule,
    Optimization,
    OptimizerCallable,
    build_optimizer,
    with_hyper_parameters,
)

if TYPE_CHECKING:
    from peft import PeftModel

CHECKPOINT_KEY = "hybrid_lightning"
CHECKPOINT_FORMAT = 1  # of all that this project puts into a checkpoint; a checkpoint of another one is refused


class AdaptedModule(Configurable, LightningModule):
    """A LightningModule whose attribute named `adapter_attribute` holds a model that a plan can adapt.

    Arguments are those of `PolicyModule`.

    Raises:
        ConfigError: If a learning rate is impossible.
    """

    adapter_attribute: str = "model"

    def __init__(
        self,
        *,
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_full: float | None = None,
        lr_lora: float = 1e-4,
        schedule: LearningRateSchedule | None = None,
    ) -> None:
        super().__init__()
        self.quantization = quantization
        self.optimization = Optimization(optimizer, lr_full, lr_lora, schedule or ConstantSchedule())
        self.plan: AdapterPlan | None = None
        self.keep_start_weights = True
        self._base_digest: str | None = None
        self.weights = Weights()  # how the model computes where a strategy has split its weights
        # Checkpoints lack the frozen base; `load_state_dict` checks that all trainable weights are there.
        self.strict_loading = False

    def _describe_hyperparameters(self) -> None:
        """Save the constructor's arguments, defaults included, as plain data from which a checkpoint can rebuild the module."""
        if "_instantiator" not in self.hparams:  # the module was made in Python; the command line saves its config instead
            plain = describe_arguments(dict(self.hparams))
            plain["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
            self._set_hparams(plain)
            self._hparams_initial = self._to_hparams_dict(plain)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of the parameter groups, `full` and `lora`."""
        return self.optimization.rates(self.adapter_target)

    @property
    def adapter_target(self) -> nn.Module:
        """The model, adapted or not."""
        target = getattr(self, self.adapter_attribute)
        assert isinstance(target, nn.Module)
        return target

    @property
    def model_device(self) -> torch.device:
        """Where the model computes. The module itself is moved there only after the setup hooks."""
        return self.trainer.strategy.root_device if self.weights.sharded else next(self.adapter_target.parameters()).device

    @property
    def base_digest(self) -> str:
        """Digest of the model without an adapter."""
        if self._base_digest is None:
            assert self.plan is None, "the digest is taken before the adapter is applied"
            self._base_digest = model_digest(self.adapter_target)
        return self._base_digest

    def set_model(self, model: nn.Module, is_copy: bool = False) -> None:
        """Compute with another model from now on: with this one adapted or split, or with a copy of it."""
        setattr(self, self.adapter_attribute, model)
        self.weights = weights_of(model)

    def _backend(self) -> Backend | None:
        """The backend of the model's engine, where it has an engine."""
        return None

    def adapt(self, plan: AdapterPlan, keep_start_weights: bool = True) -> None:
        """Apply a plan; applying the same plan again does nothing.

        Args:
            plan: Which modules are trained fully and which by LoRA.
            keep_start_weights: Keep the frozen originals of fully trained modules, so that the start policy stays available.

        Raises:
            PlanError: If another plan is applied already, or the plan belongs to another model.
            ConfigError: If the base is to be quantized and the plan leaves nothing of it frozen.
        """
        if self.plan is not None:
            if self.plan.digest != plan.digest:
                raise PlanError(
                    f"the model is adapted by plan {self.plan.digest[:12]} and cannot take plan {plan.digest[:12]} as well; load "
                    "the model anew"
                )
            return
        if plan.model_digest != self.base_digest:
            raise PlanError(
                f"the plan was made for model {plan.model!r} (digest {plan.model_digest[:12]}), but this model has digest "
                f"{self.base_digest[:12]}; use the same model, revision and dtype, or make a new plan with the score command"
            )
        if self.quantization is not None:
            # On the device that trains: devices may round a weight differently, and a resumed run must have the same base.
            device = None if self._trainer is None else self.trainer.strategy.root_device
            quantize_base(self.adapter_target, self.quantization, plan.full_modules, device)
        from hybrid_lightning.adapters.apply import apply_plan  # PEFT is slow to import

        dtype = self._trained_dtype()
        self.set_model(apply_plan(self.adapter_target, plan, keep_start_weights, dtype, self._backend()))
        self.plan, self.keep_start_weights = plan, keep_start_weights

    @contextmanager
    def start_policy(self) -> Iterator[None]:
        """Within this context the model computes as it did before adaptation; there is no second copy of it in memory."""
        if self.plan is None:
            yield
            return
        from hybrid_lightning.adapters.apply import adapter_disabled  # PEFT is slow to import

        with adapter_disabled(cast("PeftModel", self.adapter_target)):
            yield

    def setup(self, stage: str) -> None:
        """Let the strategy write checkpoints whole or not at all."""
        write_whole_files(self.trainer.strategy)

    def configure_model(self) -> None:
        """Let an FSDP strategy split the adapted model over ranks; Lightning calls this after all setup hooks."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, (FSDP2Strategy, FSDP1Strategy)):
            assert self.base_digest  # computed now, while this rank has all weights
            self.set_model(strategy.shard(self.adapter_target))
            self.on_sharded()

    def on_sharded(self) -> None:
        """Called on all ranks together, when the model has been split and lies on its device."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Two parameter groups, `full` and `lora`, each with its learning rate."""
        from hybrid_lightning.adapters.apply import parameter_groups  # PEFT is slow to import

        full, lora = parameter_groups(self.adapter_target)
        rates = self.rates
        if self.optimization.lr_full is None and full and lora:
            rank_zero_info(f"lr_full: {rates['full']:.3g}, from lr_lora={rates['lora']:g} and the hidden size")
        groups = {"full": (list(full.values()), rates["full"]), "lora": (list(lora.values()), rates["lora"])}
        return build_optimizer(
            self.optimization.optimizer, groups, self.optimization.schedule, self.trainer.estimated_stepping_batches
        )  # type: ignore[return-value]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trainable weights alone, key the optimizer's state by their names, and add plan and base model."""
        trainable = trained_names(self)
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trainable}
        if "optimizer_states" in checkpoint:
            names = parameter_names(self)
            states = zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [name_optimizer_state(state, optimizer, names) for state, optimizer in states]
        state = new_state(self.plan, self.base_digest) | self._trained_as()
        checkpoint[CHECKPOINT_KEY] = state | {"keep_start_weights": self.keep_start_weights}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Apply the checkpoint's plan, unless it is applied already.

        The optimizer takes moments and counters from the checkpoint, and hyper-parameters from this run.

        Raises:
            CheckpointError: If the checkpoint was written with another base model or plan, or by another program.
        """
        saved = adapter_state(checkpoint)
        if saved["base_digest"] != self.base_digest:
            raise CheckpointError(
                f"the checkpoint belongs to a base model with digest {saved['base_digest'][:12]}, but the model loaded now has "
                f"{self.base_digest[:12]}; give the same model.model, model.revision and model.dtype as in the run's config.yaml"
            )
        resumed = self._trainer is not None and self.trainer.state.fn == "fit"
        plan = None if saved["plan"] is None else AdapterPlan.from_dict(saved["plan"])
        if plan is None and self.plan is not None:
            raise CheckpointError("the checkpoint was saved without an adapter; resume it without HybridAdapterSetup")
        if plan is not None:
            if resumed:
                self._check_resumable(saved)
            if self.plan is not None and self.plan.digest != plan.digest:
                raise CheckpointError(
                    f"the checkpoint was trained with adapter plan {plan.digest[:12]}, but plan {self.plan.digest[:12]} is "
                    "applied; remove adapter.plan (the checkpoint brings its own), or start a new run"
                )
            self.adapt(plan, saved["keep_start_weights"])
        if resumed:
            for state in checkpoint.get("optimizer_states", []):
                state["param_groups"] = with_hyper_parameters(state["param_groups"], self.optimization.optimizer, self.rates)

    def _trained_dtype(self) -> torch.dtype:
        return torch.float32 if self._trainer is None else dtype_of_precision(str(self.trainer.precision))

    def _check_resumable(self, saved: Mapping[str, Any]) -> None:
        mine = self._trained_as()
        if saved["quantization"] != mine["quantization"]:
            raise CheckpointError(
                f"the checkpoint was trained with model.quantization={saved['quantization'] or 'null'}, but it is "
                f"{mine['quantization'] or 'null'} now; give the same, or start a new run"
            )
        if saved["trained_dtype"] != mine["trained_dtype"]:
            raise CheckpointError(
                f"the checkpoint has trained weights of {saved['trained_dtype']}, and trainer.precision={self.trainer.precision} "
                f"trains them as {mine['trained_dtype']}; give the precision of the run that wrote it (bf16-true is that of "
                "bfloat16), or start a new run"
            )

    def _trained_as(self) -> dict[str, str | None]:
        """What a run that resumes this one has to have, too."""
        quantization = None if self.quantization is None else type(self.quantization).__name__
        return {"quantization": quantization, "trained_dtype": str(self._trained_dtype())}

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **options: Any) -> Self:  # noqa: N805
        """Make a module from a checkpoint as Lightning does, and also from the folder of a sharded checkpoint.

        Raises:
            CheckpointError: If the folder is incomplete, or the checkpoint belongs to another model.
        """
        if is_sharded_checkpoint(checkpoint_path):  # Lightning cannot read it
            content = read_weights(Path(checkpoint_path))
            checkpoint_path = io.BytesIO()
            torch.save(content, checkpoint_path)
            checkpoint_path.seek(0)
        module: Self = super().load_from_checkpoint(checkpoint_path, *arguments, **options)
        return module

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; CheckpointError if a trainable one lacks, or the model lacks one, whatever `strict` says."""
        trainable = trained_names(self)
        missing = sorted(trainable - state_dict.keys())
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} trainable weights, such as {missing[0]!r}; it belongs to another model"
            )
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        if result.unexpected_keys:
            raise CheckpointError(
                f"the checkpoint has {len(result.unexpected_keys)} weights that this model lacks, such as "
                f"{result.unexpected_keys[0]!r}; it belongs to another model"
            )
        return _IncompatibleKeys([], [])


def new_state(plan: AdapterPlan | None, base_digest: str) -> dict[str, Any]:
    """The entry of a checkpoint that names its plan and base model."""
    return {"format": CHECKPOINT_FORMAT, "plan": None if plan is None else plan.to_dict(), "base_digest": base_digest}


def adapter_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a checkpoint that names its plan and base model; CheckpointError if there is none, or of another format."""
    if CHECKPOINT_KEY not in checkpoint:
        raise CheckpointError("the checkpoint was not written by hybrid_lightning: it names no adapter plan and base model")
    state = checkpoint[CHECKPOINT_KEY]
    assert isinstance(state, dict)
    if state.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {state.get('format')}, and this version reads {CHECKPOINT_FORMAT}; resume it with the "
            "version that wrote it, or start a new run"
        )
    return state
