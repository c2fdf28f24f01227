import pytest
import torch
from tiny_models import FAMILIES, build_model
from transformers import AutoModelForCausalLM, LlamaConfig

from hybrid_lightning.engine.passes import default_token_budget


def build(checkpointing=False, **sizes):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


CPU, OTHER = torch.device("cpu"), torch.device("meta")
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}


def test_a_pass_takes_what_fits_into_its_space():
    tokens = default_token_budget(build(**SMALL), OTHER)  # not on a CPU: 8 GB
    assert tokens == int(8e9 / (30 * (16 * 576 + 5 * 1536) * 2))
    assert default_token_budget(build(checkpointing=True, **SMALL), OTHER) > 10 * tokens
    large = build(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    assert default_token_budget(large, OTHER) == 256, "never less than keeps a device busy"


def test_the_device_that_computes_counts_and_not_where_the_weights_lie():
    model = build_model("llama")
    assert default_token_budget(model, OTHER) > 10 * default_token_budget(model, CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_its_sizes(family):
    assert default_token_budget(build_model(family), CPU) > 10_000, "tiny models take a whole rollout at once"


def kept(model, tokens):
    """Bytes that a forward pass keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.model(torch.zeros(1, tokens, dtype=torch.long))
    return sum(storages.values())


def test_the_estimate_is_near_what_is_kept():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, hidden_size=128, intermediate_size=344, num_hidden_layers=4)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    estimate = 64 * 0.68e9 / default_token_budget(model, CPU)
    assert 0.5 < kept(model, 64) / estimate < 1.3
