"""Fixtures that all tests share; helpers have modules of their own, since several folders have a conftest."""

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_runs import empty_picture, write_folder
from messages import warnings_of
from tiny_models import build_model, build_tokenizer
from tiny_runs import write_model, write_sums
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hybrid_lightning
from hybrid_lightning.adapters.plan_display import draw_heatmap
from hybrid_lightning.callbacks import hybrid_adapter_setup
from hybrid_lightning.engine.cpu import operators as calls
from hybrid_lightning.engine.cpu.build import library

torch.set_num_threads(1)

# No doctests in here, and pytest could not tell one conftest from another when it looks for them.
collect_ignore_glob = ["*conftest.py", "fake_cuda/counts.py"]


PACKAGE = Path(hybrid_lightning.__file__).parent
OUR_WARNINGS = warnings_of([*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").glob("*.py")])
UNEXPECTED: list[str] = []


def pytest_warning_recorded(warning_message: warnings.WarningMessage, nodeid: str) -> None:
    """Remember a warning of ours that a test does not expect; most are errors at once, by the settings of pytest."""
    text = str(warning_message.message)
    if any(pattern.fullmatch(text) for pattern in OUR_WARNINGS):
        UNEXPECTED.append(f"{nodeid}: {text}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if UNEXPECTED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in UNEXPECTED:
        terminalreporter.write_line(f"a warning of ours, to be expected by pytest.warns or avoided: {line}", red=True)


def pytest_collection_finish() -> None:
    """Let the garbage collector not look again and again through libraries and tests, which all stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Let pictures of plans be empty: one that is drawn takes as long as a fifth of a small run, and most are not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid_adapter_setup, "draw_heatmap", empty_picture)
        yield


@pytest.fixture(scope="module")
def pictures() -> Iterator[None]:
    """Let pictures of plans be drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid_adapter_setup, "draw_heatmap", draw_heatmap)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the command line: config, model, data and parts of a user's own."""
    yield from write_folder(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model for small runs, none of which changes it."""
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 problems for small runs."""
    return write_sums(tmp_path_factory.mktemp("sums") / "sums.jsonl", 24)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return build_model


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs what torch's compiler would get as it is, without machine code; gives the names of functions as they are traced."""
    from hybrid_lightning.engine import compiling

    names: list[str] = []
    make = compiling._compile
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    monkeypatch.setattr(compiling, "_compile", lambda *given: names.append(given[0].__name__) or make(*given))
    monkeypatch.setattr(compiling, "CODES", {})
    return names


@pytest.fixture(params=["kernels", "torch"])
def with_and_without_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with the CPU kernels and by torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(calls, "library", lambda: None)
    elif library() is None:
        pytest.skip("no C++ compiler: there are no kernels")
