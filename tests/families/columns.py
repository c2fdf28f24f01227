"""What is known of each family of models: one function a column of `docs/reference/models.md`, which finds it out by trying.

A function fails where something does not work that the table has as working. Runs are of tiny random models, on a CPU.
"""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from rounding import LOGITS, additions_of, spread
from safetensors import safe_open
from tiny_families import FAMILIES, WRAPPERS, build_family
from tiny_models import build_tokenizer, plain_logprobs
from tiny_runs import build_adapter, build_policy, fit, write_sums
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_lightning.adapters import PreconditionedTail, Random, find_candidates
from hybrid_lightning.adapters.candidates import without_lora
from hybrid_lightning.export import AdapterFolder, MergedModel, policy_of_module, write_policy
from hybrid_lightning.memory import RunSettings, TrainerFlags
from hybrid_lightning.memory.fitting import verdict
from hybrid_lightning.memory.peaks import plan_method
from hybrid_lightning.model import NF4
from hybrid_lightning.model.current_weights import CurrentWeights
from hybrid_lightning.model.pretrained import meta_model
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import SamplingRequest
from hybrid_lightning.runner import token_logprobs
from hybrid_lightning.training import PolicyModule
from hybrid_lightning.types import Prompt

ROWS = [*FAMILIES, *(name for name in WRAPPERS if name != "mistral3")]
# Architectures of these families that vLLM 0.32 has.
_TEXT = """
Llama Llama4 Mistral Ministral3 Mixtral Qwen2 Qwen3 Qwen3Moe Qwen3Next Qwen3_5 Qwen3_5Moe Gemma3 Gemma4 Glm4 Glm4Moe
GptOss DeepseekV3 Phi3 Olmo3 SmolLM3 Granite GraniteMoeHybrid SeedOss Cohere2 Exaone4 Lfm2 FalconH1 Mamba2
"""
IN_VLLM = [f"{name}ForCausalLM" for name in _TEXT.split()]
IN_VLLM += [f"{name}ForConditionalGeneration" for name in ("Qwen3_5", "Gemma3", "Gemma4")]
_TOKENS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="families-"))
    write_sums(root / "sums.jsonl")
    return root


@cache
def folder_of(family: str) -> Path:
    """A model of a family as the hub has it, with a tokenizer."""
    folder = _root() / family
    build_family(family, std=0.1).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def run(family: str, share: float, steps: int = 1, **policy: object) -> PolicyModule:
    """A run of GRPO; each step changes every trained module."""
    root, name = _root(), f"{family}-{share}-{len(policy)}"
    scorer = PreconditionedTail() if share == _SHARE else Random()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*got no gradient from the calibration losses")  # experts without a token
        adapter = build_adapter(share, scorer=scorer)
        module = fit(folder_of(family), root / "sums.jsonl", root / name, adapter, policy=policy, max_steps=steps)
    return module


_SHARE = 0.3


@cache
def hybrid(family: str) -> PolicyModule:
    """A run with a hybrid plan by scores, which also samples with what it has trained."""
    return run(family, _SHARE, steps=2)


@cache
def _plain(family: str) -> torch.nn.Module:
    """What plain transformers loads of the merged export of that run."""
    folder = write_policy(policy_of_module(hybrid(family), 2), MergedModel(), _root() / f"{family}-merged")
    return AutoModelForCausalLM.from_pretrained(folder)


@cache
def on_four_bits(family: str) -> PolicyModule:
    """A run of LoRA alone, on a base of 4 bits; the hybrid run has LoRA on another."""
    return run(family, 0.0, quantization=NF4())


def lora(family: str) -> str:
    """Which modules LoRA trains."""
    plan = on_four_bits(family).plan
    frozen = [module.name for module in plan.candidates if module.mode == "frozen"]
    assert plan.lora_modules and frozen == without_lora(frozen), "each other candidate"
    return f"all but `{frozen[0].rpartition('.')[2]}`" if frozen else "all"


def full(family: str) -> str:
    """Which modules full fine-tuning trains."""
    plan = run(family, 1.0).plan
    assert len(plan.full_modules) == len(plan.candidates)
    return "all"


def scored(family: str) -> str:
    """How many candidates a score tells apart in a hybrid plan."""
    plan = hybrid(family).plan
    assert plan.full_modules and plan.lora_modules
    assert all(m.score > 0 or min(m.shape) <= plan.lora_of(m).rank for m in plan.candidates), "what LoRA can express scores 0"
    return "yes"


def packed(family: str) -> str:
    """Whether sequences are packed."""
    return "padded" if hybrid(family).policy.runner.passes()["packed training"] else "packed"


def agreement(family: str) -> str:
    """Log-probabilities of sampling and of training equal transformers' own forward pass on the merged export."""
    module = hybrid(family)
    tokenizer, texts = module.tokenizer, ["1+2=", "3*4-5=", "7-2="]
    request = SamplingRequest(
        [Prompt(text=text) for text in texts], [tokenizer(text).input_ids for text in texts], 3, torch.Generator().manual_seed(3)
    )
    with module.policy.inference():
        rollouts = Sampler(max_new_tokens=12).sample(module.policy.runner, tokenizer, request)
        trained, _ = token_logprobs(module.policy.runner, rollouts.sequences, 1.0)
        sequences, model = rollouts.sequences, _plain(family)
        # Both passes round each sum; merging LoRA rounds each weight once more.
        bound = LOGITS * spread(2 * additions_of(model, 18)) if family not in WRAPPERS else 1e-4
        for row in range(len(sequences)):
            count = int(sequences.completion_mask[row].sum())
            expected = plain_logprobs(model, sequences, row)
            for found in (rollouts.sampling_logprobs[row, :count], trained[row, :count]):
                difference = float((found - expected).abs().max())
                assert difference < bound, f"{family}: {difference} apart, more than {bound} of rounding"
    return "yes"


def exported(family: str) -> str:
    """Merged model and adapter, as plain transformers and PEFT load them, have the logits of the policy in memory.

    An engine with its own weights is sent the weights of the folder, by its names.
    """
    module = hybrid(family)
    sent = CurrentWeights(module.model, module.policy.weights, "", 2, True).shapes(everything=True)
    with safe_open(folder_of(family) / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    assert sent == {name: shape for name, shape in stored.items() if name in sent or ".visual." not in name}
    adapter = write_policy(policy_of_module(module, 2), AdapterFolder(), _root() / f"{family}-adapter")
    base = AutoModelForCausalLM.from_pretrained(folder_of(family))
    with torch.no_grad():
        start, expected = base(_TOKENS).logits, module.policy.model(_TOKENS).logits
        merged, adapted = _plain(family)(_TOKENS).logits, PeftModel.from_pretrained(base, adapter)(_TOKENS).logits
    assert float((start - expected).abs().max()) > 0.01, "it has been trained"
    torch.testing.assert_close(adapted, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(merged, expected, atol=5e-5, rtol=0)
    return "both"


def quantized(family: str) -> str:
    """LoRA on a base of 4 bits."""
    return "yes" if any(isinstance(module, Linear4bit) for module in on_four_bits(family).model.modules()) else "no"


def planned(family: str) -> str:
    """Whether memory is predicted, or bounded from above."""
    policy = build_policy(folder_of(family))
    settings = RunSettings.of(policy, build_adapter(_SHARE), None, TrainerFlags.of({"accelerator": "cpu"}), prompt_tokens=4)
    method = plan_method(settings)
    assert method.parameters == policy.policy.pretrained.skeleton().num_parameters()
    assert " takes up to " in verdict(method, settings)
    return "bound" if method.bounds else "predicted"


def candidates(family: str) -> str:
    """The last names of the modules that can be trained, in a model of the family's default sizes."""
    return ", ".join(dict.fromkeys(f"`{name.rpartition('.')[2]}`" for name in find_candidates(_large(family))))


def frozen(family: str) -> str:
    """Share of the weights that are not candidates, also where experts are named, in a model of the family's default sizes."""
    model = _large(family)
    total = sum(parameter.numel() for parameter in model.parameters())

    def share(*named: str) -> str:
        modules = find_candidates(model, named=named).values()
        return f"{1 - sum(parameter.numel() for module in modules for parameter in module.parameters()) / total:.0%}"

    with_experts = "" if share("experts") == share() else f"; with experts {share('experts')}"
    return f"{share()} of {total / 1e9:.3g} B{with_experts}"


def in_vllm(family: str) -> str:
    """The name by which vLLM has the architecture."""
    (name,) = AutoConfig.from_pretrained(folder_of(family)).architectures
    return f"`{name}`" if name in IN_VLLM else "no"


@cache
def _large(family: str) -> torch.nn.Module:
    return meta_model(AutoConfig.for_model(family), torch.bfloat16)


COLUMNS: dict[str, Callable[[str], str]] = {
    "LoRA": lora,
    "full": full,
    "hybrid by score": scored,
    "passes": packed,
    "agreement": agreement,
    "export": exported,
    "NF4 base": quantized,
    "memory": planned,
    "vLLM": in_vllm,
    "stays frozen": frozen,
    "candidates": candidates,
}
