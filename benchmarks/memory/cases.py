"""The runs to plan and to measure: models and sizes. Only the standard library is imported here."""

from dataclasses import dataclass, replace

from benchmarks.workloads import SMOLLM2, Workload

SHARES = {"FFT": 1.0, "LoRA": 0.0, "hybrid 10%": 0.1}
METHODS = tuple(SHARES)
ROLLOUTS = 2  # of each run
MODELS = {"embedded": "embedded", "SmolLM2-135M": SMOLLM2}


@dataclass(frozen=True)
class MemoryCase:
    """One run of two optimizer steps or more, in which every completion has the full length and every row has an advantage."""

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
    strategy: str | None = None  # ddp or fsdp2, on two processes
    device: str = "cpu"  # or cuda

    @property
    def dtype(self) -> str:
        return "float32" if self.precision == "32-true" else "bfloat16"

    @property
    def prepared(self) -> Workload:
        """Model and prompts, as in the other comparisons."""
        name = f"{self.model}-{self.dtype}-{self.prompt_tokens}"
        sizes = (self.prompts, self.samples, self.prompt_tokens, self.new_tokens, self.new_tokens)
        return Workload(name, *sizes, model=MODELS.get(self.model, ""), dtype=self.dtype)

    @property
    def name(self) -> str:
        """Name of the case, in a few words."""
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
_TINY = MemoryCase("embedded", prompts=8, samples=8, prompt_tokens=24, new_tokens=40, rank=8)
_MAIN = MemoryCase("SmolLM2-135M", precision="bf16-mixed", samples=8, prompt_tokens=128, new_tokens=64, validates=True)
_SHORT = MemoryCase("SmolLM2-135M", precision="bf16-mixed")
_NARROW = {"precision": "bf16-mixed"}
CASES = [
    *(replace(_PRODUCTS, method=method, precision=p) for p in ("32-true", "bf16-mixed") for method in METHODS),
    replace(_TINY, method="hybrid 10%", checkpointing=True),
    replace(_TINY, method="FFT", max_tokens=500),
    replace(_TINY, samples=16, kl_coef=0.01, **_NARROW),
    replace(_TINY, method="FFT", strategy="fsdp2"),
    replace(_TINY, strategy="ddp"),
    *(replace(_MAIN, method=method) for method in METHODS),
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
