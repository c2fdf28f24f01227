"""The runs of which memory is planned and measured: models and sizes. Only the standard library is imported here."""

from dataclasses import dataclass, replace
from typing import Any

SHARES = {"FFT": 1.0, "LoRA": 0.0, "hybrid 10%": 0.1}
METHODS = tuple(SHARES)

# Random weights; the name of the config's class in transformers, and what it is made with.
_COMMON = {"max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _llama_like(
    kind: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, shared: int, tied: bool, **more: Any
) -> tuple[str, dict[str, Any]]:
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": shared, "tie_word_embeddings": tied}
    return kind, {**_COMMON, **sizes, **attention, **more}


SHAPES = {
    "wide vocabulary": _llama_like("LlamaConfig", 128256, 128, 384, 4, 4, 2, tied=True),
    "untied": _llama_like("LlamaConfig", 32000, 256, 688, 8, 8, 8, tied=False),
    "40 layers": _llama_like("LlamaConfig", 8000, 192, 512, 40, 6, 2, tied=True),
    "biases": _llama_like("LlamaConfig", 16000, 384, 1024, 10, 6, 6, tied=False, attention_bias=True, mlp_bias=True),
    "Qwen2": _llama_like("Qwen2Config", 50000, 320, 896, 12, 10, 2, tied=True),
    "Qwen3": _llama_like("Qwen3Config", 30000, 256, 768, 16, 8, 4, tied=True, head_dim=64),
    "Gemma": _llama_like("GemmaConfig", 64000, 256, 1024, 6, 4, 1, tied=True, head_dim=128),
    "Gemma2": _llama_like("Gemma2Config", 64000, 256, 1024, 6, 4, 2, tied=True, head_dim=64),
    "GPT-2": (
        "GPT2Config",
        {
            "vocab_size": 50257,
            "n_embd": 384,
            "n_layer": 6,
            "n_head": 6,
            "n_positions": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}
MODELS = ("embedded", "SmolLM2-135M", *SHAPES)


@dataclass(frozen=True)
class MemoryCase:
    """One run: two optimizer steps or more, every completion of full length and every row with an advantage."""

    model: str
    method: str = "LoRA"
    precision: str = "32-true"  # or bf16-mixed, with a base in bfloat16
    prompts: int = 4  # P: prompts in a rollout, of all ranks together
    samples: int = 4  # G: completions of each
    prompt_tokens: int = 32
    new_tokens: int = 32
    rank: int = 16
    minibatches: int = 1
    max_tokens: int | None = None
    checkpointing: bool = False
    keep_start_weights: bool = True
    kl_coef: float = 0.0
    validates: bool = False
    strategy: str | None = None  # ddp, fsdp2 or fsdp1, on two processes

    @property
    def dtype(self) -> str:
        """Of the base."""
        return "float32" if self.precision == "32-true" else "bfloat16"

    @property
    def folder(self) -> str:
        """The name of its model's."""
        return f"{self.model.replace(' ', '_')}-{self.dtype}"

    @property
    def ranks(self) -> int:
        """Processes."""
        return 1 if self.strategy is None else 2

    @property
    def name(self) -> str:
        """What the case is, in a few words."""
        usual = MemoryCase(self.model)
        said = {
            "minibatches": f"{self.minibatches} minibatches",
            "max_tokens": f"passes of {self.max_tokens} tokens",
            "checkpointing": "gradient checkpointing",
            "keep_start_weights": "no start weights",
            "kl_coef": "KL",
            "validates": "validation",
            "strategy": f"{(self.strategy or '').upper()} on 2 processes",
        }
        more = [text for field, text in said.items() if getattr(self, field) != getattr(usual, field)]
        sizes = f"{self.prompts} x {self.samples}, {self.prompt_tokens} + {self.new_tokens} tokens"
        return ", ".join([self.method, self.precision, sizes, *more])


_PRODUCTS = MemoryCase("embedded", prompts=32, samples=8, prompt_tokens=6, new_tokens=20, rank=8, minibatches=2, validates=True)
_MAIN = MemoryCase("SmolLM2-135M", precision="bf16-mixed", samples=8, prompt_tokens=128, new_tokens=64, validates=True)
_SHORT = MemoryCase("SmolLM2-135M", precision="bf16-mixed")
_NARROW = {"precision": "bf16-mixed"}


def _cases() -> list[MemoryCase]:
    embedded = [replace(_PRODUCTS, method=method, precision=p) for p in ("32-true", "bf16-mixed") for method in METHODS]
    tiny = MemoryCase("embedded", prompts=8, samples=8, prompt_tokens=24, new_tokens=40, rank=8)
    embedded += [
        replace(tiny, method="hybrid 10%", checkpointing=True),
        replace(tiny, method="FFT", max_tokens=500),
        replace(tiny, samples=16, kl_coef=0.01, **_NARROW),
        replace(tiny, method="FFT", strategy="fsdp2"),
        replace(tiny, strategy="ddp"),
    ]
    smollm2 = [replace(_MAIN, method=method) for method in METHODS] + [
        replace(_SHORT, method="FFT", precision="32-true"),
        replace(_SHORT, method="hybrid 10%", precision="32-true", samples=8),
        replace(_SHORT, checkpointing=True, prompt_tokens=128),
        replace(_SHORT, method="FFT", checkpointing=True, keep_start_weights=False),
        replace(_SHORT, method="hybrid 10%", max_tokens=256, kl_coef=0.01),
        replace(_SHORT, prompts=2, samples=16, prompt_tokens=512, new_tokens=16),
        replace(_SHORT, strategy="ddp"),
        replace(_SHORT, method="FFT", strategy="fsdp2"),
        replace(_SHORT, method="hybrid 10%", strategy="fsdp2"),
    ]
    shapes = [
        MemoryCase("wide vocabulary"),
        MemoryCase("wide vocabulary", "FFT", **_NARROW),
        MemoryCase("untied", "hybrid 10%", samples=8),
        MemoryCase("untied", "FFT", strategy="fsdp2"),
        MemoryCase("untied", strategy="fsdp1"),
        MemoryCase("untied", strategy="ddp", **_NARROW),
        MemoryCase("40 layers", samples=8),
        MemoryCase("40 layers", "FFT", max_tokens=300, **_NARROW),
        MemoryCase("biases", "hybrid 10%", **_NARROW),
        MemoryCase("Qwen2", samples=8),
        MemoryCase("Qwen2", "FFT", checkpointing=True, **_NARROW),
        MemoryCase("Qwen2", strategy="fsdp2", **_NARROW),
        MemoryCase("Qwen3", "FFT", samples=8),
        MemoryCase("Qwen3", prompt_tokens=256, new_tokens=64, **_NARROW),
        MemoryCase("Gemma", "FFT", minibatches=2),
        MemoryCase("Gemma2", **_NARROW),
        MemoryCase("GPT-2", "hybrid 10%"),
        MemoryCase("GPT-2", "FFT", kl_coef=0.01, **_NARROW),
    ]
    return [*embedded, *smollm2, *shapes]


CASES = _cases()
