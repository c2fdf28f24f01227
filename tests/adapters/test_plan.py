import dataclasses
import json

import pytest
import torch
from rich.console import Console

from hybrid_lightning.adapters.budgets import Budget, ModuleBudget, ModuleScores, ParameterBudget, make_plan
from hybrid_lightning.adapters.candidates import find_candidates
from hybrid_lightning.adapters.lora_settings import LoraSettings
from hybrid_lightning.adapters.plan import AdapterPlan, PlannedModel, PlannedModule
from hybrid_lightning.adapters.plan_display import plan_markdown, plan_table
from hybrid_lightning.adapters.scorers import Random, TailEnergy
from hybrid_lightning.adapters.scoring import Scoring
from hybrid_lightning.errors import ConfigError, PlanError


def module(name: str, score: float | None, parameters: int = 256, mode: str = "lora") -> PlannedModule:
    return PlannedModule(name, (16, parameters // 16), parameters, score, mode)


@pytest.fixture
def plan(make_model, plan_for) -> AdapterPlan:
    return plan_for(make_model("qwen2"))


# ---- budgets


@pytest.mark.parametrize(
    ("share", "candidates", "full"),
    [(0.1, 28, 3), (0.1, 30, 3), (0.1, 14, 1), (0.1, 4, 1), (0.5, 3, 2), (0, 28, 0), (1, 28, 28), (0.1, 196, 20)],
)
def test_module_budget_rounds(share, candidates, full):
    modules = [module(f"layers.{i}", float(i)) for i in range(candidates)]
    chosen = ModuleBudget(share).choose(modules, LoraSettings())
    assert chosen == {f"layers.{i}" for i in range(candidates - full, candidates)}


def test_ties_go_by_name():
    modules = [module(name, 1.0) for name in "dbca"]
    assert ModuleBudget(0.5).choose(modules, LoraSettings()) == {"a", "b"}
    assert ParameterBudget(0.5).choose(modules, LoraSettings(rank=1)) == {"a", "b"}


def test_parameter_budget_by_hand():
    """Extra parameters at rank 1: 256 - 32 = 224 of the small, 1024 - 80 = 944 of the large modules."""
    modules = [module("small", 224.0), module("large", 2 * 944.0, 1024), module("poor", 1.0), module("rest", 1.0, 1024)]
    total = 2560
    for parameters, chosen in [(1024, {"large"}), (1279, {"large"}), (1280, {"large", "small"})]:
        assert ParameterBudget(parameters / total).choose(modules, LoraSettings(rank=1)) == chosen
    with pytest.raises(ConfigError, match=r"allows 1023 .*first module by score, large, has 1024; raise the share"):
        ParameterBudget(1023.5 / total).choose(modules, LoraSettings(rank=1))


def test_modules_that_cost_no_more_than_lora_come_first():
    modules = [module("tiny", 1.0, 32), module("large", 1e9, 1024)]
    assert ParameterBudget(0.5).choose(modules, LoraSettings(rank=8)) == {"tiny"}


def test_budgets_say_what_they_need():
    with pytest.raises(ConfigError, match=r"share=1\.5"):
        ModuleBudget(1.5)
    with pytest.raises(ConfigError, match="needs a score of b"):
        ModuleBudget(0.5).choose([module("a", 1.0), module("b", None)], LoraSettings())
    assert [ModuleBudget(share).needs_scores for share in (0, 0.1, 1)] == [False, True, False]
    assert ParameterBudget(1).choose([module("a", None)], LoraSettings()) == {"a"}


def test_a_budget_of_ones_own():
    class FirstLayer(Budget):
        def _choose(self, modules, lora):
            return [m.name for m in modules if ".0." in m.name]

    assert FirstLayer(0.5).choose([module("layers.0.q", 1.0), module("layers.1.q", 2.0)], LoraSettings()) == {"layers.0.q"}


# ---- making


def test_plan_against_one_from_full_gradients(make_model, losses):
    model = make_model("llama")
    candidates = find_candidates(model)
    scores = Scoring(model, candidates, losses(model), TailEnergy(), 4).run()
    plan = make_plan(
        PlannedModel("tiny", "0"), candidates, ModuleBudget(0.2), LoraSettings(rank=4), ModuleScores(scores, TailEnergy())
    )
    model.double().requires_grad_(True)
    torch.stack(list(losses(model))).mean().backward()
    tails = {n: float(torch.linalg.svdvals(m.weight.grad)[4:].square().sum()) for n, m in candidates.items()}
    assert set(plan.full_modules) == set(sorted(tails, key=tails.get)[-3:])
    assert [m.score for m in plan.candidates] == pytest.approx(list(tails.values()), rel=1e-3, abs=1e-9)


def test_a_plan_records_settings_left_at_their_defaults(make_model):
    base, candidates = PlannedModel("tiny", "0"), find_candidates(make_model("llama"))
    scores = ModuleScores(scorer=Random(), calibration={"signal": "reward"})
    plan = make_plan(base, candidates, ModuleBudget(1), LoraSettings(), scores)
    assert plan.scorer == {"class_path": "hybrid_lightning.adapters.Random", "init_args": {"seed": 0}}
    assert plan.budget["init_args"] == {"share": 1}
    assert make_plan(base, candidates, ModuleBudget(0), LoraSettings()).budget["init_args"] == {"share": 0}
    assert plan.candidates[0].score is None and plan.lora_modules == ()
    with pytest.raises(ConfigError, match="needs a score"):
        make_plan(base, candidates, ModuleBudget(), LoraSettings())
    with pytest.raises(PlanError, match="infinite"):
        make_plan(base, candidates, ModuleBudget(1), LoraSettings(), ModuleScores(calibration={"reward": float("inf")}))


def test_counts(make_model, plan_for):
    model = make_model("qwen2")  # with biases on q, k and v
    plan = plan_for(model, lora=LoraSettings(rank=4, use_dora=True))
    expected = 0
    for name, linear in find_candidates(model).items():
        outputs, inputs = linear.weight.shape
        lora = 4 * (outputs + inputs) + outputs
        expected += sum(p.numel() for p in linear.parameters()) if name in plan.full_modules else lora
    assert plan.trainable_parameters() == expected
    assert len(plan.full_modules) == 3 and len(plan.lora_modules) == 11


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank=0"), ({"alpha": 0.0}, "alpha=0"), ({"dropout": 1.0}, "dropout=1")],
)
def test_lora_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**settings)


# ---- showing


def test_tables_list_all_modules_by_score(plan):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_table(plan))
    text = console.export_text()
    names = [m.name for m in sorted(plan.candidates, key=lambda m: -m.score)]
    for table in (text, plan_markdown(plan)):
        places = [table.index(f"{name} " if table is text else name) for name in names]
        assert places == sorted(places)
        assert "3 fully trained, 11 with LoRA of rank 4" in table
    assert f"| **{names[0]}** |" in plan_markdown(plan)


def test_a_table_may_be_of_the_full_modules_and_the_next_few(plan):
    by_score = [m.name for m in sorted(plan.candidates, key=lambda m: -m.score)]
    (names, *_), full = plan_table(plan, 2).columns, set(plan.full_modules)
    others = [name for name in by_score if name not in full][:2]
    assert list(names.cells) == [name for name in by_score if name in full or name in others]
    everything = dataclasses.replace(
        plan,
        candidates=tuple(dataclasses.replace(m, mode="full", name=f"{m.name}.{n}") for m in plan.candidates for n in range(3)),
    )
    assert plan_table(everything, 10).row_count == 30 and plan_table(everything).row_count == 42


# ---- files


def test_round_trip(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    loaded = AdapterPlan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.digest == plan.digest
    torch.save({"plan": plan.to_dict()}, tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert AdapterPlan.from_dict(checkpoint["plan"]) == plan


def test_a_person_can_read_the_file(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert lines[1].startswith('  "digest": ') and len(lines) < 14 + len(plan.candidates) + 2
    assert sum('"mode": "full"' in line for line in lines) == 3


def test_editing_by_hand(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    edited = path.read_text().replace('"mode": "lora"', '"mode": "frozen"', 1)
    path.write_text(edited)
    with pytest.raises(PlanError, match=r'plan\.json was changed.*delete the line "digest"'):
        AdapterPlan.load(path)
    path.write_text("\n".join(line for line in edited.splitlines() if '"digest"' not in line))
    changed = AdapterPlan.load(path)
    assert len(changed.lora_modules) == 10 and changed.digest != plan.digest
    changed.save(path)
    assert AdapterPlan.load(path) == changed


def test_every_part_of_the_content_is_in_the_digest(plan):
    first = plan.candidates[0]
    changes = {
        "model": "other",
        "revision": "v2",
        "model_digest": "1",
        "candidates": (dataclasses.replace(first, score=9.0), *plan.candidates[1:]),
        "lora": LoraSettings(rank=5),
        "budget": {},
        "scorer": None,
        "calibration": {"rollouts": 1},
        "seed": 3,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(plan)}
    digests = {dataclasses.replace(plan, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {plan.digest}) == len(changes) + 1


def broken(plan, **changes):
    data = {**json.loads(json.dumps(plan.to_dict())), "digest": None, **changes}
    return {name: value for name, value in data.items() if value != "DELETE"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "DELETE"}, 'lacks the field "model"'),
        ({"extra": 1}, 'unknown field "extra"'),
        ({"format": 3}, "has format 3, and this version reads 1"),
        ({"seed": "0"}, '"seed" is "0", but must be int or null'),
        ({"seed": True}, '"seed" is true'),
        ({"lora": {"rank": 4}}, 'lora lacks the field "alpha"'),
        ({"lora": {"rank": 0, "alpha": 1, "dropout": 0, "use_dora": False, "use_rslora": False}}, "lora: rank=0"),
        ({"candidates": []}, "has no modules"),
        ({"candidates": ["layers.0"]}, r"candidates\[0\] must be a JSON object"),
        ({"candidates": {}}, '"candidates" is {}, but must be list'),
    ],
)
def test_wrong_fields_are_named(plan, changes, message):
    with pytest.raises(PlanError, match=message) as error:
        AdapterPlan.from_dict(broken(plan, **changes), source="p.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "half"}, 'mode is "half": it must be one of full, lora, frozen'),
        ({"shape": [1]}, r"shape is \[1\]"),
        ({"shape": [1, 0.5]}, "two positive numbers"),
        ({"score": float("nan")}, '"score" is NaN'),
        ({"name": 3}, '"name" is 3'),
        ({"parameters": 2.0}, '"parameters" is 2.0, but must be int'),
    ],
)
def test_wrong_modules_are_named(plan, change, message):
    data = broken(plan)
    data["candidates"][1].update(change)
    with pytest.raises(PlanError, match=r"candidates\[1\].*" + message):
        AdapterPlan.from_dict(data)


def test_a_module_may_be_planned_once_only(plan):
    data = broken(plan)
    data["candidates"].append(data["candidates"][2])
    with pytest.raises(PlanError, match=r"self_attn\.v_proj twice"):
        AdapterPlan.from_dict(data)


def test_files_that_are_no_plans(tmp_path):
    with pytest.raises(PlanError, match=r"missing\.json cannot be read \(No such file"):
        AdapterPlan.load(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("{,}")
    with pytest.raises(PlanError, match=r"text\.json is no JSON"):
        AdapterPlan.load(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(PlanError, match=r"list\.json must be a JSON object"):
        AdapterPlan.load(tmp_path / "list.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"binary\.json is no JSON"):
        AdapterPlan.load(tmp_path / "binary.json")


# ---- other models


def test_a_plan_fits_its_model_only(plan, make_model):
    plan.check_model(make_model("qwen2", seed=5))
    with pytest.raises(PlanError, match="other weights"):
        plan.check_weights(make_model("qwen2", seed=5))
    plan.check_weights(make_model("qwen2"))
    with pytest.raises(PlanError, match=r"names model\.layers\.0\.self_attn\.q_proj; this model has no such module"):
        plan.check_model(make_model("gpt2"))
    wider = dataclasses.replace(plan.candidates[4], shape=(99, 32))
    with pytest.raises(PlanError, match=r"gate_proj has shape \(99, 32\); here it has \(48, 32\)"):
        dataclasses.replace(plan, candidates=(wider,)).check_model(make_model("qwen2"))
    norm = dataclasses.replace(plan.candidates[0], name="model.norm")
    with pytest.raises(PlanError, match="a Qwen2RMSNorm there, no linear module"):
        dataclasses.replace(plan, candidates=(norm,)).check_model(make_model("qwen2"))
