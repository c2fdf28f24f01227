import copy
import hashlib
import struct
import time

import pytest
import torch
from torch import nn

from hybrid_lightning.adapters.plan import model_digest
from hybrid_lightning.errors import ModelError


def test_the_same_for_a_copy_and_as_documented(make_model):
    model = make_model("qwen2")
    assert model_digest(copy.deepcopy(model)) == model_digest(model)
    linear = nn.Linear(2, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(6.0).reshape(3, 2))
        linear.bias.fill_(1)
    content = b"bias (3,) torch.float32\n" + struct.pack("<3f", 1, 1, 1)
    content += b"weight (3, 2) torch.float32\n" + struct.pack("<6f", *range(6))
    assert model_digest(linear) == hashlib.sha256(content).hexdigest()


def test_differs_by_values_dtype_shape_and_name(make_model):
    models = [make_model("qwen2"), make_model("qwen2", seed=1), make_model("qwen2").bfloat16(), make_model("qwen3")]
    renamed = nn.ModuleDict({"a": nn.Linear(2, 2)})
    other_name = nn.ModuleDict({"b": renamed["a"]})
    digests = [model_digest(model) for model in (*models, renamed, other_name)]
    assert len(set(digests)) == len(digests)


def test_requires_grad_and_layout_do_not_matter():
    linear = nn.Linear(300, 200)
    before = model_digest(linear)
    linear.requires_grad_(False)
    linear.weight.data = linear.weight.data.T.contiguous().T
    assert model_digest(linear) == before


def test_reads_a_sample_only():
    big = nn.Linear(4096, 4096, bias=False)
    start = time.perf_counter()
    model_digest(big)
    assert time.perf_counter() - start < 0.5


def test_weights_on_meta_have_no_digest():
    with pytest.raises(ModelError, match="has no values yet"):
        model_digest(nn.Linear(2, 2, device="meta"))
