"""A vLLM server for tests, and policies that sample with vLLM. The ordinary suite has no vLLM; tests that need it then skip."""

import json
import os
import signal
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fork_server import Forked, free_port
from tiny_families import build_family
from tiny_models import SIZES, build_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from hybrid_lightning.adapters import AdapterPlan, LoraSettings, ModuleBudget, PlannedModule, find_candidates
from hybrid_lightning.adapters.candidates import linear_shape
from hybrid_lightning.adapters.plan import model_digest
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.rewards import ExactMatch
from hybrid_lightning.runner import token_logprobs
from hybrid_lightning.training import PolicyModule

# Sizes that vLLM's gated delta nets have on a CPU.
DELTA = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64}

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TAKES_LORA = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", *PROJECTIONS)  # options of a server

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed (docs/how-to/vllm.md); .ci/run tests with it in another environment"
)


class Server:
    """A vLLM server of the model in a folder, up once it is made, on this machine's CPU; its output is in the log."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.model, self.log, self.port, self.options = model, log, free_port(), options
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: Forked | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model), "--dtype", "float32"]
        command += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(self.port), "--enable-scale-out"]
        command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--max-num-seqs", "64"]
        command += ["--no-enable-chunked-prefill", *self.options]
        command += ["--weight-transfer-config", json.dumps({"backend": "hybrid_lightning"})]
        environment = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("ab") as output:
            self._process = Forked(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"no server within 240 s: {self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=60)


def wait_at_most(sampler, seconds: float) -> None:
    """Wait so long for servers from now on, which may need more before, where a machine is busy."""
    sampler._outage.limit = sampler.give_up_after = seconds


def policy_of(sampler, model: Path, plan: str | None = None, **options) -> PolicyModule:
    """A policy, adapted as `adapt` does if a plan is named."""
    policy = PolicyModule(GRPOLoss(), ExactMatch(), model=str(model), sampler=sampler, **options)
    if plan is not None:
        adapt(policy, plan)
    return policy


def adapt(policy: PolicyModule, plan: str, use_dora: bool = False, frozen: tuple[str, ...] = ()) -> None:
    """Adapt by `hybrid` (two modules fully, the others by LoRA), `lora` or `full`, and move the trained weights.

    LoRA has other ranks in modules that vLLM joins.
    """
    modules = find_candidates(policy.model)
    hybrid = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj")
    full, planned = {"hybrid": hybrid, "lora": (), "full": modules}[plan], []
    for place, (name, module) in enumerate(modules.items()):
        mode = "full" if name in full else "frozen" if name in frozen else "lora"
        rank = 2 + place % 4 if mode == "lora" else None
        planned.append(PlannedModule(name, linear_shape(module), module.weight.numel(), None, mode, rank))
    lora = LoraSettings(rank=4, alpha=8, use_dora=use_dora)
    policy.adapt(AdapterPlan("embedded", None, model_digest(policy.model), tuple(planned), lora, ModuleBudget().to_config()))
    move(policy)


def move(policy: PolicyModule, seed: int = 0, by: float = 0.05) -> None:
    """Change all trained weights, as training does."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draws) * by)


def own_logprobs(policy: PolicyModule, rollouts, temperature: float | None = None) -> torch.Tensor:
    """Log-probabilities of completions by the policy's own forward pass, [B, T]."""
    with policy.policy.inference():
        return token_logprobs(
            policy.policy.runner, rollouts.sequences, temperature or policy.task.generation.sampler.temperature
        )[0]


def largest_difference(policy: PolicyModule, rollouts) -> float:
    difference = (own_logprobs(policy, rollouts) - rollouts.sampling_logprobs).abs()
    return float(difference[rollouts.sequences.completion_mask].max())


def write_model(folder: Path, family: str = "llama", layers: int = 3, tied: bool = False) -> Path:
    """A random model with sizes that vLLM's attention has on a CPU, and a tokenizer that knows letters."""
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": layers, "max_position_embeddings": 64}
    sizes |= {"tie_word_embeddings": tied, **({"head_dim": 32} if family == "qwen3" else {})}
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}.get(family)
    torch.manual_seed(0)
    if config is None:
        model = build_family(family, **sizes, head_dim=32, **(DELTA if family == "qwen3_5_text" else {}))
    else:
        model = AutoModelForCausalLM.from_config(config(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (parameter.dim() > 1 and "conv" not in name) or name.endswith(
                "bias"
            ):  # biases, too, so that one that is left out shows
                # A large tied embedding would make every token predict itself.
                parameter.normal_(0, 0.1 if "layers" in name or tied else 0.5)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
