import torch
from tiny_models import FAMILIES, build_model
from transformers import AutoModelForCausalLM, LlamaConfig

from hybrid_lightning.engine import default_token_budget, passes


def build(checkpointing=False, **sizes):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


CPU, OTHER = torch.device("cpu"), torch.device("meta")
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}


def test_a_pass_takes_what_fits_into_the_space_of_the_device_that_computes():
    tokens = default_token_budget(build(**SMALL), OTHER)  # not on a CPU: 8 GB
    assert tokens == int(8e9 / (30 * (16 * 576 + 5 * 1536) * 2))
    assert default_token_budget(build(checkpointing=True, **SMALL), OTHER) > 10 * tokens
    large = build(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    assert default_token_budget(large, OTHER) == 256, "never less than keeps a device busy"
    model = build_model("llama")
    assert default_token_budget(model, OTHER) > 10 * default_token_budget(model, CPU)


def test_every_family_says_its_sizes():
    budgets = [default_token_budget(build_model(family), CPU) for family in FAMILIES]
    assert min(budgets) > 10_000, "tiny models take a whole rollout at once"


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


GIB = 2**30


def test_an_accelerator_with_more_memory_takes_more_tokens(monkeypatch):
    """Half of what 90% of it leaves beside the weights, and 12 bytes more for each that is trained."""
    model = build(**SMALL)
    model.requires_grad_(False)
    weights = sum(parameter.numel() for parameter in model.parameters())
    model.model.layers[0].requires_grad_(True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    per_token = 30 * (16 * 576 + 5 * 1536) * 2
    for total in (24 * GIB, 80 * GIB):
        monkeypatch.setattr(passes, "memory_of", lambda device, total=total: total)
        expected = 0.5 * (0.9 * total - 4 * weights - 12 * trained) / per_token
        assert default_token_budget(model, OTHER) == int(expected)
    monkeypatch.setattr(passes, "memory_of", lambda device: 1)
    assert default_token_budget(model, OTHER) == 256, "what does not fit is for the planner to say"


def test_eight_billion_parameters_share_a_prompt_on_80_gib():
    """A prompt of 384 tokens with 8 completions of 256, which 875 tokens could not hold."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36)
    rest = passes.activation_bytes(80 * GIB, weights=2 * 8.2e9, trained=44e6)
    assert passes.tokens_of_pass(config, False, False, rest) > 384 + 8 * 256
    assert passes.tokens_of_pass(config, False, False) == 875
