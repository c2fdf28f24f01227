"""What a rollout engine takes of the device that trains, and when a run with it is refused."""

import math
import re
from dataclasses import replace

import pytest
import torch
from cli_runs import assert_refused, done, run
from hypothesis import given
from hypothesis import strategies as st
from rich import get_console
from tiny_memory import Case, with_flags
from tiny_models import build_tokenizer

from hybrid_lightning.memory import FSDP2, Components, MethodMemory, TrainerFlags
from hybrid_lightning.memory import settings as settings_module
from hybrid_lightning.memory.fitting import why_not_fitting
from hybrid_lightning.memory.peaks import CONTEXT_BYTES, engine_share, plan_method
from hybrid_lightning.model import NF4
from hybrid_lightning.rollout import VLLMSampler, VLLMServerSampler
from hybrid_lightning.rollout.interface import ServedModel
from hybrid_lightning.sharding import FSDP2Strategy
from hybrid_lightning.trainer import Trainer

GIB = 2**30
OURS = with_flags(Case(0.1, validation=4, more={"prompts_per_rollout": 4}).settings(), on_cpu=False)
OURS.config.num_hidden_layers = 1
PARAMETERS = 217_984  # of the embedded policy with one layer
WEIGHTS = 4 * PARAMETERS
SAMPLING, OTHERS = ("generating", "validating", "calibrating"), ("updating", "scoring", "optimizer step")


def vllm(device_gib=4.0, on_cpu=False, **arguments):
    sampler = VLLMSampler(max_new_tokens=20, **arguments)
    run = with_flags(OURS, on_cpu=on_cpu, device_bytes=None if on_cpu else int(device_gib * GIB))
    return replace(run, sampler=sampler)


@pytest.mark.parametrize(("sleep", "kept"), [("nothing", int(0.25 * 4 * GIB)), ("kv_cache", WEIGHTS), ("weights", 0)])
def test_a_gpu_is_shared_with_an_engine_that_has_the_weights_with_which_the_policy_computes(sleep, kept):
    share = engine_share(vllm(gpu_memory_utilization=0.25, sleep=sleep), PARAMETERS)
    assert (share.weights, share.sampling, share.updating) == (WEIGHTS, GIB, kept)
    config = OURS.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads * 4
    assert share.least == WEIGHTS + (6 + 20) * token
    longer = engine_share(vllm(max_model_len=60), PARAMETERS)
    assert longer.least == WEIGHTS + 60 * token, "vLLM wants room for the context that it is given"
    assert engine_share(replace(vllm(), dtype=torch.bfloat16), 100).weights == 200
    assert engine_share(with_flags(vllm(), precision="bf16-mixed"), 100).weights == 200
    assert engine_share(replace(vllm(), quantization=NF4()), 100).weights == 400, "the dequantized weights count"


@pytest.mark.parametrize(
    ("max_model_len", "given", "cache"),
    [
        (None, {}, 2**26),  # 128 sequences of the policy's 64 positions take less
        (1024, {}, 128 * 1024 * 2 * 128 * 4),  # a layer with keys of 128 numbers
        (2**21, {}, 2**21 * 2 * 128 * 4),  # there has to be room for one sequence
        (None, {"kv_cache_memory_bytes": 123}, 123),
    ],
)
def test_on_a_cpu_the_plan_knows_the_cache_that_the_engine_is_given(max_model_len, given, cache):
    settings = vllm(on_cpu=True, max_model_len=max_model_len, engine_args=given)
    assert engine_share(settings, PARAMETERS).updating == WEIGHTS + cache
    served = ServedModel(settings.config, build_tokenizer(), "a folder", torch.float32, torch.device("cpu"))
    options = settings.sampler._options(served, "")
    assert options["kv_cache_memory_bytes"] == cache and options["max_model_len"] == (max_model_len or 64)


def test_peaks_with_an_engine_beside_training_and_with_servers():
    """While it samples: what training keeps, and the whole engine. Else: as without it, and what it keeps."""
    elsewhere = replace(OURS, sampler=VLLMServerSampler(urls=["http://127.0.0.1:1"], max_new_tokens=20))
    ours, beside, served = map(plan_method, (OURS, vllm(), elsewhere))
    assert ours.peaks.keys() == beside.peaks.keys() == served.peaks.keys() == {*SAMPLING, *OTHERS}
    for phase, before in ours.peaks.items():
        resting = Components(before.weights, before.copies, gradients=before.gradients, optimizer=before.optimizer)
        alone = resting if phase in SAMPLING else before
        assert beside.peaks[phase] == replace(alone, engine=int(0.3 * 4 * GIB) if phase in SAMPLING else WEIGHTS)
        assert served.peaks[phase] == alone
    assert why_not_fitting(with_flags(elsewhere, device_bytes=1), served) is None
    whole, resting = (plan_method(with_flags(run, sharding=FSDP2(2))).peaks["generating"] for run in (OURS, vllm()))
    assert resting.engine == int(0.3 * 4 * GIB) and resting.weights == whole.weights, "every device has an engine of its own"
    assert resting.copies < whole.copies, "weights are gathered a block at a time, not all together"


# ---- refused


def misfit_of(device_gib, resting, updating, weights, **arguments):
    settings = vllm(device_gib, **arguments)
    phases = {"generating": resting, "calibrating": resting / 2, "updating": updating, "scoring": 0}
    peaks = {phase: Components(taken) for phase, taken in phases.items()}
    return why_not_fitting(settings, MethodMemory("hybrid", 0, 0, peaks, share=engine_share(settings, weights // 4)))


@pytest.mark.parametrize(
    ("device", "resting", "updating", "weights", "arguments", "message"),
    [
        (80, 40, 60, 10, {}, None),
        (80, 40, 60, 10, {"gpu_memory_utilization": 0.5}, "keeps 40.00 GiB and .* takes 40.00 GiB, of 79.50 .*utilization=0.49$"),
        (80, 70, 75, 10, {"gpu_memory_utilization": 0.5}, "keeps 70.00 GiB and .* takes 40.00 GiB, .*; quantize the base"),
        (80, 40, 60, 30, {}, "=0.3 of 80.00 GiB is less than .*, 30.00 GiB; set sampler.gpu_memory_utilization=0.38$"),
        (80, 40, 65, 10, {"sleep": "nothing"}, "sleep=nothing does not fit: .* keeps 24.00 GiB.*; set sampler.sleep=kv_cache$"),
        (80, 40, 90, 10, {}, "; lower model.max_tokens_per_micro_batch, quantize the base"),
    ],
)
def test_what_does_not_fit_is_said_with_the_remedy(device, resting, updating, weights, arguments, message):
    problem = misfit_of(device, resting * GIB, updating * GIB, weights * GIB, **arguments)
    assert (problem is None) if message is None else (re.search(message, problem) and "\n" not in problem), problem


@given(
    device=st.integers(2, 200),
    resting=st.floats(0, 1),
    updating=st.floats(0, 1),
    weights=st.floats(0.001, 1),
    utilization=st.floats(0.01, 0.99),
    sleep=st.sampled_from(["nothing", "kv_cache", "weights"]),
)
def test_who_does_as_told_fits(device, resting, updating, weights, utilization, sleep):
    sizes = [int(share * device * GIB) for share in (resting, updating, weights)]
    arguments = {"gpu_memory_utilization": utilization, "sleep": sleep}
    for _ in range(3):  # one remedy may bring up the next
        problem = misfit_of(device, *sizes, **arguments)
        told = problem and re.search(r"set sampler\.(\w+)=(\S+)$", problem)
        if not told:
            break
        arguments[told[1]] = float(told[2]) if told[1] == "gpu_memory_utilization" else told[2]
    else:
        pytest.fail(problem)
    if problem is None:
        share = arguments["gpu_memory_utilization"] * device * GIB
        assert sizes[0] + math.floor(share) <= device * GIB - CONTEXT_BYTES and share >= sizes[2] * 0.999


# ---- from a run


def test_flags_of_a_trainer_that_is_built():
    fsdp2 = {"devices": 2, "strategy": FSDP2Strategy(), "precision": "bf16-mixed", "limit_val_batches": 0}
    given = {"accelerator": "cpu", "accumulate_grad_batches": 2, **fsdp2}
    built = TrainerFlags.of_trainer(Trainer(logger=False, **given))
    assert built == TrainerFlags.of(given) and built.on_cpu and built.device_bytes > 2**28


ENGINE = ("--config", "t.yaml", "--model.sampler=VLLMSampler", "--model.correction=TokenTruncation")


@pytest.mark.parametrize(("command", "mib", "refused"), [("fit", 600, True), ("validate", 600, False)])
def test_a_run_that_does_not_fit_is_refused_before_its_model_is_loaded(folder, monkeypatch, command, mib, refused):
    monkeypatch.setattr(VLLMSampler, "check_model", lambda self, model: None)  # nothing needs vLLM so far
    seen = TrainerFlags.of_trainer

    def on_a_gpu(trainer):
        assert seen(trainer).on_cpu
        return replace(seen(trainer), on_cpu=False, device_bytes=mib * 2**20)

    monkeypatch.setattr(TrainerFlags, "of_trainer", on_a_gpu)
    result = run(folder, command, *ENGINE)
    expected = "error: sampler.gpu_memory_utilization=0.3 does not fit: while completions are sampled, training keeps 0.1 MiB"
    assert result.code == 1 and result.last.startswith(expected) is refused, result.err
    assert refused or "error: cannot load the model" in result.last, "its weights are broken, and read after the checks"


def test_plan_shows_the_engine_and_has_to_know_the_device(folder, monkeypatch):
    monkeypatch.setattr(get_console(), "_width", 220)
    on_gpu = ("--trainer.accelerator=gpu", "--trainer.devices=1")
    tight = done(folder, "plan", *ENGINE, *on_gpu, "--device_gib=0.6", "--model.sampler.sleep=weights")
    assert re.search(r"rollout engine +│ +184.3 MiB", tight.out)
    assert "it keeps nothing on the device, and its weights on the host, while the policy is updated" in tight.out
    assert "Such a run is refused: sampler.gpu_memory_utilization=0.3 does not fit" in tight.out
    on_cpu = done(folder, "plan", *ENGINE)
    assert re.search(r"rollout engine +│ +64.0 MiB", on_cpu.out) and "refused" not in on_cpu.out
    assert "it keeps 64.0 MiB while the policy is updated." in on_cpu.out
    monkeypatch.setattr(settings_module, "memory_of", lambda device: None)
    assert_refused(
        run(folder, "plan", *ENGINE, *on_gpu), "and there is no GPU here; give --device_gib, the memory of a GPU in GiB"
    )
