"""What a rollout engine with weights of its own is given: by loading it into a fresh model, which then computes the same."""

from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, build_model
from tiny_runs import Constant, build_data, build_policy, fit, with_holes, write_model

from hybrid_lightning.adapters import AdapterPlan, LoraSettings, ModuleBudget, PlannedModule, find_candidates
from hybrid_lightning.adapters.candidates import linear_shape
from hybrid_lightning.adapters.merge import LowRankUpdate, write_merged
from hybrid_lightning.adapters.plan import model_digest
from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.losses import TokenTruncation
from hybrid_lightning.policy import Int8
from hybrid_lightning.policy.current_weights import CurrentWeights
from hybrid_lightning.rollout import DynamicSampling, Sampler
from hybrid_lightning.rollout.rollout_engine import WeightsVersion
from hybrid_lightning.types import Prompt

IDS = torch.arange(3, 19).view(2, 8)


def adapted(folder, use_dora=False, frozen=(), only=None, **options):
    """A policy with moved weights, of `only` one module, or the first and last by full training and others by LoRA."""
    policy = build_policy(folder, **options)
    modules = find_candidates(policy.model)
    full = {next(iter(modules)), list(modules)[-1]}
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
    return CurrentWeights(policy.model, policy.weights, base, step, True)


def received(weights, everything=True, dtype=torch.float32):
    """The values, as an engine gets them."""
    values = {}
    for weight in weights.stream(everything):
        values[weight.name] = torch.empty(weight.shape, dtype=dtype)
        weight.write_rows(values[weight.name], 0)
    return values


def assert_same(other, values, policy):
    """A model that gets the values computes what the policy computes."""
    other.load_state_dict(values, strict=False)
    with torch.no_grad(), policy.inference():
        torch.testing.assert_close(other(IDS).logits, policy.model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "use_dora"), [*((family, False) for family in FAMILIES), ("llama", True), ("gpt2", True)])
def test_a_model_that_gets_all_weights_computes_what_the_policy_computes(tmp_path, family, use_dora):
    policy = adapted(write_model(tmp_path / "model", family), use_dora)
    other = build_model(family, seed=7)
    values = received(weights_of(policy))
    assert values.keys() == dict(other.named_parameters()).keys(), "names of the base model, tied weights once"
    assert_same(other, values, policy)


def test_what_training_changes_is_enough_for_a_model_that_has_the_base(model):
    policy = adapted(model, frozen=("model.layers.1.mlp.down_proj",))
    values = received(weights_of(policy), everything=False)
    assert "model.embed_tokens.weight" not in values and "model.layers.1.mlp.down_proj.weight" in values
    assert_same(build_model("llama", std=0.1), values, policy)


def test_parts_of_a_block_come_as_a_whole(tmp_path):
    """With one module adapted, all that an engine may join with it comes, and nothing of other parts."""
    policy = adapted(write_model(tmp_path / "model", "qwen2"), only="model.layers.1.self_attn.v_proj")
    names = list(weights_of(policy).shapes(False))
    attention = [f"model.layers.1.self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    assert names == [*attention, "model.layers.1.self_attn.o_proj.weight"]


def test_of_a_quantized_base_the_dequantized_weights_come(model):
    pytest.importorskip("bitsandbytes")
    policy = adapted(model, frozen=("model.layers.1.mlp.up_proj",), quantization=Int8())
    weights = weights_of(policy)
    values = received(weights)
    assert {name: tuple(value.shape) for name, value in values.items()} == weights.shapes(True)
    assert_same(build_model("llama", seed=7), values, policy)


def test_a_version_is_that_of_the_values_and_labels_of_others_are_none(model):
    policy = adapted(model)
    first = weights_of(policy).version
    assert weights_of(policy).version == first and str(first).startswith("0-")
    assert weights_of(policy, step=3).version == WeightsVersion(3, first.digest)
    assert weights_of(policy, base="other").version != first
    parameter = next(p for p in policy.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[3] += 2**-20
    changed = weights_of(policy).version
    assert changed != first
    with torch.no_grad():
        parameter.view(-1)[3] -= 2**-20
    assert weights_of(policy).version == first
    with policy.start_policy():
        start = weights_of(policy)
        assert start.version != first
        values = received(start)
    other = build_model("llama", std=0.1)
    assert all(torch.equal(values[name], weight) for name, weight in other.named_parameters()), "the start policy's weights"
    assert not any(map(WeightsVersion.parse, ("default", "", "12", "x-1", "updating")))
    assert WeightsVersion.parse(str(WeightsVersion(12, "ab"))) == WeightsVersion(12, "ab")


@pytest.mark.parametrize(
    ("dtype", "dora", "transposed"),
    [(torch.float32, True, False), (torch.float32, False, True), (torch.bfloat16, False, False), (torch.bfloat16, True, True)],
)
def test_rows_are_merged_in_float32_and_rounded_once(dtype, dora, transposed):
    draws = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=draws) for shape in ((600, 40), (3, 40), (600, 3)))
    magnitudes = torch.rand(600, generator=draws) + 0.5 if dora else None
    expected = weight.double() + 0.5 * b.double() @ a.double()
    if magnitudes is not None:
        expected = expected * (magnitudes.double() / expected.norm(dim=1))[:, None]
    stored = weight.T.contiguous() if transposed else weight
    expected = expected.T if transposed else expected
    rows = torch.empty(17, expected.shape[1], dtype=dtype)
    write_merged(rows, 11, stored.to(dtype), LowRankUpdate(a, b, 0.5, magnitudes), transposed)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6  # bfloat16: of the weight and of the sum, 2^-8 each of values up to 4
    torch.testing.assert_close(rows.double(), expected[11:28], atol=tolerance, rtol=tolerance)


# ---- when an engine is given them


class Copying(Sampler):
    """Samples with a model of its own, which has the weights of the last update."""

    has_own_weights = True

    def __init__(self, **options):
        super().__init__(max_new_tokens=6, **options)
        self.model, self.version, self.updates, self.released, self.ended = build_model("llama", std=0.1), None, [], 0, 0
        self.prompts = []  # number of prompts of each call

    def needs_everything(self, weights, model):
        return self.version is None

    def update(self, weights, model, everything=None):
        if weights.version == self.version:
            return
        everything = self.needs_everything(weights, model) if everything is None else everything
        self.updates.append((weights.version.step, everything))
        self.model.load_state_dict(received(weights, everything), strict=False)
        self.version = weights.version

    def sample(self, engine, tokenizer, prompts, *arguments, **options):
        self.prompts.append(len(prompts))
        return super().sample(engine.of(self.model), tokenizer, prompts, *arguments, **options)

    def release_memory(self):
        self.released += 1

    def shut_down(self):
        self.ended += 1


class InterruptedCopying(Copying):
    """Of completions with holes, behind four episodes that are left out."""

    wrong = 0.0

    def sample(self, *arguments, **options):
        rollouts = with_holes(super().sample(*arguments, **options))
        sequences = rollouts.sequences.without(torch.arange(len(rollouts.sequences)) < 4)
        logprobs = rollouts.sampling_logprobs * sequences.sampled_mask
        logprobs[4, 0] += self.wrong
        return replace(rollouts, sequences=sequences, sampling_logprobs=logprobs)


def test_only_what_was_sampled_is_compared(model):
    policy, prompts = adapted(model, sampler=InterruptedCopying()), [Prompt(text="12+3="), Prompt(text="1+1=")]
    policy.generate(prompts, 4)
    policy.generation.compare_again()
    policy.sampler.wrong = -50.0
    with pytest.raises(RolloutError, match=r"differ from the policy's by [\d.]+ nats a token: it computes with another model"):
        policy.generate(prompts, 4)


def run(model, sums, root, sampler, steps=4, **options):
    policy = {"minibatches_per_rollout": 2, "correction": TokenTruncation(), "sampler": sampler, **options}
    flags = {"limit_val_batches": 1, "val_check_interval": steps, "check_val_every_n_epoch": None}
    data = build_data(sums, validation_fraction=0.2, test_fraction=0.2)
    return fit(model, sums, root, policy=policy, data=data, max_steps=steps, **flags), data


def test_a_run_updates_once_a_rollout_and_logs_how_old_the_weights_are_and_so_does_our_sampler(model, sums, tmp_path):
    sampler = Copying()
    trainer = run(model, sums, tmp_path, sampler)[0].trainer
    # The base before it is adapted, all of it; what the adapter changes then is not yet trained, and equal.
    assert [entry for entry in sampler.updates if entry[0]] == [(2, False), (4, False)], "the second rollout and the validation"
    assert trainer.logged_metrics["sampling/weights_version_lag"] == 1
    assert trainer.logged_metrics["sampling/logp_difference/max"] < 1e-4
    assert trainer.logged_metrics["sampling/weights_update_s"] > 0
    assert sampler.released >= 2 and sampler.ended == 1
    trainer = run(model, sums, tmp_path, Sampler(max_new_tokens=6))[0].trainer
    assert trainer.logged_metrics["sampling/weights_version_lag"] == 1
    assert "sampling/weights_update_s" not in trainer.logged_metrics


@pytest.mark.filterwarnings("ignore:nothing is learned from 100% of a rollout's groups")
def test_every_command_and_phase_samples_by_the_engine(model, sums, tmp_path):
    sampler = Copying()
    rules = {"dynamic_sampling": DynamicSampling(1), "reward": Constant(), "minibatches_per_rollout": 1}
    policy, data = run(model, sums, tmp_path, sampler, steps=1, **rules)
    assert len(sampler.prompts) >= 3, "calibration, a rollout and an extra one, since all rewards are equal"
    updates = list(sampler.updates)
    for command in (policy.trainer.validate, policy.trainer.test, policy.trainer.predict):
        sampler.prompts.clear()
        command(policy, datamodule=data)
        assert sampler.prompts, command.__name__
    assert sampler.updates == updates and updates[0] == (0, True), "with weights that have not changed"


def test_an_engine_whose_correction_does_not_fit_is_refused_and_one_without_is_warned_of(model, sums, tmp_path):
    renormalizing = Copying(top_k=3)
    renormalizing.renormalizes = True
    with pytest.raises(ConfigError, match="compares probabilities under the full softmax"):
        run(model, sums, tmp_path, renormalizing)
    with pytest.warns(UserWarning, match=r"model\.correction corrects nothing"):
        run(model, sums, tmp_path, Copying(), correction=None, steps=1)
