"""Experts in three-dimensional parameters: LoRA and full training of them, in every family that has them."""

import dataclasses
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_families import build_family
from tiny_models import build_tokenizer
from tiny_runs import build_adapter, build_policy, fit, trained
from transformers import AutoModelForCausalLM

from hybrid_lightning.adapters import AdapterPlan, LoraSettings, ModuleBudget, Scoring, find_candidates, make_plan, scorers
from hybrid_lightning.adapters.apply import adapter_disabled, apply_plan, trainable_state
from hybrid_lightning.adapters.candidates import is_experts, is_router, ranks_by_pattern
from hybrid_lightning.adapters.gradients import ExactGradient, matrices_of
from hybrid_lightning.adapters.plan import PlannedModel, model_digest
from hybrid_lightning.adapters.plan_display import plan_table
from hybrid_lightning.adapters.sketch import SketchedGradients
from hybrid_lightning.callbacks import HybridAdapterSetup
from hybrid_lightning.errors import CheckpointError, ConfigError, PlanError
from hybrid_lightning.export import AdapterFolder, LoraFolder, MergedModel, TrainedPolicy, policy_of_module, write_policy
from hybrid_lightning.export.trained import peft_weights
from hybrid_lightning.losses import GRPOLoss
from hybrid_lightning.memory.sizes import measure_sizes
from hybrid_lightning.model.current_weights import CurrentWeights
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.sharding.weights import Weights

FAMILIES = ["qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "mixtral", "gpt_oss", "glm4_moe", "deepseek_v3"]
FAMILIES += ["granitemoehybrid", "llama4_text"]
IDS = torch.arange(3, 27).view(2, 12)
RANKS = {"experts": 3}
LATENT = {"head_dim": 8, "num_key_value_heads": 4}


def build(family="qwen3_moe", **sizes):
    return build_family(family, **(LATENT if family == "deepseek_v3" else {}), **sizes).requires_grad_(False)


def write(folder, model):
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def plan_of(model, name="tiny", lora=None):
    """Attention's output, experts and routers by LoRA, and the last layer's experts by full training."""
    lora = lora or LoraSettings(rank=4, alpha=6, use_rslora=True)
    routers = {name.rpartition(".")[2] for name, module in model.named_modules() if is_router(module)}
    candidates = find_candidates(model, ["o_proj", "experts", *routers])
    ranks = ranks_by_pattern(candidates, RANKS, lora.rank)
    plan = make_plan(PlannedModel(name, model_digest(model)), candidates, ModuleBudget(0.0), lora, None, ranks)
    last = [module.name for module in plan.candidates if module.name.endswith("experts")][-1]
    modules = (dataclasses.replace(m, mode="full", rank=None) if m.name == last else m for m in plan.candidates)
    return dataclasses.replace(plan, candidates=tuple(modules))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_what_transformers_peft_and_engines_load(family, tmp_path):
    """From the start policy, bit for bit, to every form that a trained policy is written in."""
    base = write(tmp_path / "base", build(family))
    model = load(base)
    start, plan = logits(model), plan_of(model, str(base))
    plan.save(tmp_path / "plan.json")
    assert AdapterPlan.load(tmp_path / "plan.json") == plan and plan.ranks == (3, 4)
    assert "4 experts" in plan_table(plan).columns[1]._cells
    sizes = measure_sizes(build(family).to("meta"), plan, keep_start_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of ranks of parameters
        adapted = apply_plan(model, plan)
    state = trainable_state(adapted)
    assert plan.trainable_parameters() == sizes.trainable == sum(weight.numel() for weight in state.values())
    assert torch.equal(logits(adapted), start)
    for weight in state.values():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    trained = logits(adapted)
    assert (trained - start).abs().max() > 0.05
    with adapter_disabled(adapted):
        assert torch.equal(logits(adapted), start)

    policy = TrainedPolicy(plan, peft_weights(state, plan, "the test"), Pretrained(str(base)))
    merged = load(write_policy(policy, MergedModel(), tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), trained, atol=2e-6, rtol=1e-5)
    folder = write_policy(policy, AdapterFolder(), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(logits(PeftModel.from_pretrained(load(base), folder)), trained, atol=2e-6, rtol=1e-5)

    stored = load_file(base / "model.safetensors")
    for everything in (True, False):
        weights, values = CurrentWeights(adapted, Weights(), "base", 1, True), {}
        for weight in weights.stream(everything):
            values[weight.name] = torch.empty(weight.shape)
            weight.write_rows(values[weight.name][:3], 0)
            weight.write_rows(values[weight.name][3:], 3)
        assert {name: tuple(value.shape) for name, value in values.items()} == weights.shapes(everything)
        assert values.keys() <= stored.keys(), "names of a checkpoint"
        save_file({**stored, **values}, base / "model.safetensors", metadata={"format": "pt"})
        torch.testing.assert_close(logits(load(base)), trained, atol=2e-6, rtol=1e-5)


# ---- scores


def losses_of(model, rows=IDS):
    return (model(row[None], labels=row[None]).loss for row in rows)


def score(model, scorer, gradients=None, rows=IDS):
    return Scoring(model, find_candidates(model, named=["experts"]), losses_of(model, rows), scorer, 2, gradients).run()


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text"])
def test_tails_and_energies_of_each_experts_matrix_are_added_up(family):
    model = build(family, num_hidden_layers=2)
    rows = torch.randint(3, 40, (6, 24), generator=torch.Generator().manual_seed(0))  # enough for every expert to get some
    candidates = find_candidates(model, named=["experts"])
    experts = {name: module for name, module in candidates.items() if is_experts(module)}
    assert experts and len(candidates) > len(experts)
    scored = {kind: score(model, kind(), rows=rows) for kind in (scorers.TailEnergy, scorers.TailFraction, scorers.GradientNorm)}
    scored |= {kind: score(model, kind(), rows=rows) for kind in (scorers.PreconditionedTail, scorers.Random)}
    sketched = score(model, scorers.TailEnergy(), SketchedGradients(size=5), rows)
    for module in experts.values():
        for weight in matrices_of(module).values():
            weight.requires_grad_(True)
    (sum(losses_of(model, rows)) / len(rows)).backward()
    for name, module in experts.items():
        gradients = [ExactGradient(matrix) for weight in matrices_of(module).values() for matrix in weight.grad]
        assert len(gradients) == 8
        energy, tail = (sum(of(gradient) for gradient in gradients) for of in (ExactGradient.energy, lambda g: g.tail_energy(2)))
        steps = sum(gradient.preconditioned().tail_energy(2) for gradient in gradients)
        expected = {scorers.TailEnergy: tail, scorers.TailFraction: tail / energy, scorers.GradientNorm: energy**0.5}
        for kind, value in (expected | {scorers.PreconditionedTail: steps}).items():
            assert scored[kind][name] == pytest.approx(value, rel=1e-4), kind
        assert 0 < scored[scorers.Random][name] < 1 and sketched[name] == pytest.approx(tail, rel=0.3)
    linear = next(name for name in candidates if name not in experts)
    assert (
        scored[scorers.TailEnergy][linear]
        == Scoring(model, {linear: candidates[linear]}, losses_of(model, rows), scorers.TailEnergy(), 2).run()[linear]
    )


class LargestEntry(scorers.Scorer):
    def score(self, statistics, rank):
        return float(statistics.gradient.matrix().abs().max())


def test_experts_without_tokens_and_scorers_that_need_one_matrix_are_reported():
    model = build(num_hidden_layers=1, num_local_experts=16)
    with pytest.warns(UserWarning, match=r"of 32 matrices of experts got no token from the calibration losses .*\(such as model"):
        scores = score(model, scorers.PreconditionedTail(), rows=IDS[:1, :4])
    assert scores["model.layers.0.mlp.experts"] > 0
    with pytest.raises(ConfigError, match=r"each expert has its own; use a scorer such as PreconditionedTail"):
        score(model, LargestEntry(), rows=torch.randint(3, 40, (8, 64), generator=torch.Generator().manual_seed(0)))


# ---- impossible combinations are refused before weights are loaded


@pytest.mark.parametrize(("option", "value"), [("use_dora", True), ("dropout", 0.1)])
def test_low_rank_of_experts_is_plain(tmp_path, option, value):
    folder = write(tmp_path / "model", build(num_hidden_layers=1))
    (folder / "model.safetensors").unlink()
    policy = build_policy(folder)
    with pytest.raises(ConfigError, match=rf"adapter\.{option}=.* does not work with LoRA on experts.*\{{experts: 0\}}"):
        HybridAdapterSetup(rank_pattern=RANKS, **{option: value}).check(policy)
    HybridAdapterSetup(rank_pattern={"experts": 0}, **{option: value}).check(policy)


def test_a_plan_of_other_experts_is_refused():
    plan = plan_of(build())
    with pytest.raises(PlanError, match=r"mlp\.experts has shape \{'gate_up_proj': \(4, 64, 64\).*; here it has .*\(8, 64"):
        plan.check_model(build(num_local_experts=8))
    with pytest.raises(CheckpointError, match=r"does not have the trained weight '.*layers\.3\.mlp\.gate\.lora_A.weight'"):
        peft_weights({}, dataclasses.replace(plan, candidates=plan.candidates[-1:]), "it")


# ---- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("experts") / "model", build(num_hidden_layers=2))


RUNS = {"LoRA": ({"share": 0.0}, {}), "full": ({"share": 1.0, "keep_start_weights": False}, {"gradient_checkpointing": True})}
RUNS |= {"hybrid": ({"share": 0.9}, {"loss": GRPOLoss(kl_coef=0.05), "dtype": "bfloat16"})}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_trains_experts_resumes_bit_for_bit_and_its_export_computes_the_same(folder, sums, tmp_path, kind):
    options, policy = RUNS[kind]
    flags = {"precision": "bf16-mixed"} if "dtype" in policy else {}
    adapter = {**options, "rank_pattern": {"experts": 4, "gate": 4}}

    def run(steps, ckpt=None):
        root = tmp_path / f"{steps}"
        return fit(folder, sums, root, build_adapter(**adapter), policy=policy, max_steps=steps, ckpt=ckpt, **flags)

    module = run(4)
    modes = {(m.mode, m.rank) for m in module.plan.candidates if m.experts}
    assert modes == {"LoRA": {("lora", 4)}, "full": {("full", None)}, "hybrid": {("full", None), ("lora", 4)}}[kind]
    first = run(2)
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = run(4, ckpt=tmp_path / "half.ckpt")
    start, whole = trained(first), trained(module)
    assert all(torch.equal(value, trained(again)[name]) for name, value in whole.items())
    experts = [name for name in whole if ".experts." in name or ".gate." in name]
    assert experts and not any(torch.equal(whole[name], start[name]) for name in experts)

    exported = write_policy(policy_of_module(module), MergedModel("float32"), tmp_path / "merged")
    with torch.no_grad(), module.policy.inference():
        expected = module.policy.model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(flags)):
        found = logits(load(exported))
    # 5e-6: 40 roundings of float32 near 1
    torch.testing.assert_close(found.float(), expected.float(), atol=0.05 if flags else 5e-6, rtol=0)


def test_experts_are_trained_only_where_they_are_named(folder, sums, tmp_path, capsys):
    frozen = r"Also frozen: experts, 60% of the weights; adapter.rank_pattern={experts: 4} gives them LoRA"
    for number, (options, is_frozen) in enumerate([({}, True), ({"target_modules": ["experts"]}, False)]):
        module = fit(folder, sums, tmp_path / f"{number}", build_adapter(share=0.0, **options), max_steps=1 - is_frozen)
        names = {name.partition(".lora_")[0].removesuffix(".base_layer") for name in trained(module)}
        assert {name.endswith(".experts") for name in names} == {not is_frozen}
        assert (frozen in capsys.readouterr().out) == is_frozen
    with pytest.raises(ConfigError, match=r"form=LoraFolder: the plan has LoRA on experts.* export form=MergedModel"):
        LoraFolder().check(module.plan)
