"""Worker: a policy whose completions come from one of the rollout engines, with what each takes in time and memory.

sampler       ours, in the training process, with the weights that are trained
vllm          vLLM in the training process
server        a vLLM server, which the parent has started
transformers  `generate` of transformers, with the model that is trained, LoRA beside its weights
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from run_ours import Gated, build_policy, train
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from worker import Gate, Settings, host_memory

from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.adapters.scorers import Random
from hybrid_lightning.callbacks import HybridAdapterSetup, StepTimer
from hybrid_lightning.policy.module import PolicyModule
from hybrid_lightning.rollout import Sampler, VLLMSampler
from hybrid_lightning.rollout.batching import pad_left
from hybrid_lightning.rollout.rollout_engine import PolicyWeights, RolloutEngine, ServedModel, WeightsVersion
from hybrid_lightning.types import Prompt, Rollouts, Sequences

# What engines join into one layer, by the ends of its parts' names.
JOINED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_OTHER_VERSION = 2**20  # added to the step of weights that are sent once more, or the engine would leave them out


class ChosenLogprobs(LogitsProcessor):
    """Notes the log-probability of each token that `generate` chooses: it is told the token one call after the logits."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Args: tokens so far [B, S + t], logits [B, V]."""
        self.note(input_ids[:, -1])
        self._last = scores.float().log_softmax(dim=-1)
        return scores

    def note(self, tokens: Tensor) -> None:
        """Args: the tokens [B] that were chosen from the last logits."""
        if self._last is not None:
            self.columns.append(self._last.gather(1, tokens[:, None]))


class TransformersSampler(RolloutEngine):
    """Samples by `generate` of transformers, from the model as it is: nothing is prepared, and LoRA is not merged."""

    has_own_weights = True  # so that it is called without what our sampler prepares; an update has nothing to do
    version: WeightsVersion | None = None

    def update(self, weights: PolicyWeights, model: ServedModel, everything: bool) -> None:
        """Note the version."""
        self.version = weights.version

    @torch.no_grad()
    def sample(
        self,
        engine: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        samples_per_prompt: int,
        *,
        generator: Any = None,
        greedy: bool = False,
        stops: Any = None,
        on_token: Any = None,
    ) -> Rollouts:
        """See `RolloutEngine`; random numbers are torch's."""
        assert not greedy and self.keeps_all_tokens and self.temperature == 1, "nothing else is measured"
        device = next(engine.model.parameters()).device
        ends = (stops or self.stops(tokenizer)).ids
        pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        ids, mask = pad_left(prompt_ids, pad, device)
        chosen = ChosenLogprobs()
        made = engine.model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=samples_per_prompt,
            do_sample=True,
            top_k=0,
            eos_token_id=list(ends),
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([chosen]),
        )
        chosen.note(made[:, -1])
        tokens = made[:, ids.shape[1] :]
        ended = torch.isin(tokens, torch.tensor(ends, device=device))
        kept = ended.long().cumsum(dim=1) - ended.long() == 0  # up to and with the first that ends it
        rows = [row[:length] for row, length in zip(tokens.tolist(), kept.sum(dim=1).tolist(), strict=True)]
        finished = ended.any(dim=1)
        return Rollouts(
            tuple(prompts),
            Sequences(
                ids.repeat_interleave(samples_per_prompt, dim=0),
                mask.repeat_interleave(samples_per_prompt, dim=0),
                tokens,
                kept,
            ),
            self.completions(tokenizer, prompt_ids, rows, finished.tolist()),
            torch.cat(chosen.columns, dim=1).where(kept, 0.0),
            finished,
            samples_per_prompt,
        )


class Watch:
    """Times the updates of an engine, and repeats them to measure more.

    Args:
        engine: Whose method `update` is from now on called through this object.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._update = engine.update
        engine.update = self._timed  # type: ignore[method-assign]
        self._last: tuple[Any, ServedModel] | None = None
        self._seconds = 0.0

    def _timed(self, weights: PolicyWeights, model: ServedModel, everything: bool) -> None:
        begin = time.perf_counter()
        self._update(weights, model, everything)
        self._seconds += time.perf_counter() - begin
        self._last = weights, model

    def seconds(self) -> float:
        """Of all updates since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def repeat(self, everything: bool) -> float:
        """Send the policy's weights of now once more, all or those that training changes; seconds that it takes."""
        assert self._last is not None
        weights, model = self._last
        weights.version = WeightsVersion(weights.version.step + _OTHER_VERSION, weights.version.digest)
        begin = time.perf_counter()
        self._update(weights, model, everything)
        return time.perf_counter() - begin

    def memory(self, everything: bool) -> dict[str, int]:
        """Bytes that this process allocates meanwhile, at most, and of the largest layer that is sent, in float32."""
        assert self._last is not None
        allocated = peak_allocated(lambda: self.repeat(everything))
        return {"allocated": allocated, "largest": largest_joined(self._last[0].shapes(everything))}


def peak_allocated(work: Callable[[], object]) -> int:
    """Most bytes that a function has allocated and not yet freed, on all devices together, beside what was there before."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def largest_joined(shapes: dict[str, tuple[int, ...]]) -> int:
    """Bytes in float32 of the largest layer as an engine has it: q, k and v are one, and so are gate and up."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        layer = f"{parent}.{JOINED.get(last, last)}.{kind}"
        sizes[layer] = sizes.get(layer, 0) + 4 * torch.Size(shape).numel()
    return max(sizes.values())


class Measured(Gated):
    """Reports of each rollout what the engine took, and after it measures updates with all weights.

    Args:
        gate: Lets a step through.
        optimizer_steps: Of a rollout.
        timer: Its clock has the phases.
        engine: That samples.
        last: Number of the last step that is wanted, in which the memory of an update is measured, too; None: no update is
            repeated, so that a step holds nothing but itself.
    """

    def __init__(self, gate: Gate, optimizer_steps: int, timer: StepTimer, engine: RolloutEngine, last: int | None) -> None:
        super().__init__(gate, optimizer_steps)
        self.timer, self.engine, self.last = timer, engine, last
        self.watch = Watch(engine)
        self.differences: list[Tensor] = []
        self.beside_s = self.generate_s = 0.0
        self.number = 0

    def on_train_batch_start(self, trainer: LightningTrainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare the log-probabilities of sampling with those of a forward pass of ours, under the same weights."""
        assert isinstance(pl_module, PolicyModule)
        begin, trained = time.perf_counter(), batch.old_logprobs
        if trained is None:  # the policy is still the one that sampled
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                trained, _ = pl_module.logprobs(batch.sequences)
        self.differences.append((trained - batch.sampling_logprobs)[batch.sequences.completion_mask].abs())
        self.beside_s += time.perf_counter() - begin

    def details(self, trainer: LightningTrainer) -> dict[str, Any]:
        """Of the step that has just ended, and what is measured only now."""
        if self.gate.cuda:
            torch.cuda.synchronize()
        step_s = time.perf_counter() - self.gate.begin - self.beside_s
        update_s, generate_s = self.watch.seconds(), self.timer.clock.seconds().get("generate", 0.0)
        differences = torch.cat(self.differences)
        found: dict[str, Any] = {
            "step_s": step_s,
            "generate_s": generate_s - self.generate_s - update_s,
            "update_s": update_s,  # the first starts the engine, the others send what training has changed
            "difference": {"mean": float(differences.mean()), "max": float(differences.max()), "tokens": len(differences)},
            "peak": self.peak(),  # before what is measured beside
        }
        if self.last is not None and not isinstance(self.engine, Sampler | TransformersSampler):
            found["update_all_s"] = self.watch.repeat(everything=True)
            if self.number == self.last:
                found["update_memory"] = {name: self.watch.memory(name == "all") for name in ("all", "changed")}
        self.number, self.generate_s, self.beside_s = self.number + 1, generate_s, 0.0
        self.differences.clear()
        return found

    def peak(self) -> int:
        """Bytes: resident in this process, or with CUDA those of torch's tensors, at most so far."""
        return torch.cuda.max_memory_allocated() if self.gate.cuda else host_memory()["cpu_peak"]


def build_sampler(side: str, max_new_tokens: int, url: str, context: int | None) -> RolloutEngine:
    """The engine of that side; a server is at `url`, and one in process has this longest prompt with completion."""
    if side == "vllm":
        return VLLMSampler(max_new_tokens=max_new_tokens, max_model_len=context)
    if side == "server":
        from hybrid_lightning.rollout import VLLMServerSampler

        return VLLMServerSampler(urls=[url], max_new_tokens=max_new_tokens)
    return {"sampler": Sampler, "transformers": TransformersSampler}[side](max_new_tokens=max_new_tokens)


def main() -> None:
    """Train until the parent wants no more steps."""
    settings = Settings.from_arguments()
    workload = settings.workload
    torch.set_num_threads(settings.threads)
    gate = Gate(settings.device)
    asked = json.loads((settings.folder / "engines.json").read_text())
    engine = build_sampler(settings.side, workload.max_new_tokens, asked["url"], asked["context"])

    def build(**arguments: Any) -> PolicyModule:
        return PolicyModule(**{**arguments, "sampler": engine})

    policy = build_policy(settings, cast(type[PolicyModule], build))
    timer = StepTimer()
    # Scored by chance, which takes no rollouts: all sides train the same modules.
    adapter = HybridAdapterSetup(
        budget=ModuleBudget(share=asked["share"]), scorer=Random(), rank=workload.rank, alpha=workload.alpha
    )
    last = settings.rollouts - 1 if asked["measure_updates"] else None
    train(settings, policy, [timer, adapter, Measured(gate, workload.minibatches, timer, policy.sampler, last)])


if __name__ == "__main__":
    main()
