"""`Policy`: a causal language model that completes prompts and is trained, as a plain object without a Trainer.

    Pretrained -> load -> adapt (plan) -> shard (FSDP2)

Each arrow changes the model in it: the weights are read, an adapter is added, the weights are split over ranks. The runner and
`weights`, which define how to compute with the model, change with it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from hybrid_lightning.adapters.plan import AdapterPlan, model_digest
from hybrid_lightning.errors import PlanError
from hybrid_lightning.model.precision import autocast_of, checkpoint_gradients, evaluation_mode, why_float32, widen
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.model.quantization import Quantization, quantize_base
from hybrid_lightning.runner import HALF, autocast_dtype
from hybrid_lightning.sharding.weights import Weights, weights_of
from hybrid_lightning.shared.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftModel

    from hybrid_lightning.runner import ModelRunner  # with PEFT, which is slow to import


class Policy:
    """A causal language model with its runner and tokenizer.

    Args:
        pretrained: Config, tokenizer and weights to start from.
        quantization: Quantizes the frozen base when the model is adapted; None keeps it as it is.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        precision: Makes a context with the precision of a run; None takes the precision of the model's dtype.
        on_model: Called with the model each time it is replaced; a LightningModule registers it this way, for example.

    Attributes:
        plan: The plan that adapted the model; None before adaptation.
        keep_start_weights: Whether the frozen originals of fully trained modules are kept.
        weights: How to compute with the model where its weights may be split over ranks.
        base_parameters: Number of parameters of the model without an adapter, once it is loaded.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        quantization: Quantization | None = None,
        gradient_checkpointing: bool = False,
        precision: Callable[[], AbstractContextManager[Any]] | None = None,
        on_model: Callable[[nn.Module], None] = lambda model: None,
    ) -> None:
        self.pretrained, self.quantization, self.gradient_checkpointing = pretrained, quantization, gradient_checkpointing
        self.plan: AdapterPlan | None = None
        self.keep_start_weights = True
        self.weights = Weights()
        self.base_parameters = 0
        self._precision, self._on_model = precision, on_model
        self._model: nn.Module | None = None
        self._runner: ModelRunner | None = None
        self._base_digest: str | None = None
        self._device: torch.device | None = None
        self._has_chosen = False  # whether `choose_products` has chosen

    # ---- the model, which is loaded on first use

    @property
    def is_loaded(self) -> bool:
        """Whether the weights have been loaded."""
        return self._model is not None

    def load(self) -> None:
        """Load the weights, if that has not been done yet.

        Raises:
            ModelError: If the model cannot be loaded.
        """
        if self.is_loaded:
            return
        quiet_libraries()
        from hybrid_lightning.runner import ModelRunner  # here, since it imports PEFT, which takes a second

        loaded = self.pretrained.load()
        self._runner = ModelRunner(loaded)
        self.base_parameters = sum(parameter.numel() for parameter in loaded.parameters())
        if self.gradient_checkpointing:
            checkpoint_gradients(loaded, self._runner.backend)
        self._model = loaded
        self._on_model(loaded)

    @property
    def model(self) -> nn.Module:
        """The language model, adapted or not."""
        self.load()
        return cast(nn.Module, self._model)

    @property
    def runner(self) -> "ModelRunner":
        """The runner that computes with the model."""
        self.load()
        return cast("ModelRunner", self._runner)

    def set_model(self, model: nn.Module, is_copy: bool = False, device: torch.device | None = None) -> None:
        """Compute with another model from now on: the same model adapted or split, or a copy of it.

        If the model's weights may be on another device than the one that computes, give the computing device as well.
        """
        self._runner = self.runner.of(model, is_copy)
        self._model, self.weights, self._device = model, weights_of(model), device
        self._on_model(model)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device or next(self.model.parameters()).device

    @property
    def base_digest(self) -> str:
        """Digest of the model without an adapter."""
        if self._base_digest is None:
            assert self.plan is None, "the digest is taken before the adapter is applied"
            self._base_digest = model_digest(self.model)
        return self._base_digest

    @property
    def base_description(self) -> str:
        """Distinguishes the weights that training leaves alone from other models' weights."""
        if self.quantization is not None and self.plan is not None:  # the base is quantized when it is adapted
            return f"{self.base_digest} {self.quantization.to_config()}"
        return self.base_digest

    # ---- the adapter

    def adapt(self, plan: AdapterPlan, keep_start_weights: bool = True, device: torch.device | None = None) -> None:
        """Apply a plan; applying the same plan again does nothing.

        Args:
            plan: Which modules are trained fully and which by LoRA.
            keep_start_weights: Keep the frozen originals of fully trained modules, so that the start policy stays available.
            device: The device that trains. A base is quantized on it, because devices may round a weight differently, and a
                resumed run must have the same base. None takes the device of each weight.

        Raises:
            PlanError: If another plan is applied already, or the plan belongs to another model.
            ConfigError: If the base is to be quantized and the plan leaves no part of it frozen.
        """
        if self.plan is not None:
            if self.plan.digest != plan.digest:
                raise PlanError(
                    f"the model is adapted by plan {self.plan.digest[:12]} and cannot also take plan {plan.digest[:12]}; load "
                    "the model again"
                )
            return
        if plan.model_digest != self.base_digest:
            raise PlanError(
                f"the plan was made for model {plan.model!r} (digest {plan.model_digest[:12]}), but this model has digest "
                f"{self.base_digest[:12]}; use the same model, revision and dtype, or make a new plan with the score command"
            )
        if device is not None or self.quantization is not None:
            self.choose_products(device or self.device)  # now, so that every run changes the base from the same numbers
        if self.quantization is not None:
            quantize_base(self.model, self.quantization, plan.full_modules, device)
        from hybrid_lightning.adapters.apply import apply_plan  # PEFT is slow to import

        self.set_model(apply_plan(self.model, plan, keep_start_weights, self.runner.backend))
        self.plan, self.keep_start_weights = plan, keep_start_weights

    def shard(self, split: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
        """Let a strategy split the model over ranks; each rank computes on `device`."""
        assert self.base_digest  # computed now, while this rank has all weights
        self.choose_products(device)
        self.set_model(split(self.model), device=device)

    @contextmanager
    def start_policy(self) -> Iterator[None]:
        """Make the model compute as before adaptation, within this context and without a second copy in memory."""
        if self.plan is None:
            yield
            return
        from hybrid_lightning.adapters.apply import adapter_disabled  # PEFT is slow to import

        with adapter_disabled(cast("PeftModel", self.model)):
            yield

    # ---- how it computes

    @contextmanager
    def precision(self) -> Iterator[None]:
        """A context with the precision of the run; without a run, with the precision of the model's dtype.

        Products of 16 bits are computed in float32 where that is faster (see `choose_products`).
        """
        with self._requested_precision():
            in_float32 = self.is_loaded and self.choose_products(self.device)  # a check before a run does not load it
            with torch.autocast("cpu", enabled=False) if in_float32 else nullcontext():
                yield

    def _requested_precision(self) -> AbstractContextManager[Any]:
        return autocast_of(self.model) if self._precision is None else self._precision()

    def choose_products(self, device: torch.device) -> bool:
        """Whether 16-bit products are computed in float32 on a device. If so, weights are widened once.

        This applies to a CPU without instructions for 16-bit products. It has to be determined before a model is split.
        """
        backend = self.runner.backend
        if device.type != "cpu":
            return False
        if not self._has_chosen:
            with self._requested_precision():
                halves = autocast_dtype(device) in HALF
            if halves:
                self._has_chosen = True
                backend.why_float32 = why_float32(self.model)
                if backend.why_float32:
                    assert self.base_digest  # computed now, of the weights as they were loaded
                    widen(self.model)
        return bool(backend.why_float32)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Within this context: eval mode, no gradient, the precision of the run."""
        with evaluation_mode(self.model), torch.no_grad(), self.precision():
            yield
