"""What users meet on the hub ends in one line with the remedy, before any weights are asked for, and soon."""

import re
import time
from pathlib import Path

import pytest
from hub_server import REVOKED, STRANGER

CONFIG = Path(__file__).parents[2] / "configs" / "gsm8k_qwen3.yaml"
SMALL = [
    "--config", CONFIG, "--model.sampler.max_new_tokens=4", "--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0", "--model.prompts_per_rollout=4", "--adapter.calibration_prompts=8",
]  # fmt: skip


def check_refused(message, online, hub, *options, token=""):
    """A command ends in one line that says so, and has asked for no weights."""
    asked = len(hub.requests)
    result = online("fit", *SMALL, *options, token=token)
    error = [line for line in result.err.splitlines() if line.strip() and not re.search(NOTES, line)]
    assert result.code == 1 and len(error) == 1, result.err
    assert re.search(f"^error: .*{message}", error[0]), error[0]
    assert not hub.weights_asked(asked)


# What other lines there may be: of the cache that is taken, and progress of data.
NOTES = "only what is in the cache can be used|Using the latest cached|Found the latest cached|examples/s"
NOT_THERE = r"is no folder here and no {} on the hub, or a private one: correct it{}, or log in by 'hf auth login' or HF_TOKEN"
GATED = r"'me/gated' is gated: accept its terms at https://huggingface\.co/{}me/gated and log in by 'hf auth login' or HF_TOKEN"
NOT_ADMITTED = r"'me/gated' is gated, and this login has no access to it: accept its terms at https://huggingface\.co/{}me/gated"
REFUSED = r"the hub refuses HF_TOKEN, which is revoked, expired or mistyped: set HF_TOKEN to a new one of .*, or unset it"
REFUSED_OPTIONS = [
    ("model.model=Qwen/Qwen3-0.6", "", r"'Qwen/Qwen3-0\.6' " + NOT_THERE.format("model", "")),
    ("model.model=Qwen3-0.6B", "", r"'Qwen3-0\.6B' " + NOT_THERE.format("model", r" \(most are OWNER/NAME\)")),
    ("model.model=me/private", STRANGER, "'me/private' " + NOT_THERE.format("model", "")),
    ("model.model=me/gated", "", "the model " + GATED.format("")),
    ("model.model=me/gated", STRANGER, "the model " + NOT_ADMITTED.format("")),
    ("model.model=me/base", REVOKED, REFUSED),
    (
        "model.model=me/cut",
        "",
        r"'me/cut' lacks 1 of \d+ weight files, such as 'model-00002-of-\d+\.safetensors'; give a model\.revision",
    ),
    (
        "model.model=me/gguf",
        "",
        r"'me/gguf' has GGUF files, of which one has to be chosen: hf download me/gguf tiny\.Q8_0\.gguf, and give",
    ),
    ("model.model=me/packed", "", r"'me/packed' is stored quantized \(quant_method gptq\), .* give the 16-bit model"),
    ("model.model=me/encoder", "", r"'me/encoder' is a 't5' model, which is no causal language model"),
    (
        "model.revision=v9",
        "",
        r"'Qwen/Qwen3-0\.6B' has no revision 'v9': give model\.revision a branch, tag or commit of https://",
    ),
    ("model.model=me/base", "", r"the tokenizer has no chat template; set model\.chat_template or use data\.format=PlainFormat"),
    ("model.model=me/strict", "", r"refuses the prompt of openai/gsm8k .*: System role not supported; .*: system_prompt=null"),
    ("data.source.path=openai/gsm8", "", "'openai/gsm8' " + NOT_THERE.format("data set", "")),
    ("data.source.path=me/gated", STRANGER, "the data set " + NOT_ADMITTED.format("datasets/")),
    ("data.source.revision=v9", "", "'openai/gsm8k' has no revision 'v9': give revision a branch, tag or commit of https://"),
    ("data.source.name=mian", "", "data set 'openai/gsm8k' has no configuration name='mian': give one of main, socratic"),
    ("data.source.test_split=tset", "", "test_split='tset': data set 'openai/gsm8k' has no such split, but train, test: correct"),
    (
        "data.source.path=me/program data.source.name=null",
        "",
        "'me/program' is a program, .*: give revision=refs/convert/parquet",
    ),
    ("data.source.path=me/empty data.source.name=null", "", "data set 'me/empty' has no data files that can be read"),
]


@pytest.mark.parametrize(("options", "token", "message"), REFUSED_OPTIONS)
def test_what_cannot_be_had(options, token, message, online, hub):
    check_refused(message, online, hub, *(f"--{option}" for option in options.split()), token=token)


@pytest.fixture(scope="module")
def cached(commands):
    """Where the config's own model and data are in the cache."""
    assert commands[0]("fit", *SMALL).code == 0


@pytest.fixture
def no_network(hub, cached):
    port = hub.port
    hub.stop()
    yield
    hub.start(port)


def test_without_a_network_nothing_waits(online, hub, no_network):
    """Connections are refused; other libraries would try each file six times within half a minute."""
    begun = time.monotonic()
    lacks = "'me/other' is not, or not as a whole, in the cache .*, and the hub .* cannot be reached: check the network"
    check_refused(f"the model {lacks}", online, hub, "--model.model=me/other")
    check_refused(f"the data set {lacks}", online, hub, "--data.source.path=me/other")
    assert time.monotonic() - begun < 60


def test_what_is_in_the_cache_is_used_without_a_network(online, no_network):
    begun = time.monotonic()
    result = online("fit", *SMALL)
    assert result.code == 0 and "cannot be reached" in result.err and "only what is in the cache can be used" in result.err
    assert time.monotonic() - begun < 60


def test_a_download_is_seen(online, hub):
    """In a log by a line, at a terminal by bars too."""
    online.log()
    result = online("fit", *SMALL, "--model.model=me/seen")
    assert re.search(r"downloading me/seen, \S+ GB, into", online.log()) and "Fetching" in result.err
    again = online("fit", *SMALL, "--model.model=me/seen")
    assert "downloading" not in online.log() and "Fetching" not in again.err


def test_offline_the_cache_has_to_have_it(hub, commands, cached):
    _, offline = commands
    for options, message in (
        (["--model.model=me/other"], r"'me/other' is not, .*, and HF_HUB_OFFLINE is set: unset it"),
        (["--model.revision=v9"], r"'Qwen/Qwen3-0\.6B' at revision 'v9' is not, .*, and HF_HUB_OFFLINE is set"),
        (["--data.source.revision=v9"], r"'openai/gsm8k' at revision 'v9' is not, .*, and HF_HUB_OFFLINE is set"),
        (["--data.source.name=socratic"], r"the cache has no configuration name='socratic' of .* correct it to one of main"),
    ):
        check_refused(message, offline, hub, *options)
    assert offline("fit", *SMALL, "--data.source.revision=main").code == 0
