"""Sizes of a model: parameters and bytes, counted on the meta device."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from hybrid_lightning.adapters.candidates import candidate_shape, find_candidates, is_experts, without_lora
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.model.quantization import Quantization
from hybrid_lightning.sharding.parameters import decoder_blocks

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model with an adapter. Bytes of blocks include the adapter."""

    parameters: int  # of the base model
    base_bytes: int  # bytes of the base model as loaded
    frozen_bytes: int  # bytes of the base model's weights that are kept
    outside_bytes: int  # bytes of weights outside of decoder blocks: embeddings, output layer
    block_bytes: int  # bytes of the largest block
    block_gradients: int  # bytes of that block's gradients
    candidates: int  # parameters of all candidates
    full: int  # parameters of the candidates that are trained fully
    low_rank: int  # parameters of the linear modules that have LoRA
    experts: int  # parameters of the experts that have LoRA
    experts_in_layer: int  # parameters of the largest layer's experts, where experts are candidates
    trainable: int  # trained parameters, LoRA's included
    rank: int  # the largest LoRA rank

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained weights, and of their gradients."""
        return self.trainable * FLOAT32_BYTES

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.frozen_bytes + self.trained_bytes

    @property
    def share_full(self) -> float:
        """Share of the candidates' parameters that is trained fully."""
        return self.full / self.candidates


def measure_sizes(
    model: PreTrainedModel, plan: AdapterPlan, keep_start_weights: bool, quantization: Quantization | None = None
) -> ModelSizes:
    """Measure a model on the meta device, as adapted by the plan and with frozen weights quantized."""
    width = next(model.parameters()).element_size()
    blocks = decoder_blocks(model)
    in_block = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in in_block)
    owner = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    base = [sum(p.numel() for p in block.parameters()) for block in blocks]
    frozen = [numbers * width for numbers in base]
    trained = [0] * len(blocks)
    full = low_rank = experts = experts_in_layer = 0
    planned = {module.name: module for module in plan.candidates}
    candidates = find_candidates(model, named=planned)
    unquantized = without_lora(candidates)
    for name, module in candidates.items():
        number, shape = owner[id(module)], candidate_shape(module)
        mode = planned[name].mode if name in planned else "frozen"
        numbers = sum(p.numel() for p in module.parameters())
        experts_in_layer = max(experts_in_layer, numbers * is_experts(module))
        if mode == "full":
            trained[number] += numbers
            full += numbers
            if not keep_start_weights:
                frozen[number] -= numbers * width
            continue
        if mode == "lora":
            trained[number] += plan.lora_of(planned[name]).parameters(shape)
            low_rank += numbers * (not is_experts(module))
            experts += numbers * is_experts(module)
        if quantization is not None and isinstance(shape, tuple) and name not in unquantized and quantization.takes(shape):
            frozen[number] += quantized_bytes(shape) - shape[0] * shape[1] * width
    sizes = [kept + FLOAT32_BYTES * count for kept, count in zip(frozen, trained, strict=True)]
    largest = max(range(len(blocks)), key=sizes.__getitem__)
    return ModelSizes(
        parameters=outside + sum(base),
        base_bytes=(outside + sum(base)) * width,
        frozen_bytes=outside * width + sum(frozen),
        outside_bytes=outside * width,
        block_bytes=sizes[largest],
        block_gradients=FLOAT32_BYTES * trained[largest],
        candidates=sum(module.parameters for module in plan.candidates),
        full=full,
        low_rank=low_rank,
        experts=experts,
        experts_in_layer=experts_in_layer,
        trainable=sum(trained),
        rank=max(plan.ranks, default=0),
    )


def teacher_bytes(model: PreTrainedModel, quantization: Quantization | None) -> int:
    """Bytes of a frozen model on the meta device without an adapter, once its linear modules are quantized."""
    size, width = sum(p.numel() * p.element_size() for p in model.parameters()), next(model.parameters()).element_size()
    candidates = {} if quantization is None else find_candidates(model)
    shapes = [candidate_shape(candidates[name]) for name in candidates.keys() - without_lora(candidates)]
    taken = [shape for shape in shapes if isinstance(shape, tuple) and quantization is not None and quantization.takes(shape)]
    return size + sum(quantized_bytes(shape) - shape[0] * shape[1] * width for shape in taken)


def quantized_bytes(shape: tuple[int, int]) -> int:
    """Bytes of an NF4 weight of this shape: an 8-bit scale per 64 weights, a 32-bit scale per 256 scales, and two tables."""
    count = shape[0] * shape[1]
    return count // 2 + count // 64 + FLOAT32_BYTES * (count // (64 * 256) + 256 + 16)


def format_bytes(count: float) -> str:
    """Format a number of bytes for people.

    Example:
        >>> format_bytes(0), format_bytes(81_920), format_bytes(3.2e9)
        ('-', '0.1 MiB', '2.98 GiB')
    """
    if count <= 0:
        return "-"
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
