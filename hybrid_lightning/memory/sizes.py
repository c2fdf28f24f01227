"""Sizes of a model: parameters and bytes, counted on the meta device."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from hybrid_lightning.adapters.candidates import candidate_shape, find_candidates, is_experts, without_lora
from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.model.quantization import Quantization
from hybrid_lightning.runner import Trained
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
    experts_in_layer: int  # parameters of the largest layer's experts, where experts are candidates
    trainable: int  # trained parameters, LoRA's included
    trained: Trained  # what the adapter trains, for the memory of passes

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained weights, and of their gradients."""
        return self.trainable * FLOAT32_BYTES

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.frozen_bytes + self.trained_bytes


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
    lora, of_all = plan.lora, sum(module.parameters for module in plan.candidates)
    inputs = 2 if lora.dropout or lora.use_dora else int(quantization is not None)  # 2: a mask or a norm is kept as well
    plain, of_layer = quantization is None and not lora.use_dora, experts_in_layer if experts else 0
    rank = max(plan.ranks, default=0)
    return ModelSizes(
        parameters=outside + sum(base),
        base_bytes=(outside + sum(base)) * width,
        frozen_bytes=outside * width + sum(frozen),
        outside_bytes=outside * width,
        block_bytes=sizes[largest],
        block_gradients=FLOAT32_BYTES * trained[largest],
        candidates=of_all,
        experts_in_layer=experts_in_layer,
        trainable=sum(trained),
        trained=Trained(full, low_rank, sum(trained) - full, full / of_all, rank, inputs, plain, experts, of_layer),
    )


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
