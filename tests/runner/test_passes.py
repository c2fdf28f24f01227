import torch
from tiny_models import build_model
from transformers import AutoModelForCausalLM, LlamaConfig

from hybrid_lightning.runner import default_token_budget, passes


def build(checkpointing=False, **sizes):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


CPU, OTHER = torch.device("cpu"), torch.device("meta")
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
PER_TOKEN = 30 * (16 * 576 + 5 * 1536) * 2


def test_a_pass_takes_what_fits_into_the_space_of_the_device_that_computes(monkeypatch):
    model, small = build(**SMALL), build_model("llama")
    tokens = default_token_budget(model, OTHER)  # not on a CPU: 8 GB
    assert tokens == int(8e9 / PER_TOKEN) and default_token_budget(build(checkpointing=True, **SMALL), OTHER) > 10 * tokens

    assert default_token_budget(small, OTHER) > 10 * default_token_budget(small, CPU)
    # Half of what 90% of an accelerator's memory leaves beside the weights, and 12 bytes more for each that is trained.
    model.requires_grad_(False)
    weights = sum(parameter.numel() for parameter in model.parameters())
    model.model.layers[0].requires_grad_(True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = 80 * 2**30
    monkeypatch.setattr(passes, "accelerator_memory", lambda device: total)
    assert default_token_budget(model, OTHER) == int(0.5 * (0.9 * total - 4 * weights - 12 * trained) / PER_TOKEN)
    beside = total // 4  # of a teacher
    left = 0.9 * total - 4 * weights - beside - 12 * trained
    assert default_token_budget(model, OTHER, lambda: beside) == int(0.5 * left / PER_TOKEN)
    total = 1
    assert default_token_budget(model, OTHER) == 256, "never less than keeps a device busy; the planner decides what fits"
