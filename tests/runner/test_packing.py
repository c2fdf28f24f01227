import pytest
import torch
import torch.nn.functional as F
from tiny_models import build_model, runner_of
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_lightning.runner import Backend, PackedSequences, token_logprobs
from hybrid_lightning.types import Sequences

# Tokens of completions: none, one, and enough to fill several bands. There are three prompts; the first comes again at the end.
LENGTHS = torch.tensor([3, 0, 1, 0, 40, 2, 1, 38, 5])
PROMPT = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 0])


def build_sequences(lengths=LENGTHS, holes=False):
    torch.manual_seed(0)
    prompts = torch.randint(3, 30, (3, 5))[PROMPT]
    mask = torch.ones_like(prompts, dtype=torch.bool)
    mask[PROMPT == 1, :2] = False
    completion_mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    added = (torch.arange(completion_mask.shape[1]) + torch.arange(len(lengths))[:, None]) % 3 == 2
    sampled_mask = completion_mask & ~added if holes else completion_mask
    return Sequences(prompts, mask, torch.randint(3, 30, completion_mask.shape), completion_mask, sampled_mask=sampled_mask)


def states_of(packed, dtype=torch.float64):
    return torch.randn(len(packed.ids), 3, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("holes", [False, True])
def test_the_states_that_predict_have_the_gradient_of_plain_indexing(holes):
    packed = PackedSequences(build_sequences(holes=holes), Backend())
    hidden = states_of(packed)
    found, plain = packed.predicting(hidden), hidden[packed.predictors.numbers]
    assert len(packed.bands) > 1 and torch.equal(found, plain)
    # Sums of whole numbers are exact in any order.
    weights = torch.randint(-9, 9, found.shape).double()
    expected, given = (torch.autograd.grad((states * weights).sum(), hidden)[0] for states in (plain, found))
    assert torch.equal(given, expected)
    torch.autograd.gradcheck(packed.predicting, hidden)


def test_nothing_is_predicted_of_empty_completions_and_bfloat16_is_added_up_in_float32():
    packed = PackedSequences(build_sequences(torch.zeros_like(LENGTHS)), Backend())
    hidden = states_of(packed)
    states = packed.predicting(hidden)
    (gradient,) = torch.autograd.grad(states.sum(), hidden)
    assert len(states) == 0 and not gradient.any() and gradient.shape == hidden.shape
    # In a sum of 1 and twice 2^-8, bfloat16 loses each of the small numbers. The whole sum is exact.
    lengths = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])
    packed = PackedSequences(build_sequences(lengths), Backend())
    hidden = states_of(packed, torch.bfloat16)
    parts = torch.tensor([1, 2**-8, 2**-8], dtype=torch.bfloat16)
    states = packed.predicting(hidden)
    states.backward(parts[:, None].expand_as(states))
    assert hidden.grad[packed.last_prompt_token[0]].tolist() == [1 + 2**-7] * 3


class Additions(TorchDispatchMode):
    """Operations that add several numbers to one place, in an order that depends on timing: on a GPU, or on threads of a CPU.

    `scatter_add` is not checked: it is the backward pass of `gather`, which takes one number of each row.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.count = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += 1
        if name in ("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"):
            accumulates = args[3] if len(args) > 3 else (kwargs or {}).get("accumulate", False)
            indices = [index for index in args[1] if index is not None]
            if not accumulates or any(index.dtype == torch.bool for index in indices):  # a mask takes each number once
                indices = [torch.zeros(0)]
            places = torch.stack(torch.broadcast_tensors(*indices), dim=-1).flatten(0, -2)
        elif name in ("index_add", "index_add_"):
            places = args[2][:, None]
        elif name == "embedding_dense_backward":
            places = args[1].flatten()[:, None]
        else:
            places = torch.zeros(0, 1)
        if len(places) and len(places.unique(dim=0)) < len(places):
            self.seen.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("with_and_without_kernels")
@pytest.mark.parametrize(("packed", "entropy_gradient"), [(True, False), (True, True), (False, True)])
def test_no_gradient_is_added_up_in_an_order_that_depends_on_timing(packed, entropy_gradient, monkeypatch):
    if not packed:
        monkeypatch.setattr("hybrid_lightning.runner.model_runner.try_packing", lambda *_: None)
    model = build_model("qwen3").requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    if packed:
        token_logprobs(runner_of(model), build_sequences(), 1.0)
    with Additions() as additions:
        logprobs, entropy = token_logprobs(runner_of(model), build_sequences(), 0.9, entropy_gradient)
        (logprobs + entropy).sum().backward()
    assert additions.count > 100 and not additions.seen


def test_plain_indexing_and_selecting_are_such_additions():
    values, index = torch.randn(4, 2, requires_grad=True), torch.tensor([0, 0, 1])
    for taken in (lambda: values[index], lambda: values.index_select(0, index), lambda: F.embedding(index, values)):
        with Additions() as additions:
            taken().sum().backward()
        assert len(additions.seen) == 1
