"""How weights reach a server: over gloo really, into a fake one."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_model

from hybrid_lightning.rollout.vllm import transfer
from hybrid_lightning.rollout.vllm.server_client import Server


def test_values_of_16_bits_arrive_bit_for_bit_by_one_connection(start, served):
    fake = start()
    server = Server(fake.url, 5.0, None)
    sender = transfer.GlooTransfer(server, "127.0.0.1", 5.0, served)
    sender.connect()
    for seed in range(2):
        torch.manual_seed(seed)
        values = {"a.weight": torch.randn(300, 200).bfloat16(), "b": torch.tensor([float("inf"), -0.0, 6e-8]).bfloat16()}
        sender.begin(transfer.Update({name: tuple(value.shape) for name, value in values.items()}, torch.bfloat16, True))
        for value in values.values():
            sender.give(value)
        sender.end()
        for name, value in values.items():
            assert fake.weights[name].dtype == value.dtype and torch.equal(fake.weights[name], value)
    sender.close()
    paths = [path for path, _ in fake.requests if "weight" in path]
    assert paths == ["/init_weight_transfer_engine"] + ["/start_weight_update", "/update_weights", "/finish_weight_update"] * 2


def test_a_part_of_a_joined_layer_is_refused():
    model = SimpleNamespace(packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj", "v_proj"], "o_proj": ["o_proj"]})
    names = [f"layers.{layer}.{part}.weight" for layer in range(2) for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    transfer.check_joined(names, model)
    transfer.check_joined(["layers.0.o_proj.weight"], model)
    for left_out in (1, 6):
        with pytest.raises(ValueError, match=rf"came without {names[left_out]}"):
            transfer.check_joined([name for name in names if name != names[left_out]], model)


def test_facts_come_from_the_text_model_and_unknown_ones_are_not_compared():
    facts = transfer.facts_of(build_model("qwen3").config)
    assert facts["model_type"] == "qwen3" and facts["head_dim"] == 8 and facts["rope_theta"] > 0
    transfer.check_facts(facts, {**facts, "unknown there": 3})
