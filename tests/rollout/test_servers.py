"""`VLLMServerSampler` against fake servers: what is refused before a run, and how they come to their weights."""

import copy
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from tiny_models import build_model
from transformers import AutoTokenizer
from vllm_fake_server import FACTOR, Factors, Weight, Weights, complete, shares

from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.rollout import VLLMServerSampler
from hybrid_lightning.rollout.vllm import transfer
from hybrid_lightning.rollout.vllm.names import PATHS

# ---- before a run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"urls": []}, "at least one"),
        ({"urls": "http://a:1"}, "must be a list"),
        ({"urls": ["a:1"]}, "http://node7:8000"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "twice"),
        ({"urls": ["http://a:1"], "timeout": 0}, "timeout must be positive"),
    ],
)
def test_impossible_arguments_are_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        VLLMServerSampler(**arguments)


def test_servers_can_be_used_by_the_next_run(start, build):
    server = start()
    sampler = build(server, weights=Weights(1))
    sampler.shut_down()
    assert server.asked("/shutdown_weight_transfer_engine") and server.group is None
    complete(build(server, weights=Weights(5)), prompts=2)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"description": {"paths": dict.fromkeys({*PATHS} - {"/pause"})}}, r"has vLLM 0\.32\.0 without /pause, which"),
        ({"description": {"paths": PATHS}}, "without weight_versions in its completions, which vLLM 0.32 has; install"),
        ({"missing": {"/version"}}, "is not a vLLM server"),
        ({"missing": {"/weight_info"}}, "VLLM_SERVER_DEV_MODE=1"),
        ({"missing": {"/inference/v1/generate"}}, "--enable-scale-out"),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ({"backend": None}, "--weight-transfer-config"),
        ({"backend": "ipc"}, '"hybrid_lightning" on CPUs'),
        ({"backend": "nccl"}, "policy on cpu"),
        ({"context": 8}, "--max-model-len"),
        ({"key": "secret"}, "VLLM_API_KEY"),
        ({"hangs": True}, "hangs"),
        ({"drips": True}, "no answer within 1 s; it hangs"),
        ({"on_cpu": True}, r"heads of 32, .* numbers, and the policy has heads of 8"),
        ({"tokenizer": AutoTokenizer.from_pretrained(embedded_policy_path())}, "another tokenizer"),
        ({"config": build_model("gemma").config}, "has served.*model_type is 'gemma' there and 'llama' in the policy's"),
    ],
)
def test_an_unfit_server_is_refused_before_the_run(start, build, served, fault, says):
    with pytest.raises((ConfigError, RolloutError), match=says) as raised:
        build(start(), start(**fault), timeout=1 if {"hangs", "drips"} & fault.keys() else 10).check_model(served)
    assert "\n" not in str(raised.value) and "http://127.0.0.1" in str(raised.value)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"lora": None}, r"takes no LoRA; start it with --enable-lora --max-lora-rank 16"),
        ({"lora": {"max_lora_rank": 8}}, r"takes LoRA up to rank 8, and the policy has rank 9; .* --max-lora-rank 16"),
        ({"on_cpu": True}, r"at its output layer.*--lora-target-modules q_proj v_proj"),
        ({"missing": {"/v1/load_lora_adapter"}}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ],
)
def test_a_server_unfit_for_an_adapter_is_refused_before_the_run(start, build, served, fault, says, monkeypatch):
    monkeypatch.setattr("hybrid_lightning.rollout.vllm.server_checks.check_on_cpu", lambda *_: None)
    wanted = replace(served, lora_rank=9, lora_modules=("q_proj", "v_proj"))
    with pytest.raises(ConfigError, match=says):
        build(start(**{"lora": {"max_lora_rank": 16}, **fault}), sync="adapter").check_model(wanted)


def test_a_server_that_was_started_with_the_base_gets_the_adapter_alone_and_is_asked_for_it(start, build, served):
    """One that has other weights, as after a restart, gets the base as well; the start policy needs no adapter."""
    server, model = start(lora={"max_lora_rank": 8}), replace(served, folder="base", lora_rank=2)
    sampler = build(server, sync="adapter")
    for step in (1, 2):
        sampler.update(Factors(step), model)
        complete(sampler, prompts=2)
        assert server.updates[-1] == [FACTOR] and server.label == f"{step}-{step}abc"
    (registered,) = filter(None, server.asked("/v1/load_lora_adapter"))
    told = server.asked("/update_weights")[-1]["update_info"]
    assert told["adapter"] == Factors(2).adapter and told["folder"] == registered["lora_path"]
    assert {body.get("model") for body in server.asked("/inference/v1/generate")} == {None, registered["lora_name"]}
    server.restart()
    sampler.update(Factors(3), model)
    assert server.updates == [[*Weights(3).values, FACTOR]]
    server.requests.clear()
    sampler.update(Factors(0, on=False), model)
    complete(sampler, prompts=2)
    assert server.updates[-1] == [] and {body.get("model") for body in server.asked("/inference/v1/generate")} == {None}
    server.label = "default"
    build(server, sync="adapter").update(Factors(1), served)  # its base is not in a folder
    assert server.updates[-1] == [*Weights(1).values, FACTOR]


def test_a_server_that_is_not_there_is_refused_but_at_a_resume_the_others_go_on_until_it_is_back(start, build, served):
    there, gone, again = start(), start(), replace(served, resumed=True)
    gone.stop()
    sampler, began = build(there, gone, give_up_after=600), time.monotonic()
    with pytest.raises(RolloutError, match=r"nothing answers there.*remove it from sampler.urls"):
        sampler.check_model(served)
    assert time.monotonic() - began < 60
    with pytest.warns(UserWarning, match=f"{gone.url} .*left out.*nothing answers there"):
        sampler.check_model(again)
    sampler.update(Weights(1), served)
    complete(sampler, prompts=4)
    assert there.label == "1-1abc" and there.asked("/inference/v1/generate")
    with pytest.raises(RolloutError, match="nothing answers there"):
        build(gone).check_model(again)
    with pytest.raises(RolloutError, match="VLLM_API_KEY"):
        build(there, start(key="secret")).check_model(again)
    gone.restart()
    sampler.update(Weights(1), served)
    assert gone.label == "1-1abc"


def test_servers_that_differ_and_prompts_beyond_the_shortest_context_are_refused(start, build, served, monkeypatch):
    with pytest.raises(ConfigError, match="different weight transfers"):
        build(start(), start(backend="nccl")).check_model(replace(served, device=torch.device("cuda")))
    with pytest.warns(UserWarning, match="--dtype float32"):
        build(start(dtype="torch.bfloat16")).check_model(served)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    sampler = build(start(), start(context=20, key="secret"), weights=Weights(1))
    sampler.check_model(served)
    complete(sampler, prompts=4)
    sampler.check_prompt(served.config, 12)
    with pytest.raises(ConfigError, match="context of 20 tokens"):
        sampler.check_prompt(served.config, 13)


# ---- weights

over_both = pytest.mark.parametrize("nccl", [False, True], ids=["gloo", "nccl"], indirect=True)


@over_both
def test_all_weights_come_first_and_then_what_has_changed(start, build, served, nccl):
    servers = [start(dtype="torch.bfloat16") for _ in range(2)]
    model = replace(served, dtype=torch.bfloat16)
    first, second = Weights(1), Weights(2)
    sampler = build(*servers)
    assert sampler.needs_everything(first, model)
    sampler.update(first, model, True)
    assert not sampler.needs_everything(second, model)
    sampler.update(second, model, False)
    for server in servers:
        assert [len(names) for names in server.updates] == [7, 3] and server.label == "2-2abc" and not server.paused
        for name, value in (first.values | {name: second.values[name] for name in server.updates[1]}).items():
            assert torch.equal(server.weights[name], value.bfloat16()), "bit for bit"
        order = [path for path, _ in server.requests]
        assert order.index("/pause") < order.index("/update_weight_version") < order.index("/start_weight_update")
        assert server.asked("/update_weight_version")[0] == {"new_version": "updating"}
        assert order.count("/init_weight_transfer_engine") == 2 - bool(nccl), "to connect, with gloo to compare the model before"
        ends = ["/finish_weight_update", "/reset_prefix_cache", "/resume"]
        assert [path for path in order if path in ends] == ends * 2
    assert first.passes == [7] and second.passes == [3], "one pass for both servers"
    for made in nccl.communicators if nccl else ():
        assert made.stream.waited == [nccl.training] * 10 and made.aborts == 0, "each weight waits for what training computes"
    assert not nccl or not nccl.training.waited, "training waits for none"


def test_an_unchanged_version_is_not_sent_and_a_server_without_the_last_one_gets_everything(start, build, served):
    server, other = start(active=True), start()  # of the one an update by another sender was left open
    sampler = build(server, other, weights=Weights(1))
    assert server.label == "1-1abc" and not server.active
    server.requests.clear()
    sampler.update(Weights(1), served)
    assert [path for path, _ in server.requests] == ["/weight_info"]
    server.restart()
    sampler.update(Weights(1), served)
    assert len(server.updates) == 1 and len(other.updates) == 1 and server.label == "1-1abc"
    changes = [(server.restart, "base"), (lambda: setattr(server, "label", "7-another"), "base"), (lambda: None, "another")]
    for step, (change, base) in enumerate(changes, start=2):
        assert not sampler.needs_everything(Weights(step), served)
        change()
        weights = Weights(step, base=base)
        assert sampler.needs_everything(weights, served)
        sampler.update(weights, served, True)
        assert len(server.updates[-1]) == len(other.updates[-1]) == 7 and server.label == other.label == str(weights.version)


def test_ranks_that_do_not_send_make_as_many_passes(start, build, served):
    server = start()
    sampler = build(server)
    mine = Weights(1, sender=False)
    sampler.update(mine, served, True)
    sampler.update(mine, served, False)
    assert mine.passes == [7] and sampler.version == mine.version and not server.requests


@over_both
def test_a_server_that_fails_or_dies_in_an_update_is_left_out_until_the_next(start, build, served, nccl):
    failing, other = start(), start()
    sampler = build(failing, other, weights=Weights(1))
    failing.fails_updates = 1
    weights = Weights(2)
    with pytest.warns(UserWarning, match=r"is left out.*out of memory"):
        sampler.update(weights, served, False)
    assert weights.passes == [3], "to the end, for the other ranks"
    assert failing.label == "updating" and other.label == "2-2abc"
    failing.requests.clear()
    complete(sampler, prompts=4)
    assert shares(failing) == [0]
    sampler.update(Weights(3), served)
    assert failing.label == other.label == "3-3abc" and len(failing.weights) == 7
    dying, other = start(dies_in_updates=0.1), start()
    weights, sampler, earlier = Weights(1), build(dying, other), len(nccl.communicators) if nccl else 0
    with pytest.warns(UserWarning, match=r"is left out.*the connection broke"):
        sampler.update(weights, served, True)
    assert other.label == "1-1abc" and all(torch.equal(other.weights[name], value) for name, value in weights.values.items())
    if nccl:
        made = nccl.communicators[earlier:]
        assert sorted(communicator.aborts for communicator in made) == [0, 1]
        sampler.shut_down()
        assert [communicator.aborts for communicator in made] == [1, 1]


def test_a_failed_update_of_the_only_server_is_made_again_with_everything_unless_other_ranks_take_part(start, build, served):
    server = start()
    sampler = build(server, weights=Weights(1))
    server.fails_updates = 1
    with pytest.warns(UserWarning, match="out of memory"):
        sampler.update(Weights(2), served)
    assert server.label == "2-2abc" and len(server.updates[-1]) == 7
    server.fails_updates, weights = 1, Weights(3)
    with pytest.warns(UserWarning, match="is left out"), pytest.raises(RolloutError, match="no vLLM server took"):
        sampler.update(weights, served, False)
    assert weights.passes == [3]
    assert sampler.needs_everything(weights, served), "so that ranks that have drained them take part again"


@pytest.mark.parametrize(
    ("nccl", "path", "says"),
    [
        (False, "init_weight_transfer_engine", r"do not reach this machine .* 2 s; open .* set sampler\.address"),
        (False, "update_weights", "the connection for weights broke: .* Timed out"),
        (True, "init_weight_transfer_engine", r"do not connect over NCCL .* 2 s; open .* set NCCL_SOCKET_IFNAME"),
        (True, "update_weights", r"took no weight over NCCL within 2 s; check its log .* set NCCL_SOCKET_IFNAME"),
    ],
    indirect=["nccl"],
)
def test_a_server_that_hangs_in_an_update_is_left_out_and_named(start, build, served, nccl, path, says, monkeypatch):
    monkeypatch.setattr(transfer, "_LIMIT_S", 2.0)
    hanging, other = start(), start()
    # Port 0 is for a look at the model alone.
    setattr(hanging, f"on_{path}", lambda body: body.get("init_info", {}).get("port") != 0 and hanging.stopped.wait(60) and None)
    with pytest.warns(UserWarning, match=f"is left out.*{says}"):
        build(hanging, other).update(Weights(1), served, True)
    assert other.label == "1-1abc" and len(other.weights) == 7
    assert not nccl or sorted(made.aborts for made in nccl.communicators) == [0, 1]


@pytest.mark.parametrize("nccl", [True], indirect=True)
def test_an_interrupt_in_an_update_aborts_what_is_under_way(start, build, served, nccl, monkeypatch):
    monkeypatch.setattr(Weight, "write_rows", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(start()).update(Weights(1), served, True)
    assert [made.aborts for made in nccl.communicators] == [1]


def test_a_server_that_comes_back_as_another_model_is_left_out(start, build, served):
    server, other = start(), start()
    sampler = build(server, other, weights=Weights(1))
    server.config = copy.deepcopy(served.config)
    server.config.hidden_size = 5
    server.restart()
    with pytest.warns(UserWarning, match=r"is left out.*hidden_size is 5 there"):
        sampler.update(Weights(2), served)
    assert other.label == "2-2abc"
    assert not sampler.needs_everything(Weights(3), served), "it is not counted with until it is started anew"
