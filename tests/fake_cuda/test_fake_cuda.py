"""What a run asks of a GPU, counted at full size and computed at small size on one that does not exist (see `fake_gpu.py`)."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
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
    """What the scripts find, two side by side: `counts.py`, `values.py`, and where there is Triton `cubins.py`."""
    scripts = {"cubins.py": CAPABILITIES} if importlib.util.find_spec("triton") else {}
    scripts = {"counts.py": (), **scripts, "values.py": ()}
    with ThreadPoolExecutor(2) as threads:
        yield {script: threads.submit(run, script, tmp_path_factory.mktemp("found"), *of) for script, of in scripts.items()}


@pytest.fixture
def counts(found):
    return found["counts.py"].result()


# Kernels, the bytes that they move, and the peak of memory; of a token, instead of the peak, what the host launches. With these
# versions they are exact, and others may need a few kernels more. They were counted, and tests below say what they consist of:
# operations follow from the model's sizes, peaks from the plan of memory, and a layer's kernels from its products.
VERSIONS = {"torch": "2.13", "transformers": "5.25", "peft": "0.21", "lightning": "2.6"}
COUNTED = {
    "steps": {
        "on-policy": (248, 49742898491, 3382403568),
        "log-probabilities": (551, 100373944950, 3382436336),
        "forward": (467, 67142368799, 4171436012),
        "backward": (300, 7459610532, 1330489328),
        "optimizer step": (26, 46138322, 388858224),
    },
    "steps of a hybrid": {
        "on-policy": (248, 49742898491, 3394724336),
        "log-probabilities": (548, 100312244854, 3401048560),
        "forward": (464, 67080668703, 4286141444),
        "backward": (292, 7224259492, 1432873992),
        "optimizer step": (44, 243270620, 447840652),
    },
    "steps of one long row": {
        "on-policy": (285, 96381852959, 3327509004),
        "log-probabilities": (625, 194260484158, 3327573004),
        "forward": (539, 130200217337, 4663670489),
        "backward": (336, 13363691358, 3000311565),
        "optimizer step": (26, 46138322, 388976573),
    },
    "scoring": {"scoring": (536, 74582038398, 4273194700)},
    "sketches": {"scoring": (648, 74976368510, 4284286668)},
    "rollout": {
        "plain": (132, 446710928, 132),
        "replayed": (133, 446979728, 72),
        "fewer rows": (132, 437807336, 132),
        "fewer, replayed": (133, 438597992, 72),
    },
    "rollout by top-p": {
        "plain": (191, 2452149809, 191),
        "replayed": (192, 2452418609, 131),
        "fewer rows": (191, 1941857825, 191),
        "fewer, replayed": (192, 1942648481, 131),
    },
    "rollout by top-k": {
        "plain": (152, 656787216, 152),
        "replayed": (153, 657056016, 92),
        "fewer rows": (152, 595364552, 152),
        "fewer, replayed": (153, 596155208, 92),
    },
    "weights": {"sent": (95, 1098340352, 708848640)},
}


@counts_logits
@pytest.mark.parametrize("run", COUNTED)
def test_a_run_does_no_more_work_than_its_sizes_ask_for_and_holds_no_more_than_it_did(counts, run):
    """Operations of products and attention are exactly those of `ideal.py`."""
    found = counts[run]
    assert {name: phase["flops"] for name, phase in found["phases"].items()} == found["least"]
    numbers = {
        name: (phase["kernels"], phase["bytes"], phase.get("peak", phase.get("launches")))
        for name, phase in found["phases"].items()
    }
    if all(version(name).startswith(f"{known}.") for name, known in VERSIONS.items()):
        assert numbers == COUNTED[run]
    for name, known in COUNTED[run].items():
        assert all(one <= 1.03 * other for one, other in zip(numbers[name], known, strict=True)), name
    assert found["atomics"] == [] and found["too long"] == 0 and found["logits"] <= counts["most logits"]


# What keeps a CUDA device from each fast pass.
PASSES = {
    **dict.fromkeys(("packed training", "shared prompts", "16-bit products", "attention by segments"), ""),
    "CPU kernels": "they are for CPUs, and the model is on cuda",
    "fused layers": "",
}
OF_ADAPTED = {"prepacked weights": "copies of weights do not pay on cuda", "fast decoding": "", "compiled layers": ""}
OF_BASE = {**OF_ADAPTED, "prepacked weights": "no layer has LoRA"}


@pytest.mark.parametrize("run", COUNTED)
def test_a_cuda_device_takes_all_fast_passes_by_the_products_own_choice(counts, run):
    """Only what torch tells of the device is made up: one of compute capability 9.0, and a torch with FlashAttention."""
    of_model = OF_BASE if run in ("scoring", "sketches") else OF_ADAPTED
    assert counts[run]["passes"] == {**PASSES, **of_model}


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
    """GSPO with a KL term, clipping, logging and AdamW under Lightning. Attention sets the peak of its backward pass.

    Log-probabilities of the policy and of the start policy are computed beforehand, without what a gradient needs.
    """
    found, at_once = counts[run], {"_local_scalar_dense in step.micro_batch": 1}
    norms = {"_local_scalar_dense in step.log_gradient_norms": groups}
    assert found["waits"] == {**OF_LAYOUT, **OF_ROWS, **at_once, **norms}
    assert found["before"] == {place: 2 * number for place, number in {**OF_LAYOUT, **OF_ROWS}.items()}, "policy and start policy"
    assert found["copies"] == {}
    planned = found["of plan"]
    assert 0.98 < planned["forward"] < 1.02 and 0.94 < planned["backward"] < 1.01 and 0.99 < planned["optimizer step"] < 1.01
    assert planned["log-probabilities"] < 0.85


@counts_logits
def test_mistakes_in_a_step_are_found_and_named(counts):
    """A number that the host needs, a wait, a copy from ordinary memory, a copy of weights, atomics, and all logits at once."""
    found = counts["planted steps"]
    more = Counter(found["waits"]) - Counter(counts["steps"]["waits"])
    places = ("_local_scalar_dense", "synchronize", "from host, not pinned")
    assert more == {f"{name} in step.micro_batch": 1 for name in places} and found["copies"] == {"clone in step.micro_batch": 2}
    assert found["atomics"] == ["index_add_"] * 2
    assert found["logits"] == 4 * 8 * 256 > counts["most logits"] and found["of plan"]["forward"] < 1.02, "the plan has them, too"


@pytest.mark.parametrize(("run", "changes"), [("card of 6 GiB", []), ("card of 5 GiB", ["--model.max_tokens_per_micro_batch"])])
def test_a_run_as_planned_for_a_card_fits_it_in_the_passes_that_it_chooses(counts, run, changes):
    """All passes of an update, some of which the card's memory cuts; on the smaller card as `plan --fit` tells."""
    found = counts[run]
    assert found["changes"] == changes
    assert 0.8 < found["of room"] < 0.95 and 0.98 < found["of plan"]["card"] < 1.01
    assert found["numbers"] == 1, "of a micro-batch, in however many passes"


@counts_logits
def test_a_plan_has_the_gradients_of_earlier_passes(counts):
    assert 0.98 < counts["full on a card of 7 GiB"]["of plan"]["card"] < 1.0


@counts_logits
def test_a_window_that_hides_nothing_costs_nothing(counts):
    assert counts["steps in a wide window"]["phases"] == counts["steps"]["phases"]


@counts_logits
@pytest.mark.parametrize("run", ["steps with an entropy bonus", "steps of an unplain output"])
def test_an_entropy_bonus_and_an_output_that_is_more_than_a_product_keep_few_logits(counts, run):
    assert 0.98 < counts[run]["of plan"]["forward"] < 1.0


@counts_logits
@pytest.mark.parametrize(
    ("run", "of_a_module"),
    [
        ("scoring", {"to host in gradients.add": 1}),
        ("sketches", {"from host in sketch._test_matrices": 2}),  # which are the same on all kinds of devices
    ],
)
def test_modules_are_scored_with_a_wait_a_loss_and_few_a_module(counts, run, of_a_module):
    found, waits = counts[run], {"_local_scalar_dense in scoring.check_loss": 1}
    waits |= {place: number * found["modules"] for place, number in of_a_module.items()}
    assert found["waits"] == {**OF_LAYOUT, **waits} and found["copies"] == {}
    assert 0.98 < found["of plan"]["scoring"] < 1.01


@counts_logits
@pytest.mark.parametrize("run", ["rollout", "rollout by top-p"])
def test_a_rollout_waits_before_its_first_token_alone_and_holds_what_is_planned(counts, run):
    """It waits for the layout of its prompts, which the host sends, for whatever stops it, and for the trial of its graphs.

    And at the two looks after which rows have ended, for all that ended together.
    """
    found = counts[run]
    of_prompts = ("boolean index in packing.__init__", "nonzero in gathering.of")
    numbers = (f"_local_scalar_dense in {place}" for place in ("packing.__init__", "gathering.of", "segment_attention.of"))
    sent = {
        "from host in sampler.__init__": 1,
        "from host in batching.pad_values": 1,
        "from host in batching.pad_right": 1,
        "from host in sampler.decode": 1,
    }
    assert found["before"] == {**sent, **dict.fromkeys((*of_prompts, *numbers), 1), of_prompts[0]: 4}
    of_ended = {"boolean index in sampler.decode": 2, "nonzero in sampler.decode": 2, "tolist in sampler.decode": 4 * 2}
    assert found["waits"] == {"equal in step_graphs.compare": 3, **of_ended} and found["copies"] == {}
    assert 0.98 < found["of plan"]["rollout"] < 1.03


@counts_logits
@pytest.mark.parametrize("run", ["rollout", "rollout by top-p"])
def test_ended_rows_leave_after_the_hosts_second_look_and_graphs_are_replayed_before_and_after(counts, run):
    """A quarter of the rows ends before the host's first look, after 16 tokens, and a quarter by its limit before the second."""
    found = counts[run]
    assert found["alive"] == {"32": 31, "24": 16, "16": 1}
    assert found["pools"] == 1, "for the graphs of all numbers of rows"
    assert found["replayed"] == (32 - 9) + (48 - 32 - 8), "from the ninth token of the same rows on, but the first one is no step"


@counts_logits
@pytest.mark.parametrize("run", ["rollout", "rollout by top-p"])
def test_a_layer_of_a_token_takes_few_kernels_and_reads_weights_keys_and_values_once(counts, run):
    layer = counts[run]["layer"]
    assert layer["kernels"] == 15 + 6 + 2, "products, what is compiled between them, attention"
    assert 1 < layer["ideal"] < 1.17, "and hidden states, and norms, of 32 rows with 7 tokens each"


@counts_logits
def test_each_weight_is_computed_once_for_all_servers(counts):
    found = counts["weights"]
    assert found["given"] == 2 * found["weights"] and found["waits"] == {"tolist in current_weights._digest": 1}
    assert found["beside"] == 2 * 4 * 2**20, "one weight in float32, some rows at a time, with its update"


@counts_logits
def test_numbers_on_the_paths_of_a_gpu_are_those_of_plain_passes(found):
    """Differences are those of roundings in float32."""
    values = found["values.py"].result()
    for turn in ("first", "second", "some"):
        assert values[turn]["rows"] == 0 and values[turn]["logprobs"] < 1e-5, turn
    assert values["replayed"] > 50, "tokens, all of them drawn as without graphs"
    assert values["too long"] == 18, "of the second turn: the host knows the longest row of the first look, not of each"
    trained = values["trained"]
    assert trained["alike"], "log-probabilities before the step are by the passes of the step, so the first ratio is 1"
    assert trained["passes"] == 2 and trained["gradients"] < 1e-4 and trained["loss"] < 1e-5 and trained["logprobs"] < 1e-5


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
        rounds = capability == CAPABILITIES[0] and name.partition(",")[0] in ("norm", "product_of_silu") and "bfloat16" in name
        assert not rounds or code["roundings"] == 1, "sums of 32 bits are rounded once, as in training"
        assert code["others"] == [] and code["cubins"] <= code["kernels"], name
        assert not code["cubins"] or code["smallest"] > 1000, name
        function, dtype, _, number = name.split(", ")
        known = f"{function}, {dtype}, 0, {0 if 'attention' in function else number}"
        assert code["is new"] == (name == known), "a hybrid and other layers have the code of LoRA's first"
    assert sum(code["cubins"] for code in codes.values()) >= sum(kernels for kernels, _, _ in OF_FUNCTIONS.values())
