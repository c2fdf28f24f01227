"""`ModelRunner`: the one object through which the rest of the project computes with a causal language model.

    runner = ModelRunner(model)
    token_logprobs(runner, sequences, temperature)           an update: shared prompts, no padding, logits block by block
    with runner.sampling(dtype):                             a rollout: weights must not change
        decoding_of(runner, ids, mask, max_new_tokens)

The code that loads the model makes its runner and passes it to everything else. `runner.passes()` lists which passes are fast,
and why the others are not; a run logs this once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import PeftModel
from torch import Tensor, nn

from hybrid_lightning.runner.attention import AttentionCalls, Packing, UnsupportedAttentionError
from hybrid_lightning.runner.attention_hook import expected_windows, try_boundaries, try_packing, why_not_shared
from hybrid_lightning.runner.backend import HALF, Backend, autocast_dtype
from hybrid_lightning.runner.compiling import why_not_compiled
from hybrid_lightning.runner.decoder import FastDecoder, Pass
from hybrid_lightning.runner.decoder_layers import KnownLayer, UnknownLayerError, known_layers
from hybrid_lightning.runner.fused_attention import FusedAttention, use_fused_attention
from hybrid_lightning.runner.fused_layers import FusedMLP, FusedRMSNorm, use_fused_layers
from hybrid_lightning.runner.fused_lora import use_fused_lora
from hybrid_lightning.runner.packing import PackedSequences
from hybrid_lightning.runner.padded import packed_rows_hidden, packs_rows, padded_hidden, why_recomputed
from hybrid_lightning.runner.passes import base_model, own_hidden
from hybrid_lightning.runner.prepacked import prepacked_weights, why_not_prepacked
from hybrid_lightning.runner.step_graphs import Graphs
from hybrid_lightning.types import Sequences

# Each pass that can be fast, in words for the user.
_WORDS = {
    "packed training": "training without padding",
    "attention by segments": "FlashAttention",
    "shared prompts": "prompt sharing in training",
    "fused layers": "fused layers",
    "CPU kernels": "CPU kernels",
    "16-bit products": "16-bit matrix products",
    "prepacked weights": "prepacked weights",
    "fast decoding": "fast decoding",
    "compiled layers": "torch.compile",
}
_ON_CPUS = ("CPU kernels", "prepacked weights")  # passes that other devices do not need
_OF_ADAPTERS = ("fused layers", "prepacked weights", "fast decoding")  # passes that only an adapted model has

# Known only once something is sampled, with the adapter enabled and layers tried.
_OF_SAMPLING = ("prepacked weights", "fast decoding", "compiled layers")


def use_fused_modules(model: nn.Module, backend: Backend) -> None:
    """Fuse all modules of an adapted model that can be fused, in place: LoRA, norms, MLPs and attention."""
    use_fused_lora(model, backend)
    use_fused_layers(model, backend)
    use_fused_attention(model, backend)


@dataclass(frozen=True)
class _Trial:
    """Result of the trial: whether and how a model can be packed."""

    calls: AttentionCalls | None  # what its layers request from attention; None if it cannot be packed
    reason: str = ""  # why it cannot be packed
    dtype: torch.dtype = torch.float32  # dtype of the products in the trial
    why_no_segments: str = ""  # why packed tokens do not attend by segments
    why_not_shared: str = ""  # why `padded_hidden` cannot read its sequences; not tried for a model that can be packed
    takes_boundaries: bool = False  # whether `packed_rows_hidden` can pack its rows


class ModelRunner:
    """A causal language model with fast passes.

    Args:
        model: Adapted or not.
        backend: The backend of its fused layers; None creates one, for a model without fused layers.

    Attributes:
        graphs: Decides whether decoding steps may be replayed from CUDA graphs.
    """

    def __init__(self, model: nn.Module, backend: Backend | None = None) -> None:
        self.model = model
        self.backend = backend or Backend()
        self.graphs = Graphs()
        self._trial: _Trial | None = None
        self._fast = FastDecoder()
        self._pass: Pass | None = None
        self._is_to_report = self._has_reported = False
        self._former: dict[str, str] = {}  # passes of the resumed run that are still to be compared with these

    def of(self, adapted: nn.Module, is_copy: bool = False) -> "ModelRunner":
        """The runner for the same model with an adapter. It keeps the results of trials, except for a copy of the model."""
        if is_copy:
            return ModelRunner(adapted, self.backend)
        runner = copy(self)
        runner.model = adapted
        return runner

    def prepare(self) -> None:
        """Try once, on a few tokens, whether the model can be packed. Call before the first pass.

        With sharded weights all ranks have to call it.
        """
        self._trial = self._trial or self._try_packing()
        self._report()

    def report(self) -> None:
        """Log once which passes are fast, at the next `prepare`: then the model is on its device and possibly sharded."""
        self._is_to_report = True

    def continues(self, passes: Mapping[str, str]) -> None:
        """Set the `passes` of the run that this one resumes. A warning follows as soon as a pass is known to differ."""
        self._former = dict(passes)

    @property
    def packs(self) -> bool:
        """Whether sequences are packed, after `prepare`."""
        return self._tried.calls is not None

    def packed(self, sequences: Sequences, completions: bool = True) -> PackedSequences:
        """Pack sequences into the layout that this model's attention uses; see `PackedSequences`. Call after `prepare`."""
        return PackedSequences(sequences, self.backend, completions, segments=not self._tried.why_no_segments)

    def decodes_by_segments(self, longest: int) -> bool:
        """Whether `SegmentDecoding` decodes; `longest` bounds the tokens of a prompt with its completion."""
        windows = expected_windows(base_model(self.model).config.get_text_config())
        return not self._tried.why_no_segments and all(window is None or window >= longest for window in windows)

    def passes(self) -> dict[str, str]:
        """Fast pass -> why it is not used, worded for the user; empty where it is. Call after `prepare`."""
        trial, device = self._tried, next(self.model.parameters()).device
        packing = "" if self.packs else trial.reason
        reasons = {
            "packed training": "" if trial.takes_boundaries else packing,
            "shared prompts": trial.why_not_shared or (packing and why_recomputed(self.model)),
            "fused layers": self._why_not_fused(),
            "CPU kernels": self.backend.why_no_operators(device, trial.dtype),
            "prepacked weights": why_not_prepacked(self.model, self.backend, trial.dtype),
            "fast decoding": self._known_layers()[1] or self._fast.why_own,
        }
        if trial.dtype in HALF or self.backend.why_float32:
            reasons["16-bit products"] = self.backend.why_float32
        if device.type != "cpu":
            reasons["attention by segments"] = packing or trial.why_no_segments
            if not reasons["fast decoding"]:
                reasons["compiled layers"] = why_not_compiled(device, trial.dtype) or self._fast.why_not_compiled
        return reasons

    def description(self) -> str:
        """One or two lines about `passes`, such as `model runner: fast decoding off: GemmaDecoderLayer is not known; ...`."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        passes = {name: why for name, why in self.passes().items() if on_cpu or name not in _ON_CPUS}
        if not self._has_adapter:
            passes |= {name: "the model has no adapter" for name in _OF_ADAPTERS if name in passes}
        off = _off(passes)
        if not off:
            return "model runner: all fast paths on"
        end = "all other fast paths on" if "" in passes.values() else "no fast path on"
        lines = [off[0], "; ".join([*off[1:], end])] if len(off) > 1 else [f"{off[0]}; {end}"]
        return "\n".join(f"model runner: {line}" for line in lines)

    @property
    def reads_padded(self) -> bool:
        """Whether `padded_hidden` and `project` give the model's own logits, after `prepare`."""
        return not self.packs and not self._tried.why_not_shared

    def predicting(self, sequences: Sequences) -> Tensor | None:
        """Hidden states [K, H] that predict the K sampled tokens of these sequences; None if the model only gives logits."""
        if self.packs:
            packed = self.packed(sequences)
            return packed.predicting(self.hidden(packed.ids, packed.positions, packed))
        if not self.reads_padded:
            return None
        with self.backend.in_pass():
            if self._tried.takes_boundaries and packs_rows(self.model, sequences):
                return packed_rows_hidden(self.model, sequences, self.backend)
            return padded_hidden(self.model, sequences)

    def hidden(self, ids: Tensor, positions: Tensor, packing: Packing, wanted: Tensor | None = None) -> Tensor:
        """Hidden states [N, H] of N packed tokens before the output layer, or [W, H] of the tokens with indices `wanted` [W].

        Positions count within each sequence, and the packing decides which tokens attend to which.
        """
        if self._pass is not None and not torch.is_grad_enabled():
            return self._pass(ids, positions, packing, wanted)
        with self.backend.in_pass():
            hidden = own_hidden(self.model, ids, positions, packing)
        return hidden if wanted is None else hidden[wanted]

    @contextmanager
    def sampling(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Prepack weights for products, and call layers directly. Within this context weights must not change.

        Products have this dtype; None means each weight's own.
        """
        self._trial = self._trial or self._try_packing()
        layers, _ = self._known_layers()
        if layers:
            self._fast.try_once(self.model, layers, self.backend, dtype)
        self._report(decodes=True)
        together = [part for layer in layers for part in layer.same_input()]
        with prepacked_weights(self.model, self.backend, dtype, together):
            self._pass = self._fast.new_pass(self.model, layers, self.backend) if layers else None
            try:
                yield
            finally:
                self._pass = None

    def _report(self, decodes: bool = False) -> None:
        if self._is_to_report and not self._has_reported:
            self._has_reported = True
            rank_zero_info(self.description())
        known = {name: self._former.pop(name) for name in [*self._former] if decodes or name not in _OF_SAMPLING}
        passes = self.passes() if known else {}
        others = [name for name, reason in known.items() if bool(reason) != bool(passes.get(name, reason))]
        if others:
            on = [_WORDS[name] for name in others if not passes[name]]
            now = "; ".join([*_off({name: passes[name] for name in others}), *([f"{_listed(on)} on"] if on else [])])
            rank_zero_warn(
                f"the runner differs from the run that this one continues ({now}), so numbers are rounded differently from here "
                "on; if that matters, continue with the same versions on the same kind of machine"
            )

    @property
    def is_prepared(self) -> bool:
        """Whether `passes` are known."""
        return self._trial is not None

    @property
    def _tried(self) -> _Trial:
        assert self._trial is not None, "the runner has to be prepared first"
        return self._trial

    @property
    def _has_adapter(self) -> bool:
        return any(isinstance(module, PeftModel) for module in self.model.modules())

    def _try_packing(self) -> _Trial:
        weight = next(self.model.parameters())
        dtype = autocast_dtype(weight.device) or weight.dtype
        why, reason = self.backend.why_no_segments(weight.device, dtype), ""
        for segments in (False,) if why else (True, False):
            try:
                calls = try_packing(self.model, self.backend, segments)
            except UnsupportedAttentionError as error:
                reason = str(error)
                why = why or reason
                continue
            if not segments or all(calls.by_segments):
                return _Trial(calls, "", dtype, why)
            why = "its layers attend as the kernels cannot"
        unshared = why_not_shared(self.model, self.backend)
        return _Trial(None, reason, dtype, why, unshared, not unshared and try_boundaries(self.model, self.backend))

    def _known_layers(self) -> tuple[list[KnownLayer], str]:
        """The decoder's layers, and an empty reason; or no layers, and why the model's own pass has to be used."""
        if self._tried.calls is None:
            return [], self._tried.reason
        try:
            return known_layers(base_model(self.model).get_decoder(), self._tried.calls, self.backend), ""
        except UnknownLayerError as error:
            return [], str(error)

    def _why_not_fused(self) -> str:
        kinds = (FusedRMSNorm, FusedMLP, FusedAttention)
        if any(isinstance(module, kinds) for module in self.model.modules()):
            return ""
        if not self._has_adapter:
            return "the model has no adapter, and only adapted models are fused"
        return f"no layer of {type(base_model(self.model)).__name__} computes the same as Llama's"


def _off(passes: Mapping[str, str]) -> list[str]:
    """For each reason a text such as `fused layers and fast decoding off: the model has no adapter`."""
    names: dict[str, list[str]] = {}
    for name, reason in passes.items():
        if reason:
            names.setdefault(reason, []).append(_WORDS[name])
    return [f"{_listed(slow)} off: {reason}" for reason, slow in names.items()]


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
