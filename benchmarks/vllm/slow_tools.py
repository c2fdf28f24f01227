"""Episodes on two vLLM servers, whose tools are slow in one episode of eight: `python -m benchmarks.vllm.slow_tools`.

An episode has four turns, and the slow ones wait before each answer. A small policy with random weights trains for some rollouts
of 32 episodes. Each episode writes when it began and ended, so the time of a rollout is known whatever else its step does.
"""

import asyncio
import itertools
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.commands import command, entry, environment, run_logged
from benchmarks.tables import table
from benchmarks.vllm.server import serving
from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.environments import Environment, Step

PROMPTS, SAMPLES, TURNS, ONE_IN = 4, 8, 4, 8
_NUMBERS = itertools.count()


class SlowTool(Environment):
    """A tool whose answer takes a while in one episode of `ONE_IN`; writes (number, begin, end) of each episode to a file."""

    def __init__(self, log: str, wait_s: float) -> None:
        self.log, self.wait_s = log, wait_s

    def start(self, prompt: Any, seed: int) -> list[Any]:
        """Begin to count time."""
        self.number, self.turns, self.began = next(_NUMBERS), 0, time.monotonic()
        return []

    async def step(self, message: Any) -> Step:
        """Answer after the wait."""
        self.turns += 1
        await asyncio.sleep(self.wait_s if self.number % ONE_IN == 0 else 0)
        return Step([{"role": "user", "content": "7"}], reward=float("7" in message["content"]), over=self.turns == TURNS)

    def close(self) -> None:
        """Write the times."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps([self.number, self.began, time.monotonic()]) + "\n")


def build_parser() -> Any:
    """The options."""
    parser = command("vllm.slow_tools", __doc__, rounds=4, seed=0)
    parser.add_argument("--wait", type=float, default=3.0, help="seconds that a slow tool takes a turn (default: %(default)s)")
    return parser


def write_policy(folder: Path) -> None:
    """The embedded policy for episodes with heads that vLLM has on a CPU, and random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    embedded = embedded_policy_path("embedded:episodes")
    config = AutoConfig.from_pretrained(embedded)
    config.head_dim, config.max_position_embeddings = 32, 128
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)


def train(urls: list[str], folder: Path, wait_s: float, rounds: int, seed: int) -> list[tuple[float, float]]:
    """(seconds of the rollout, seconds of its slowest episode) of each rollout but the first."""
    log = folder / "episodes.jsonl"
    options = {
        "--seed_everything": seed,
        "--model.model": folder / "policy",
        "--model.sampler.urls": json.dumps(urls),
        "--model.sampler.stop": json.dumps(list("0123456789")),  # messages that end, so that episodes go on
        "--model.environment": "benchmarks.vllm.slow_tools.SlowTool",
        "--model.environment.log": log,
        "--model.environment.wait_s": wait_s,
        "--model.reward": "EpisodeReturn",
        "--model.episodes.max_turns": TURNS,
        "--model.episodes.max_tokens": 80,
        "--model.prompts_per_rollout": PROMPTS,
        "--model.samples_per_prompt": SAMPLES,
        "--model.minibatches_per_rollout": 1,
        "--adapter.scorer": "Random",  # scores need no rollouts
        "--trainer.max_steps": rounds + 1,
        "--trainer.limit_val_batches": 0,
        "--trainer.num_sanity_val_steps": 0,
        "--trainer.default_root_dir": folder / "run",
    }
    given = [f"{name}={value}" for name, value in options.items()]
    fit = ["-m", "hybrid_lightning", "fit", "--config", "tools", "--config", "rollout/vllm_server", *given]
    run_logged(fit, folder / "run.log", environment(1), folder)
    size, times = PROMPTS * SAMPLES, [json.loads(line) for line in log.read_text().splitlines()]
    rollouts = [[(begin, end) for number, begin, end in times if number // size == rollout] for rollout in range(rounds + 1)]
    return [
        (max(end for _, end in episodes) - min(begin for begin, _ in episodes), max(end - begin for begin, end in episodes))
        for episodes in rollouts[1:]
    ]


def run(arguments: Any) -> None:
    """Start the servers, train, and print the table."""
    folder = Path(tempfile.mkdtemp())
    policy = folder / "policy"
    write_policy(policy)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serving(policy, "float32", "cpu", 1, None, folder / f"server{number}.log")) for number in range(2)
        ]
        found = train([url for url, _ in servers], folder, arguments.wait, arguments.rounds, arguments.seed)
    rows = [[f"{whole:.2f}", f"{slowest:.2f}", f"{whole / slowest:.2f}"] for whole, slowest in found]
    print(table(["rollout (s)", "slowest episode (s)", "ratio"], rows))


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
