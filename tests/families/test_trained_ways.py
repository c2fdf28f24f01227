"""The other columns, and the refusals: before weights are read, with a remedy that works."""

import importlib.util
import re
from dataclasses import replace

import pytest
from columns import IN_VLLM, folder_of
from long_cases import long_but
from table import PAGE, assert_column
from tiny_runs import build_adapter, build_policy

from hybrid_lightning.adapters import LoraSettings, ModuleBudget, find_candidates
from hybrid_lightning.adapters.budgets import plan_of_budget
from hybrid_lightning.errors import ModelError, PlanError
from hybrid_lightning.model.loading import load_config, resolve_model


@pytest.mark.parametrize(
    "column", long_but(["LoRA", "full", "NF4 base", "memory", "vLLM", "stays frozen", "candidates"], 3, 4, 5, 6)
)
def test_what_is_tried_is_what_the_page_says(column):
    assert_column(column)


def test_architectures_have_vllms_names():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from vllm.model_executor.models.registry import ModelRegistry

    assert set(ModelRegistry.get_supported_archs()) >= set(IN_VLLM)


def test_lora_where_kernels_read_the_weight_is_refused_before_weights_are_read(tmp_path):
    """As in a plan that was edited; with the mode that the message names the plan is taken."""
    policy = build_policy(folder_of("mamba2"))
    plan = plan_of_budget(find_candidates(policy.policy.pretrained.skeleton()), ModuleBudget(0.0), LoraSettings(rank=2))
    assert {module.mode for module in plan.candidates if module.name.endswith("out_proj")} == {"frozen"}

    def written(mode):
        modules = [replace(m, mode=mode) if m.name.endswith("0.mixer.out_proj") else m for m in plan.candidates]
        replace(plan, candidates=tuple(modules)).save(tmp_path / f"{mode}.json")
        return build_adapter(plan=str(tmp_path / f"{mode}.json"))

    with pytest.raises(PlanError, match=r"0\.mixer\.out_proj cannot have LoRA, .*; give it the mode \"frozen\" or \"full\""):
        written("lora").check(policy)
    written("full").check(policy)
    assert not policy.policy.is_loaded


def test_a_wrapper_without_a_causal_language_model_is_refused_with_code_that_saves_its_text_part(tmp_path, monkeypatch):
    folder = folder_of("mistral3")
    with pytest.raises(ModelError, match=r"a 'mistral3' model; save its text part, a 'ministral3' model, in a folder of its own"):
        load_config(resolve_model(str(folder)))
    (code,) = re.findall(r"^<!-- run: text_part -->\n```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("vision/model", str(folder)))
    policy = build_policy(tmp_path / "text")
    assert type(policy.model).__name__ == "Ministral3ForCausalLM" and policy.tokenizer.eos_token_id == 2
