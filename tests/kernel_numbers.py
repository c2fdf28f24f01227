"""Numbers for kernels, and how near to the exact result theirs have to be."""

import torch

DTYPES = [torch.float32, torch.bfloat16]


def made(*shape, dtype, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_near(found, exact, dtype, roundings=1):
    """Within a rounding of bfloat16 or 10 of float32. Sums of differently signed numbers add roundings of the largest number."""
    assert found.dtype == dtype and found.shape == exact.shape
    step, share = (2.0**-8, 1 / 8) if dtype == torch.bfloat16 else (10 * 2.0**-24, 2)
    bound = roundings * step
    torch.testing.assert_close(found.double(), exact, atol=bound * share * float(exact.abs().max()), rtol=bound)


def kept(module, inputs):
    """Bytes that a module keeps for its backward pass, beside its weights."""
    storages, own = {}, {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(inputs)
    return sum(size for place, size in storages.items() if place not in own)
