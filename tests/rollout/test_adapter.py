"""LoRA that is given to vLLM apart from the base: which plans it is for. That vLLM computes with it is in tests/with_vllm."""

import pytest
from tiny_families import build_family
from tiny_runs import build_adapter, build_policy

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout import Sampler, VLLMSampler, VLLMServerSampler


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    build_family("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"share": 0.2}, "sends only LoRA, and the plan may train modules fully; leave model.sampler.sync out"),
        ({"share": 0.0, "use_dora": True}, "vLLM has no DoRA; leave model.sampler.sync out"),
        ({"share": 0.0, "rank": 600}, "LoRA of ranks up to 512, and the largest is 600"),
        ({"share": 0.0, "rank_pattern": {"mlp": 513}}, "the largest is 513.*lower adapter.rank"),
        ({"share": 0.0, "rank_pattern": {"experts": 2}}, "cannot send LoRA of experts"),
        ({"share": 0.0, "rank": 512}, None),
    ],
)
def test_what_the_adapter_alone_cannot_hold_is_refused_before_the_model_is_loaded(model, experts, adapter, says):
    model = experts if "experts" in adapter.get("rank_pattern", ()) else model
    setup = build_adapter(**adapter)
    setup.check(build_policy(model, sampler=VLLMSampler()))
    setup.check(build_policy(model, sampler=Sampler()))
    policy = build_policy(model, sampler=VLLMServerSampler(urls=["http://a:1"], sync="adapter"))
    if says is None:
        setup.check(policy)
    else:
        with pytest.raises(ConfigError, match=f"model.sampler.sync=adapter.*{says}"):
            setup.check(policy)
    assert not policy.policy.is_loaded
