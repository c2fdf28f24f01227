"""Numbers for kernels, and how near to the exact result theirs have to be."""

import torch

DTYPES = [torch.float32, torch.bfloat16]


def made(*shape, dtype, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_near(found, exact, dtype, roundings=1):
    """Within a rounding of bfloat16, or 10 of float32, where sums of differently signed numbers add those of the largest."""
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


def assert_same_on_any_threads(compute):
    """What a function gives, a list of tensors, is the same on one, two and three threads."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compute())
    finally:
        torch.set_num_threads(before)
    for parts in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(parts, found[0], strict=True))
