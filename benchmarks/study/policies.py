"""The start policies of the study: their shapes, and what each was pretrained on."""

from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.embedded_policy import build_model, build_tokenizer
from benchmarks.study.facts import CHARACTERS, PlausibleFacts
from hybrid_lightning.data import PromptSource

FOLDER = Path("runs/study/policies")  # below the folder in which the commands run; the tasks name it, too


@dataclass(frozen=True)
class PolicyRecipe:
    """A Llama of some layers, trained on a corpus of half known facts."""

    layers: int
    width: int
    feed_forward: int
    table: int  # of facts
    steps: int = 800
    batch_size: int = 128
    lr: float = 2e-3

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(CHARACTERS)

    def model(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        """New weights, drawn from torch's global random state."""
        return build_model(tokenizer, self.layers, self.width, self.feed_forward, positions=32)

    def corpus(self, seed: int) -> PromptSource:
        return PlausibleFacts(self.steps * self.batch_size, table=self.table, seed=seed)


RECIPES = {
    "wide": PolicyRecipe(layers=4, width=64, feed_forward=192, table=0),  # 28 candidate modules
    "deep": PolicyRecipe(layers=8, width=48, feed_forward=144, table=1),  # 56
}
