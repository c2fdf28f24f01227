"""How weights reach a server: over gloo really, into a fake one."""

import time
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_model

from hybrid_lightning.rollout.vllm import transfer
from hybrid_lightning.rollout.vllm.server_client import Server, ServerError


@pytest.fixture
def fake(start):
    return start(config=None)


@pytest.fixture
def server(fake):
    client = Server(fake.url, 5.0, None)
    yield client
    client.close()


def update_of(values, everything=True):
    first = next(iter(values.values()))
    return transfer.Update({name: tuple(value.shape) for name, value in values.items()}, first.dtype, everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_arrive_bit_for_bit_by_one_connection(fake, server, served, dtype):
    sender = transfer.GlooTransfer(server, "127.0.0.1", 5.0, served)
    sender.connect()
    for seed in range(2):
        torch.manual_seed(seed)
        values = {"a.weight": torch.randn(300, 200).to(dtype), "b": torch.tensor([float("inf"), -0.0, 6e-8]).to(dtype)}
        sender.begin(update_of(values))
        for value in values.values():
            sender.give(value)
        sender.end()
        for name, value in values.items():
            assert fake.weights[name].dtype == dtype and torch.equal(fake.weights[name], value)
    sender.close()
    paths = [path for path, _ in fake.requests if "weight" in path]
    assert paths == ["/init_weight_transfer_engine"] + ["/start_weight_update", "/update_weights", "/finish_weight_update"] * 2


def test_a_receiver_that_refuses_is_named_at_once(fake, server, served):
    fake.config = build_model("llama", hidden_size=64).config
    began = time.monotonic()
    with pytest.raises(ServerError, match="hidden_size is 64 there and 32") as raised:
        transfer.GlooTransfer(server, "127.0.0.1", 5.0, served).connect()
    assert raised.value.is_final and time.monotonic() - began < 1


def test_a_part_of_a_joined_layer_is_refused():
    model = SimpleNamespace(packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj", "v_proj"], "o_proj": ["o_proj"]})
    names = [f"layers.{layer}.{part}.weight" for layer in range(2) for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    transfer.check_joined(names, model)
    transfer.check_joined(["layers.0.o_proj.weight"], model)
    for left_out in (1, 6):
        with pytest.raises(ValueError, match=rf"came without {names[left_out]}"):
            transfer.check_joined([name for name in names if name != names[left_out]], model)


def test_facts_are_those_of_the_text_model_and_the_address_that_of_the_servers_network():
    config = build_model("qwen3").config
    facts = transfer.facts_of(config)
    assert facts["model_type"] == "qwen3" and facts["head_dim"] == 8
    assert facts["rope_theta"] == config.rope_parameters["rope_theta"]
    transfer.check_facts(facts, {**facts, "unknown there": 3})
    with pytest.raises(ValueError, match=r"another model: head_dim is 8 there and 9 in the policy's config"):
        transfer.check_facts(facts, facts | {"head_dim": 9})
    assert transfer.local_address("http://localhost:8000") == "127.0.0.1"
