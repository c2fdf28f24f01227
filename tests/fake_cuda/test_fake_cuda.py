"""What sampling and an update ask of a GPU, counted at full size on one that is none (see `fake_gpu.py`)."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # also where pytest imports by path alone

from fake_gpu import multiplies_to_floats, why_not

ROOT = Path(__file__).parents[2]
CAPABILITIES = ("80", "86", "90", "120")  # A100, 3090 and A10, H100, 5090
pytestmark = [pytest.mark.long, pytest.mark.cuda_code, pytest.mark.skipif(bool(why_not()), reason=why_not())]
OLDER = not multiplies_to_floats()
counts_logits = pytest.mark.skipif(
    OLDER, reason="this torch, as 2.8, has logits of tensors without data by other kernels than a GPU"
)


def run(script, folder, *arguments):
    """The output of a script in a process of its own, since the guard has to be there before torch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["TORCHINDUCTOR_CACHE_DIR"] = environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(Path(__file__).parent / script), str(folder / "found.json"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the scripts find, side by side: `counts.py`, and where there is Triton `cubins.py`."""
    scripts = {"counts.py": (), **({"cubins.py": CAPABILITIES} if importlib.util.find_spec("triton") else {})}
    with ThreadPoolExecutor(2) as threads:
        yield {script: threads.submit(run, script, tmp_path_factory.mktemp("found"), *of) for script, of in scripts.items()}


@pytest.fixture
def counts(found):
    return found["counts.py"].result()


# In a step's two places: once to cut rows into passes, and for the layout.
OF_LAYOUT = {
    "boolean index in packing.__init__": 5,
    "boolean index in packing._bands": 4,
    "tolist in packing._bands": 1,
    "nonzero in packing.__init__": 1,
    "bincount in packing.__init__": 1,
    "_local_scalar_dense in packing.__init__": 2,
    "_local_scalar_dense in gathering.of": 2,
    "nonzero in gathering.of": 2,
    "tolist in segment_attention.of": 1,
    "boolean index in logprobs.token_logprobs": 1,
}
OF_ROWS = {"tolist in batching.split_by_tokens": 3, "_local_scalar_dense in types.rows": 2}


@counts_logits
@pytest.mark.parametrize(("run", "groups"), [("steps", 1), ("steps of a hybrid", 2), ("steps of one long row", 1)])
def test_a_training_step_waits_for_its_layout_and_its_gradient_norms_and_holds_what_is_planned(counts, run, groups):
    """GSPO with a KL term, clipping, logging and AdamW under Lightning. Attention sets the peak of its backward pass."""
    found, at_once = counts[run], {"_local_scalar_dense in step.micro_batch": 1}
    norms = {"_local_scalar_dense in step.log_gradient_norms": groups}
    assert found["waits"] == {**OF_LAYOUT, **OF_ROWS, **at_once, **norms}
    assert found["before"] == {place: 2 * number for place, number in {**OF_LAYOUT, **OF_ROWS}.items()}, "policy and start policy"
    assert found["copies"] == {} and found["atomics"] == [] and found["logits"] <= counts["most logits"]
    assert 0.98 < found["forward"] < 1.02 and 0.94 < found["backward"] < 1.01
    if "long" not in run:  # of 9,700 tokens through two layers
        assert found["kernels"] <= 790 and found["bytes"] < 76e9


@counts_logits
def test_mistakes_in_a_step_are_found_and_named(counts):
    """A number that the host needs, a copy of the embeddings, additions by atomics, and the logits of all tokens at once."""
    found = counts["planted steps"]
    more = Counter(found["waits"]) - Counter(counts["steps"]["waits"])
    assert more == {"_local_scalar_dense in step.micro_batch": 1} and found["copies"] == {"clone in step.micro_batch": 2}
    assert found["atomics"] == ["index_add_"] * 2
    assert found["logits"] == 4 * 8 * 256 > counts["most logits"] and found["forward"] < 1.02, "the plan has them, too"


@counts_logits
@pytest.mark.parametrize(
    ("run", "of_a_module", "kernels"),
    [
        ("scoring", {"to host in gradients.add": 1}, 580),
        ("sketches", {"from host in sketch._test_matrices": 2}, 700),  # which are the same on all kinds of devices
    ],
)
def test_modules_are_scored_with_a_wait_a_loss_and_few_a_module(counts, run, of_a_module, kernels):
    found, waits = counts[run], {"_local_scalar_dense in scoring.check_loss": 1}
    waits |= {place: number * found["modules"] for place, number in of_a_module.items()}
    assert found["waits"] == {**OF_LAYOUT, **waits} and found["copies"] == {} and found["atomics"] == []
    assert found["kernels"] <= kernels and found["bytes"] < 76e9


@counts_logits
@pytest.mark.parametrize("run", ["rollout", "rollout of a hybrid"])
def test_a_rollout_waits_before_its_first_token_alone_and_holds_what_is_planned(counts, run):
    """It waits for the layout of its prompts, which the host sends, and for whatever stops it."""
    found = counts[run]
    of_prompts = ("boolean index in packing.__init__", "nonzero in gathering.of")
    numbers = (f"_local_scalar_dense in {place}" for place in ("packing.__init__", "gathering.of", "segment_attention.of"))
    sent = {"from host in sampler.__init__": 1, "from host in batching.pad_right": 2}
    assert found["before"] == {**sent, **dict.fromkeys((*of_prompts, *numbers), 1), of_prompts[0]: 4}
    assert found["waits"] == {} and found["copies"] == {} and found["atomics"] == []
    assert 0.98 < found["peak"] < 1.03, "as where all logits are there once"


@counts_logits
@pytest.mark.parametrize("run", ["rollout", "rollout of a hybrid"])
def test_a_token_takes_few_kernels_and_moves_little_more_than_weights_keys_and_values_once(counts, run):
    layer, token = counts[run]["layer"], counts[run]["token"]
    assert layer["kernels"] == 15 + 6 + 2, "products, what is compiled between them, attention"
    assert 1 < layer["ideal"] < 1.1
    assert token["kernels"] <= 2 * layer["kernels"] + 80, "the output layer and the draw, and what the loop keeps"


# Kernels, products, and looks at whether a tensor is aligned, each with a copy where it is not. Older torch has one kernel more.
OF_FUNCTIONS = {
    "before_attention": (3, 5, 12),  # a norm; keys with their norm and rotation, and values, to their places; queries
    "after_attention": (4, 10, 16),  # two runs of keys; sum and norm; gated unit; sum
    "norm": (1, 0, 2),
    "norm_gradient": (1, 0, 4),
    "product_of_silu": (1, 0, 2),
    "silu_gradients": (1, 0, 3),
    "joined_results": (2, 0, 4),  # and the sums, which are in another order
    "block_sums": (1, 0, 1),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_everything_compiled_becomes_cuda_code_of_few_kernels_and_no_clock_chooses_them(found, capability):
    """Code of LoRA and of a hybrid, which its layers share, in both precisions."""
    if "cubins.py" not in found:
        pytest.skip("Triton is missing: pip install -e '.[cuda-code]'")
    codes = found["cubins.py"].result()[capability]
    assert {name.partition(",")[0] for name in codes} == set(OF_FUNCTIONS)
    for name, code in codes.items():
        kernels, products, looks = OF_FUNCTIONS[name.partition(",")[0]]
        assert kernels <= code["kernels"] <= kernels + OLDER and code["products"] == products and code["looks"] <= looks, name
        assert code["others"] == [] and code["cubins"] <= code["kernels"], name
        assert not code["cubins"] or code["smallest"] > 1000, name
        function, dtype, _, number = name.split(", ")
        known = f"{function}, {dtype}, 0, {0 if 'attention' in function else number}"
        assert code["is new"] == (name == known), "a hybrid and other layers have the code of LoRA's first"
    assert sum(code["cubins"] for code in codes.values()) >= sum(kernels for kernels, _, _ in OF_FUNCTIONS.values())
