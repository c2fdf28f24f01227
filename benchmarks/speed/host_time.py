"""Measures the host's work for a token, as on a GPU but on a CPU, and the compilations: `python -m benchmarks.speed.host_time`.

A narrow model with as many layers as Qwen3-0.6B runs through the passes for accelerators. Attention kernels are left out. Layer
bodies are compiled for the CPU: the code calls kernels about as code for a GPU does, but also computes them. The time of matrix
products is measured separately, since a GPU's host would only launch them.
"""

from hybrid_lightning.process import prepare_process

prepare_process()

import argparse
import logging
import sys
import time
from functools import partial
from statistics import median
from timeit import repeat
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.commands import check_at_least, command, entry
from benchmarks.tables import table
from hybrid_lightning.adapters import LoraSettings, apply_plan, find_candidates
from hybrid_lightning.adapters.budgets import ModuleBudget, plan_of_budget
from hybrid_lightning.runner import AttentionCalls, Backend, ModelRunner, base_model, compiling, decoding_of, token_logprobs
from hybrid_lightning.runner.attention import AttentionSettings
from hybrid_lightning.runner.attention_hook import use_packing
from hybrid_lightning.runner.decoder_layers import compiled_layers
from hybrid_lightning.runner.model_runner import _Trial
from hybrid_lightning.types import Sequences

LAYERS, PROMPTS, SAMPLES, LENGTH = 28, 2, 4, 16
SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
HEADER = ("adapter", "µs a layer and token, least", "median", "for products", "functions compiled", "in s", "and later")


def build_parser() -> argparse.ArgumentParser:
    parser = command("speed.host_time", __doc__)
    parser.add_argument("--steps", type=int, default=200, help="tokens of each row")
    return parser


def no_attention(*, query: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
    """Stands for FlashAttention's forward kernel: the right shapes without the numbers."""
    return torch.zeros_like(query), torch.zeros(query.shape[1], len(query)), *[torch.empty(0)] * 3


def no_gradients(*, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> list[torch.Tensor]:
    """Stands for its backward kernel, likewise."""
    return [torch.zeros_like(tensor) for tensor in (query, key, value)]


def build(share: float) -> ModelRunner:
    """The runner of a model with LoRA, in which a share of the modules is trained fully."""
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**SIZES, **heads, num_hidden_layers=LAYERS, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config).requires_grad_(False).eval()
    plan = plan_of_budget(find_candidates(model), ModuleBudget(share), LoraSettings(rank=16, alpha=32))
    backend = Backend()
    runner = ModelRunner(apply_plan(model, plan, False, backend), backend)
    use_packing(base_model(runner.model))
    runner._trial = _Trial(AttentionCalls([AttentionSettings()] * LAYERS, [True] * LAYERS))
    return runner


def measure(share: float, steps: int) -> list[str]:
    """A row of `HEADER` for an adapter: sampling and an update first, then any further compilation in validation and for other
    lengths.
    """
    compiling.CODES.clear()
    runner, begin = build(share), time.perf_counter()
    times = sample(runner, PROMPTS, steps)
    update(runner, LENGTH)
    first, seconds = len(compiling.CODES), time.perf_counter() - begin - sum(times)
    with torch.inference_mode():
        sample(runner, 1, 4)
    update(runner, 2 * LENGTH - 3)
    each = (f"{1e6 * passed / LAYERS:.0f}" for passed in (min(times), median(times), product_time(runner, steps)))
    return [*each, f"{first}", f"{seconds:.0f}", f"{len(compiling.CODES) - first}"]


def sample(runner: ModelRunner, prompts: int, steps: int) -> list[float]:
    """Processor seconds of each decoding step of all rows, after some discarded steps."""
    times, tokens = [], torch.full((prompts * SAMPLES,), 7)
    with torch.no_grad(), runner.sampling(torch.float32):
        decoding = decoding_of(runner, *rows_of(prompts, LENGTH), steps)
        decoding.prefill(SAMPLES)
        for _ in range(steps):
            begin = time.process_time()
            decoding.step(tokens)
            times.append(time.process_time() - begin)
    return times[min(5, steps - 1) :]


def product_time(runner: ModelRunner, steps: int) -> float:
    """Processor seconds of the matrix products in a step's layers, without the time of the calls (products of 2 x 2)."""
    with torch.no_grad(), runner.sampling(torch.float32):
        layers, _ = runner._known_layers()
        bodies = [body for layer in compiled_layers(layers, layers) or [] for body in (layer.before, layer.after)]
        matrices = [weight for body in bodies for weight in body.weights if weight.dim() == 2]
        found = []
        for factors in (matrices, [torch.ones(2, 2)] * len(matrices)):
            pairs = [(torch.ones(PROMPTS * SAMPLES, len(part)), part) for part in factors]
            calls = [partial(torch.mm, *pair, out=pair[0] @ pair[1]) for pair in pairs]
            times = repeat(lambda calls=calls: [call() for call in calls], time.process_time, number=1, repeat=steps)  # type: ignore
            found.append(median(times))
    return found[0] - found[1]


def update(runner: ModelRunner, length: int) -> None:
    """Forward and backward pass of all completions."""
    sequences = Sequences(*rows_of(PROMPTS * SAMPLES, length) * 2)
    token_logprobs(runner, sequences, 1.0)[0].sum().backward()  # type: ignore[no-untyped-call]


def rows_of(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask."""
    return torch.randint(3, 500, (count, length)), torch.ones(count, length, dtype=torch.bool)


def run(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "steps")
    torch.set_num_threads(1)
    logging.getLogger("hybrid_lightning").setLevel(logging.WARNING)
    with (
        mock.patch.object(compiling, "_ACCELERATORS", ("cpu",)),
        mock.patch.object(torch.ops.aten, "_flash_attention_forward", no_attention),
        mock.patch.object(torch.ops.aten, "_flash_attention_backward", no_gradients),
        mock.patch.multiple(Backend, is_cpu=lambda *_: False, usable=lambda *_: False),
        mock.patch.multiple(Backend, prepacked_product=lambda self, weight: partial(F.linear, weight=weight)),
    ):
        rows = [[name, *measure(share, arguments.steps)] for name, share in (("LoRA", 0.0), ("hybrid of 10%", 0.1))]
    print(table(HEADER, rows))


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
