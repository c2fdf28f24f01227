"""A cheap fingerprint of a model's weights, by which a plan or a checkpoint recognises its base model."""

import hashlib
import math

import torch
from torch import nn

from hybrid_lightning.errors import ModelError

SAMPLES_PER_PARAMETER = 1024


def model_digest(model: nn.Module) -> str:
    """Fingerprint a model before it is adapted, quantized or sharded.

    Hashed are name, shape and dtype of every parameter and at most 1024 of its values at a fixed stride, so that it
    takes seconds for any size of model and does not depend on the device.

    Args:
        model: the base model, with real weights.

    Returns:
        The SHA-256 as 64 hexadecimal digits.

    Raises:
        ModelError: if weights are on the meta device.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ModelError(f"parameter {name} has no values yet (meta device): load the weights before the digest.")
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        sha.update(_sample_bytes(parameter))
    return sha.hexdigest()


def _sample_bytes(parameter: torch.Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    # an odd stride: an even one would look at the same few columns of every row of a matrix
    stride = math.ceil(flat.numel() / SAMPLES_PER_PARAMETER) | 1
    return flat[::stride].contiguous().cpu().view(torch.uint8).numpy().tobytes()
