"""The weights for an engine with its own model: a fresh model that loads them computes the same."""

import json
from concurrent.futures import Future

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tiny_models import FAMILIES, build_model
from tiny_runs import build_data, build_policy, fit, write_model, write_wide_model

from hybrid_lightning.adapters import AdapterPlan, LoraSettings, ModuleBudget, PlannedModule, find_candidates
from hybrid_lightning.adapters.candidates import linear_shape
from hybrid_lightning.adapters.plan import model_digest
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.losses import TokenTruncation
from hybrid_lightning.model import NF4
from hybrid_lightning.model.current_weights import CurrentWeights
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import PromptLogprobs, WeightsVersion
from hybrid_lightning.rollout.rollout_engine import Session, WeightedEngine
from hybrid_lightning.types import Prompt

IDS = torch.arange(3, 19).view(2, 8)


def adapted(folder, use_dora=False, frozen=(), only=None, full=True, **options):
    """A policy with moved weights, of `only` one module, or the first and last by full training, if any, and others by LoRA."""
    policy = build_policy(folder, **options)
    modules = find_candidates(policy.model)
    full = {next(iter(modules)), list(modules)[-1]} if full else ()
    mode = {**dict.fromkeys(modules, "lora"), **dict.fromkeys(frozen, "frozen"), **dict.fromkeys(full, "full")}
    mode = {**dict.fromkeys(modules, "frozen"), only: "lora"} if only else mode
    planned = tuple(
        PlannedModule(n, linear_shape(m), m.weight.numel(), None, mode[n], 1 + place % 4 if mode[n] == "lora" else None)
        for place, (n, m) in enumerate(modules.items())
    )
    lora = LoraSettings(rank=3, alpha=6, use_dora=use_dora)
    policy.adapt(AdapterPlan("model", None, model_digest(policy.model), planned, lora, ModuleBudget().to_config()))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return policy


def weights_of(policy, step=0, base="base"):
    return CurrentWeights(policy.model, policy.policy.weights, base, step, True)


def received(weights, everything=True, dtype=torch.float32):
    """The values, as an engine gets them."""
    values = {}
    for weight in weights.stream(everything):
        values[weight.name] = torch.empty(weight.shape, dtype=dtype)
        weight.write_rows(values[weight.name][:3], 0)
        weight.write_rows(values[weight.name][3:], 3)
    return values


def assert_same(other, values, policy):
    """A model that gets the values computes what the policy computes."""
    other.load_state_dict(values, strict=False)
    with torch.no_grad(), policy.policy.inference():
        torch.testing.assert_close(other(IDS).logits, policy.model(IDS).logits, atol=1e-4, rtol=1e-4)


# A folder's family, whether there is DoRA, and whether the base is quantized.
CASES = [*((family, number % 2 == 1, False) for number, family in enumerate(FAMILIES)), ("llama", False, True)]


@pytest.mark.parametrize(("family", "use_dora", "quantized"), CASES)
def test_a_model_that_gets_all_weights_computes_what_the_policy_computes(tmp_path, family, use_dora, quantized):
    if quantized:
        pytest.importorskip("bitsandbytes")
        options = {"quantization": NF4(), "frozen": ("model.layers.1.mlp.up_proj",)}
        policy = adapted(write_wide_model(tmp_path / "model", family), use_dora, **options)
        other = build_model(family, seed=7, hidden_size=64, intermediate_size=128)
    else:
        policy, other = adapted(write_model(tmp_path / "model", family), use_dora), build_model(family, seed=7)
    weights = weights_of(policy)
    values = received(weights)
    assert values.keys() == dict(other.named_parameters()).keys(), "names of the base model, tied weights once"
    assert {name: tuple(value.shape) for name, value in values.items()} == weights.shapes(True)
    assert_same(other, values, policy)


def test_what_training_changes_is_enough_for_a_model_that_has_the_base(model):
    policy = adapted(model, frozen=("model.layers.1.mlp.down_proj",))
    values = received(weights_of(policy), everything=False)
    assert "model.embed_tokens.weight" not in values and "model.layers.1.mlp.down_proj.weight" in values
    assert_same(build_model("llama", std=0.1), values, policy)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_that_comes_apart_equals_merged_lora(tmp_path, family):
    """PEFT puts the factors, by their names and its config, on the base."""
    policy = adapted(write_model(tmp_path / "model", family), full=False)
    apart = CurrentWeights(policy.model, policy.policy.weights, "base", 0, True, merges=False)
    assert apart.version == weights_of(policy).version
    values, factors = received(apart), received(apart, everything=False)
    assert {name: tuple(value.shape) for name, value in values.items()} == apart.shapes(True)
    assert factors.keys() == apart.shapes(False).keys() == {name for name in values if "lora_" in name}
    other = build_model(family, seed=7)
    other.load_state_dict({name: value for name, value in values.items() if name not in factors}, strict=False)  # if tied
    told = LoraConfig(**{"task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2", **json.loads(json.dumps(apart.adapter))})
    other = get_peft_model(other, told)
    set_peft_model_state_dict(other, factors)
    with torch.no_grad(), policy.policy.inference():
        torch.testing.assert_close(other(IDS).logits, policy.model(IDS).logits, atol=1e-4, rtol=1e-4)
    with policy.policy.start_policy():
        start = CurrentWeights(policy.model, policy.policy.weights, "base", 0, True, merges=False)
        assert start.adapter is None and not start.shapes(False) and start.version != apart.version


def test_parts_of_a_block_come_as_a_whole(tmp_path):
    """With one module adapted, the weights include everything an engine may join with it, and nothing of other parts."""
    policy = adapted(write_model(tmp_path / "model", "qwen2"), only="model.layers.1.self_attn.v_proj")
    names = list(weights_of(policy).shapes(False))
    attention = [f"model.layers.1.self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    assert names == [*attention, "model.layers.1.self_attn.o_proj.weight"]


def test_a_version_follows_from_the_values_and_other_labels_are_not_versions(model):
    policy = adapted(model)
    first = weights_of(policy).version
    assert weights_of(policy).version == first and str(first).startswith("0-")
    assert weights_of(policy, step=3).version == WeightsVersion(3, first.digest)
    assert weights_of(policy, base="other").version != first
    parameter = next(p for p in policy.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[3] += 2**-20
        assert weights_of(policy).version != first
        parameter.view(-1)[3] -= 2**-20
    assert weights_of(policy).version == first
    with policy.policy.start_policy():
        start = weights_of(policy)
        assert start.version != first
        values = received(start)
    other = build_model("llama", std=0.1)
    assert all(torch.equal(values[name], weight) for name, weight in other.named_parameters()), "the start policy's weights"
    assert not any(map(WeightsVersion.parse, ("default", "", "12", "x-1", "updating")))
    assert WeightsVersion.parse(str(WeightsVersion(12, "ab"))) == WeightsVersion(12, "ab")


# ---- when an engine is given them


def answered(value):
    answer = Future()
    answer.set_result(value)
    return answer


class Copying(WeightedEngine, Sampler):
    """Samples with a model of its own, which has the weights of the last update."""

    def __init__(self, **options):
        super().__init__(max_new_tokens=6, **options)
        self.model, self.version, self.updates, self.released, self.ended = build_model("llama", std=0.1), None, [], 0, 0
        self.prompts = []  # number of prompts of each call

    def needs_everything(self, weights, model):
        return self.version is None

    def update(self, weights, model, everything=None, keeps_requests=False):
        if weights.version == self.version:
            return
        everything = self.needs_everything(weights, model) if everything is None else everything
        self.updates.append((weights.version.step, everything))
        self.model.load_state_dict(received(weights, everything), strict=False)
        self.version = weights.version

    def sample(self, engine, tokenizer, request):
        self.prompts.append(len(request.prompts))
        return super().sample(engine.of(self.model, is_copy=True), tokenizer, request)

    def session(self, *arguments):
        return Session(self, *arguments)

    def prompt_logprobs(self, token_ids):
        return answered([])

    def release_memory(self):
        self.released += 1

    def shut_down(self):
        self.ended += 1


class Scoring(Copying):
    """Scores prompts, too."""

    def prompt_logprobs(self, token_ids):
        rows = [(self.model(torch.tensor([ids])).logits[0].log_softmax(-1), ids[1:]) for ids in token_ids]
        logprobs = [row[range(len(tokens)), tokens].tolist() for row, tokens in rows]
        self.scored.append(token_ids)
        return answered([PromptLogprobs("a copy", self.version, logprobs)])


def test_an_engine_is_compared_on_the_same_tokens_after_each_update(model):
    sampler = Scoring()
    sampler.scored, prompts = [], [Prompt(text="12+3=", answer="15"), Prompt(text="1"), Prompt(text="2=", answer="\u4f60")]
    policy = adapted(model, sampler=sampler)
    generation, lora = policy.task.generation, next(p for name, p in policy.model.named_parameters() if "lora_B" in name)
    for by in (0.0, 0.1, 0.0):
        lora.data += by
        policy.generate(prompts, 2)
    assert generation.metrics()["sampling/mismatch/max"] < 1e-4
    assert len(sampler.scored) == 2 and sampler.scored[0] == sampler.scored[1]
    assert [policy.tokenizer.decode(ids) for ids in sampler.scored[0]][:1] == ["12+3=15"], "with the answer"
    sampler.model.lm_head.weight.data *= 5
    lora.data += 0.1
    with pytest.raises(RolloutError, match=r"of a copy differ from the policy's by [\d.]+ nats per token .* they agreed before"):
        policy.generate(prompts, 2)


def test_a_run_updates_once_a_rollout_and_every_command_samples_by_the_engine(model, sums, tmp_path):
    sampler, data = Copying(), build_data(sums, validation_fraction=0.2, test_fraction=0.2)
    policy = {"minibatches_per_rollout": 2, "correction": TokenTruncation(), "sampler": sampler}
    flags = {"max_steps": 4, "limit_val_batches": 1, "val_check_interval": 4, "check_val_every_n_epoch": None}
    module = fit(model, sums, tmp_path, policy=policy, data=data, **flags)
    trainer, updates = module.trainer, list(sampler.updates)
    # The base before it is adapted, all of it; what the adapter changes then is not yet trained, and equal.
    assert [entry for entry in sampler.updates if entry[0]] == [(2, False), (4, False)], "the second rollout and the validation"
    assert trainer.logged_metrics["sampling/weights_version_lag"] == 1
    assert trainer.logged_metrics["sampling/logp_difference/max"] < 1e-4
    assert trainer.logged_metrics["sampling/weights_update_s"] > 0
    assert sampler.released >= 2 and sampler.ended == 1
    for command in (trainer.validate, trainer.test, trainer.predict):
        sampler.prompts.clear()
        command(module, datamodule=data)
        assert sampler.prompts, "completed by the engine"
    assert sampler.updates == updates and updates[0] == (0, True), "weights that have not changed are not given again"
