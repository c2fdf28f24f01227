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

LAYERS = 28  # of Qwen3-0.6B
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


def test_mistakes_that_are_planted_are_found(counts):
    """A number or tensor that the host needs, an addition by atomics, a CPU tensor among GPU tensors."""
    planted = counts["planted"]
    assert planted["to host"] == "to host" and planted["from host"] == "from host"
    waits = {"DataDependentOutputException", "DynamicOutputShapeException"}
    assert {planted[name] for name in ("item", "tolist", "if", "boolean index")} <= waits
    assert planted["index_add"] == "index_add" and "index_put" in planted["accumulate"]
    assert planted["stray"] not in ("", *waits) and planted["nothing"] == ""


@counts_logits
def test_tokens_of_the_samplers_loop_wait_for_nothing_and_add_in_one_order(counts):
    found = counts["decoding"]
    assert found["syncs"] == found["atomics"] == counts["syncs of stop strings"] == []
    assert found["kernels of a layer"] == 15 + 6 + 2, "products, what is compiled between them, attention"
    assert counts["decoding of FFT"]["kernels of a layer"] == 7 + 6 + 2
    assert found["kernels"] - LAYERS * found["kernels of a layer"] <= 80, "the output layer and the draw, and what the loop keeps"


@counts_logits
def test_a_token_moves_little_more_than_weights_keys_and_values_once(counts):
    for kind, ideal in counts["ideal"].items():
        assert 1 < counts[kind]["bytes"] / ideal < 1.2, kind


@counts_logits
@pytest.mark.parametrize(
    ("passes", "syncs", "kernels", "size"),
    [
        ("update", [], 165, 230e9),
        ("scoring", ["1 to host"], 135, 240e9),  # once a module, beside once a loss, which is looked at
        ("sketches", ["2 from host"], 195, 245e9),  # a module's two test matrices, which are the same on all kinds of devices
    ],
)
def test_passes_of_four_prompts_wait_for_nothing_add_in_one_order_and_keep_their_ceilings(counts, passes, syncs, kernels, size):
    """Of 32 completions of 256 tokens, with the prompts of 384 once: 9,700 tokens."""
    found = counts[passes]
    assert found["syncs"] == syncs and found["atomics"] == []
    assert found["kernels of a layer"] <= kernels and found["bytes"] < size
    assert counts["sketches"]["bytes"] < 1.02 * counts["scoring"]["bytes"]


def test_the_layout_of_a_micro_batch_waits_nineteen_times(counts):
    """It waits once for all layers, to learn the shapes that follow."""
    wanted = {"boolean index": 9, "nonzero": 3, "bincount": 1, "_local_scalar_dense": 4, "tolist": 2}
    assert Counter(counts["syncs of a layout"]) == wanted
    assert Counter(counts["syncs of a layout with a window"]) == {**wanted, "repeat_interleave": 3}, "it hides keys of prompts"


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


@counts_logits
def test_mistakes_in_a_step_are_found_and_named(counts):
    """A number that the host needs, a copy of the embeddings, and the logits of all tokens at once."""
    found = counts["planted steps"]
    more = Counter(found["waits"]) - Counter(counts["steps"]["waits"])
    assert more == {"_local_scalar_dense in step.micro_batch": 1} and found["copies"] == {"clone in step.micro_batch": 2}
    assert found["logits"] == 4 * 8 * 256 > counts["most logits"] and found["forward"] < 1.02, "the plan has them, too"


@counts_logits
def test_modules_are_scored_with_a_wait_a_loss_and_one_a_module(counts):
    found = counts["scoring of a run"]
    once = {"_local_scalar_dense in scoring.check_loss": 1, "to host in gradients.add": found["modules"]}
    assert found["waits"] == {**OF_LAYOUT, **once} and found["copies"] == {} and found["atomics"] == []


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
