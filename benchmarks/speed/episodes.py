"""Episodes of three turns against single completions with as many sampled tokens: `python -m benchmarks.speed.episodes`.

Between turns a tool answers at once. Both sides sample with the same adapted model, in turn; nothing ends early. Whole steps of
such episodes are beside TRL's in `python -m benchmarks.speed.vs_trl --workload episodes`.
"""

import argparse
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.commands import check_at_least, command, entry
from benchmarks.tables import shown, spread, table, yes
from hybrid_lightning.adapters import LoraSettings, apply_plan, find_candidates
from hybrid_lightning.adapters.budgets import ModuleBudget, plan_of_budget
from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.engine import Backend, Engine
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.interface import SamplingRequest, Stops
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.types import Prompt

TURNS, SAMPLES, PROMPT_TOKENS, GOAL = 3, 8, 32, 1.15
SMOLLM2_SIZES: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2_SIZES |= {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048}
NEVER = Stops((-1,), None)


def build_parser() -> argparse.ArgumentParser:
    parser = command("speed.episodes", __doc__, rounds=5)
    parser.add_argument("--tokens", type=int, default=32, help="that the policy samples in a turn (default: %(default)s)")
    parser.add_argument("--added", type=int, default=8, help="tokens of the tool between two turns (default: %(default)s)")
    return parser


def adapted(model: torch.nn.Module) -> Engine:
    """The engine of a model with LoRA and a tenth of its modules trained fully."""
    plan = plan_of_budget(find_candidates(model), ModuleBudget(0.1), LoraSettings(rank=16, alpha=32))
    backend = Backend()
    return Engine(apply_plan(model.requires_grad_(False).eval(), plan, False, backend), backend)


def seconds_of_rounds(engine: Engine, count: int, rounds: int, tokens: int, added: int) -> tuple[list[float], list[float]]:
    """Of episodes and of single completions of `count` prompts."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_policy_path())
    sampler, whole = Sampler(tokens), Sampler(TURNS * tokens)
    prompts = [Prompt(text="?", index=index) for index in range(count)]
    ids, rows = torch.randint(3, 12, (count, PROMPT_TOKENS)).tolist(), range(count * SAMPLES)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), engine.sampling():
        for _ in range(rounds + 1):
            requests = [SamplingRequest(prompts, ids, SAMPLES, PromptDraws(prompts, SAMPLES, 0), stops=NEVER) for _ in times]
            started, capacity = time.perf_counter(), TURNS * tokens + (TURNS - 1) * added
            episodes = sampler.conversation(engine, tokenizer, requests[0], capacity)
            episodes.first()
            for _ in range(TURNS - 1):
                episodes.next(rows, [[5] * added] * len(rows))
            between = time.perf_counter()
            whole.sample(engine, tokenizer, requests[1])
            for found, passed in zip(times, (between - started, time.perf_counter() - between), strict=True):
                found.append(passed)
    return times[0][1:], times[1][1:]


def run(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "rounds", "tokens", "added")
    torch.manual_seed(0)
    lines = []
    for name, count in (("embedded policy", 8), ("SmolLM2-135M's shape", 2)):
        if name == "embedded policy":
            model = AutoModelForCausalLM.from_pretrained(embedded_policy_path(), max_position_embeddings=2048)
        else:
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_SIZES, tie_word_embeddings=True))
        episodes, single = seconds_of_rounds(adapted(model), count, arguments.rounds, arguments.tokens, arguments.added)
        ratio = spread([one / other for one, other in zip(episodes, single, strict=True)])
        lines.append([name, shown(spread(episodes)), shown(spread(single)), shown(ratio), yes(ratio["median"] <= GOAL)])
    print(table(("model", "episodes in s", "single completions in s", "ratio", f"at most {GOAL}"), lines))


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
