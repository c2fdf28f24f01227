"""Other systems, simulated: a process without what macOS and Windows do not have. This does not replace a run on them."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import fork_server
import pytest
import torch
from torch import Tensor

from hybrid_lightning.metrics import completion_draws
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.sampler import _Decoder
from hybrid_lightning.training.evaluation import add_prompts
from hybrid_lightning.types import Completion, Prompt, Rewards, Rollout, Sequences

ROOT, TO = Path(__file__).parents[1], Tensor.to
SMALL = [
    *("--config", str(ROOT / "configs" / "gspo.yaml")),
    *("--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--data.validation_prompts=2"),
    *("--model.prompts_per_rollout=2", "--model.samples_per_prompt=4", "--adapter.calibration_prompts=2"),
    *("--model.eval_samples=2", "--checkpoint.monitor=null", "--data.source.train_size=50"),
]
# Other libraries look at the system as they are imported, and have been: only this package is imported anew.
SIMULATED = """
import ctypes, json, os, platform, select, signal, sys
system, commands = os.environ["SYSTEM"], json.loads(os.environ["COMMANDS"])
for name in [*sys.modules]:
    if name.partition(".")[0] in ("hybrid_lightning", "callbacks", "benchmarks"):
        del sys.modules[name]
class CDLL(ctypes.CDLL):
    def __init__(self, name, *given, **named):
        if name is None and system == "win32":
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *given, **named)
LINUX = {os: ["sched_getaffinity", "pidfd_open", "memfd_create", "O_PATH", "posix_fadvise", "unshare"], signal: ["sigtimedwait"]}
UNIX = {
    os: [*LINUX[os], "fork", "killpg", "setsid", "getuid", "geteuid", "WNOHANG", "sysconf", "uname", "O_CLOEXEC", "pread"],
    signal: ["SIGKILL", "SIGUSR1", "SIGHUP", "SIGCHLD", "SIGPROF", "setitimer", "pthread_sigmask", "sigtimedwait"],
    select: ["poll", "epoll"],
}
for module, names in (UNIX if system == "win32" else LINUX).items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
if system == "win32":
    of_windows = {signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
    signal.valid_signals = lambda: of_windows
for name in ("fcntl", "resource", "pwd", "grp", "termios") if system == "win32" else ():
    sys.modules[name] = None
ctypes.CDLL, sys.platform = CDLL, system
from lightning.pytorch.trainer.connectors import signal_connector
signal_connector._IS_WINDOWS = system == "win32"
platform.system = lambda: {"darwin": "Darwin", "win32": "Windows"}[system]
from hybrid_lightning.callbacks import hybrid_adapter_setup
from hybrid_lightning.cli.main import main
from matplotlib.figure import Figure
hybrid_adapter_setup.draw_heatmap = lambda plan: Figure(figsize=(0.1, 0.1))
for number, command in enumerate(commands):
    print(f"== {number}", flush=True)
    sys.argv = ["hybrid_lightning", *command]
    try:
        main()
    except SystemExit as ended:
        print(f"exit {ended.code}", flush=True)
print("== last", flush=True)
from hybrid_lightning.__main__ import run
sys.argv = ["hybrid_lightning", "fit", *json.loads(os.environ["SMALL"])]
sys.argv += ["--model.reward=MathMatch"] if system == "darwin" else []
run()
"""
# Before a run: a plan, and what is refused.
COMMANDS = {
    "darwin": [["plan", *SMALL, "--trainer.accelerator=mps"], ["fit", *SMALL, "--model.reward=CodeTests"]],
    "win32": [["fit", *SMALL, "--model.reward=MathMatch"], ["fit", *SMALL, "--model.reward=CodeTests"]],
}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The ended process by system, and the folder in which it ran."""

    def started(system):
        folder = tmp_path_factory.mktemp(system)
        given = {"SYSTEM": system, "COMMANDS": json.dumps(COMMANDS[system]), "SMALL": json.dumps(SMALL), "COLUMNS": "200"}
        options = {"cwd": folder, "env": {**os.environ, **given, "OMP_NUM_THREADS": "1"}, "text": True, "timeout": 300}
        return fork_server.run([sys.executable, "-c", SIMULATED], capture_output=True, **options), folder

    return {system: started(system) for system in COMMANDS}


@pytest.mark.long
@pytest.mark.parametrize("system", COMMANDS)
def test_a_run_on_another_system(system, simulated):
    ended, folder = simulated[system]
    out, err = ended.stdout, ended.stderr
    assert ended.returncode == 0, err[-3000:]
    first, second, trained = [part.partition("\n")[2] for part in out.split("== ")[1:]]
    assert second == "exit 1\n" and "the sandbox needs Linux" in err
    assert "takes up to" in first if system == "darwin" else first == "exit 1\n" and "MathMatch needs Linux or macOS" in err
    assert "Verdict: " in trained and (folder / "runs" / "gspo" / "version_0" / "checkpoints" / "last.ckpt").is_file()
    runner = "".join(line for line in err.splitlines() if line.startswith("model runner: "))
    assert f"compiled kernels need Linux, and this is {system}" in runner


class OfMPS(Tensor):
    """A tensor of a device that has no float64, kept on the CPU."""

    device = property(lambda self: torch.device("mps"))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        result = super().__torch_function__(func, types, args, kwargs or {})
        assert getattr(result, "dtype", None) is not torch.float64, f"{func} makes float64 on MPS"
        return result


@pytest.fixture
def mps(monkeypatch):
    """Moves a tensor to a simulated device of Apple's, as `Tensor.to` does meanwhile."""

    def move(tensor, device="mps", *given, **named):
        there = str(device) == "mps"
        return tensor.as_subclass(OfMPS) if there else TO(tensor.as_subclass(Tensor), device, *given, **named)

    monkeypatch.setattr(Tensor, "to", move)
    return move


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"temperature": 0.5}], ids=str)
def test_a_device_without_float64_draws_the_tokens_of_a_cpu(options, mps):
    decoder = object.__new__(_Decoder)
    decoder.sampler, decoder.greedy = Sampler(**options), False
    decoder.runner = SimpleNamespace(backend=SimpleNamespace(usable=lambda logits: False))
    logits, rows, chosen = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)), torch.arange(6), []
    for move in (lambda tensor: tensor, mps):
        decoder.generator = PromptDraws([Prompt(text="a", index=n) for n in range(2)], 3, seed=1)
        chosen.append(decoder._choose(move(logits), move(rows), 0))
    assert all(isinstance(part, OfMPS) for part in chosen[1])
    assert all(torch.equal(one, TO(other.cpu(), one.dtype)) for one, other in zip(*chosen, strict=True))


def test_a_device_without_float64_is_evaluated(mps):
    noted = []
    ids, mask = torch.ones(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.bool)
    sequences = Sequences(ids, mask, ids, mask).to("mps")
    texts = tuple(Completion("1", num_tokens=3, finished=True) for _ in range(4))
    prompts, rows = (Prompt(text="a"), Prompt(text="b", index=1)), mps(torch.arange(4))
    rewards = Rewards(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), {}, torch.tensor([[True, False], [False, False]])).to("mps")
    sampled = Rollout(prompts, texts, sequences, mps(torch.zeros(4, 3)), rows, rewards)
    greedy = Rollout(prompts, texts[:2], sequences, mps(torch.zeros(4, 3)), rows, rewards.apply(lambda values: values[:, :1]))
    means = SimpleNamespace(update=lambda names, index, values: noted.append(values))
    add_prompts(means, greedy, sampled, ["1"] * 4)
    assert noted[0].keys() >= completion_draws(2).keys() and noted[0]["avg@2"].tolist() == [0.5, 0.0]
