"""Makes the embedded policy: `python -m benchmarks.study.pretrain --policy products`.

A Llama model of 0.9 M parameters reads a corpus of products; every line is right:

    347*6=2082              answered directly, most lines with "="
    347*6=[42 28 20]2082    worked out, the other lines with "="
    347*6:[42 28 20]2082    worked out, every line with ":"

The working, in brackets, is units first: 7*6 = 42, then 4*6 + 4 = 28, then 3*6 + 2 = 20; each partial product adds the carry of
the one before. Short steps are easy for so small a model, and a whole product at once is hard. From the lines with ":" it learns
to work; the task asks with "=", where it mostly answers directly, and mostly wrongly. See hybrid_lightning/assets/README.md.

The embedded policy for episodes (`--policy episodes`) reads turns, each after the preceding tokens of an episode, and learns only
the tokens of the turn:

    347*68=23596                         answered directly
    347*68=[347*68]<eos>23596 23596      a call; then its answer, which the calculator gave (without the space), copied
    ?20<eos><12<eos>>17                  a number from 1 to 31 is guessed, and is told to be lower (<) or higher (>)
"""

import random
from functools import partial
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.training import quiet_trainer
from hybrid_lightning.data import DemonstrationFormat, PromptDataModule, PromptSource, Row, Splits
from hybrid_lightning.data.arithmetic import FACTORS, hashed_split, worked_answer
from hybrid_lightning.training.example_module import SupervisedModule
from hybrid_lightning.training.optim import CosineSchedule, build_optimizer

WORKED_CUE_SHARE = 0.6  # lines with ":"
WORKED_SHARE = 0.3  # worked lines among those with "="
CHARACTERS = "0123456789*=:[] "
SPECIAL = ("<pad>", "<eos>")
CALL_SHARE = 0.4  # of the products in episodes
GUESSES, HIGHEST = 5, 31  # with so many guesses, bisection finds any number from 1 to 31 = 2^5 - 1
CARELESS_SHARE = 0.1  # of guesses that ignore the earlier answers
EPISODE_CHARACTERS = "0123456789*=[]?<>"


def build_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character, padding on the left; characters that are not in the corpus are an error."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, layers: int = 4, width: int = 128, feed_forward: int = 384, positions: int = 64
) -> LlamaForCausalLM:
    """New weights, from torch's global random state. By default 28 candidate modules; 10% are 3."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def corpus_line(rng: random.Random) -> tuple[str, str]:
    """A question of the training split and its answer; numbers of two and of three digits are equally frequent."""
    a = b = 0
    while not a or hashed_split(f"{a}*{b}") != "train":
        digits = rng.choice((2, 3))
        a, b = rng.randrange(10 ** (digits - 1), 10**digits), rng.choice(FACTORS)
    if rng.random() < WORKED_CUE_SHARE:
        return f"{a}*{b}:", worked_answer(a, b)
    return f"{a}*{b}=", worked_answer(a, b) if rng.random() < WORKED_SHARE else str(a * b)


class CorpusSource(PromptSource):
    """Lines of the corpus as rows: the question, and the answer in the column `completion`; the seed draws them."""

    def __init__(self, lines: int, seed: int) -> None:
        self.lines, self.seed = lines, seed

    def read(self) -> Splits:
        """All rows, for training."""
        rng, drawn = random.Random(self.seed), list[tuple[str, str]]()
        while len(drawn) < self.lines:
            drawn += self.draw(rng)
        rows = enumerate(drawn[: self.lines])
        return Splits([Row(asked, index=n, source="corpus", columns={"completion": told}) for n, (asked, told) in rows])

    def draw(self, rng: random.Random) -> list[tuple[str, str]]:
        return [corpus_line(rng)]


class EpisodeCorpus(CorpusSource):
    """Turns of episodes as rows: all tokens before a turn, and the turn in the column `completion`.

    Half of the episodes are products, half are games of guessing. These are played without skill: a guess is any number that may
    still be right, or, if careless, any number at all.
    """

    def draw(self, rng: random.Random) -> list[tuple[str, str]]:
        return product_turns(rng) if rng.random() < 0.5 else guessing_turns(rng)


def product_turns(rng: random.Random) -> list[tuple[str, str]]:
    """Each turn, with the tokens before it, of an episode with a product of the training split."""
    while hashed_split(asked := f"{rng.randrange(100, 1000)}*{rng.randrange(10, 100)}") != "train":
        pass
    a, b = map(int, asked.split("*"))
    if rng.random() >= CALL_SHARE:
        return [(f"{asked}=", str(a * b))]
    return [(f"{asked}=", f"[{asked}]"), (f"{asked}=[{asked}]<eos>{a * b}", str(a * b))]


def guessing_turns(rng: random.Random) -> list[tuple[str, str]]:
    """Each turn, with the tokens before it, of an episode in which a number is guessed."""
    number, low, high, before, turns = rng.randint(1, HIGHEST), 1, HIGHEST, "?", []
    for _ in range(GUESSES):
        guess = rng.randint(1, HIGHEST) if rng.random() < CARELESS_SHARE else rng.randint(low, high)
        turns.append((before, str(guess)))
        if guess == number:
            break
        low, high = (max(low, guess + 1), high) if guess < number else (low, min(high, guess - 1))
        before += f"{guess}<eos>{'>' if guess < number else '<'}"
    return turns


class Pretraining(SupervisedModule):
    """Supervised training of all weights, embeddings and norms included, instead of an adapter's."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One group, with the learning rate of fully trained modules."""
        self.model.requires_grad_(True)
        groups = {"full": (list(self.model.parameters()), self.rates["full"])}
        return build_optimizer(
            self.optimization.optimizer, groups, self.optimization.schedule, self.trainer.estimated_stepping_batches
        )  # type: ignore[return-value]


def pretrain_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: PromptSource,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    lr: float,
    progress: bool = False,
) -> PreTrainedModel:
    """Train all weights of a new model on the completions of a corpus, in the seed's order, with a warm-up and a cosine to 0."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module = Pretraining(
            model=folder,
            examples_per_step=batch_size,
            optimizer=partial(torch.optim.AdamW, betas=(0.9, 0.98), weight_decay=0.01),
            lr_full=lr,
            schedule=CosineSchedule(warmup_steps=100),
            seed=seed,
        )
        trainer = quiet_trainer(folder, max_steps=steps, gradient_clip_val=1.0, enable_progress_bar=progress)
        trainer.fit(module, datamodule=PromptDataModule(corpus, DemonstrationFormat()))
    assert isinstance(module.model, PreTrainedModel)
    return module.model.eval()
