"""`Sampler`: samples completions of prompts from a causal language model, in the training process.

Axes: P prompts, G samples per prompt, B = P * G sequences in prompt-major order, S prompt tokens, T completion tokens, V
vocabulary.

Each prompt is prefilled once. Its key-value cache is then repeated for its G completions, and sequences that have ended leave the
decoding batch. The decoding loop is written here instead of using `generate`, because training needs three things that `generate`
does not offer together: the shared prefill, the log-probability of each token under softmax(logits / temperature) in float32, and
a random generator of its own whose state a checkpoint can hold.

Logits become a token by top-k and top-p (nucleus) truncation, as with the logits processors of transformers, and a draw.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TopKLogitsWarper

from hybrid_lightning.engine import decoding_of
from hybrid_lightning.rollout.batching import pad_left
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import RolloutEngine, Stops, check_positions
from hybrid_lightning.types import Completion, Prompt, Rollouts, Sequences

if TYPE_CHECKING:
    from hybrid_lightning.engine import Engine  # with PEFT, which is slow to import


_BLOCK = 256  # tokens


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits, [B, V], of tokens outside of the top-k and top-p sets to minus infinity; top-k first, as in `generate`."""
    if top_k > 0:
        unused = torch.empty(0, dtype=torch.long)  # this processor ignores the tokens so far
        logits = TopKLogitsWarper(top_k)(unused, logits)
    if top_p < 1:
        logits = _top_p(logits, top_p)
    return logits


def _top_p(logits: Tensor, top_p: float) -> Tensor:
    """The same result as that of `TopPLogitsWarper`, whose cumulative sums are not deterministic on a GPU."""
    ascending, order = logits.sort(dim=1, stable=True)
    left_out = running_sums(ascending.softmax(dim=1)) <= 1 - top_p
    left_out[:, -1] = False
    return logits.masked_fill(left_out.scatter(1, order, left_out), float("-inf"))


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row of logits by inverting the cumulative distribution.

    `torch.multinomial` draws V exponential numbers for each token, which for a vocabulary of 50,000 takes longer on a CPU than
    the model's output layer. This function needs one number. It looks the number up in blocks of tokens first, so that only one
    block is summed up token by token. Running sums are in float64, since V small float32 numbers do not add up to 1 well enough.

    Args:
        logits: [B, V].
        uniform: [B, 1] float64, uniform random numbers in [0, 1).

    Returns:
        [B] int64, token ids.
    """
    width = logits.shape[1]
    probabilities = logits.softmax(dim=-1)
    if width % _BLOCK:
        probabilities = F.pad(probabilities, (0, -width % _BLOCK))
    blocks = probabilities.view(len(logits), -1, _BLOCK)
    ends = running_sums(blocks.sum(dim=2).double())
    target = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    # The first token whose cumulative probability exceeds the number. If there is none, because the sum of the block is rounded,
    # the last token with a probability above zero.
    token = torch.searchsorted(running_sums(inside.double()), target - before, right=True).squeeze(1)
    last = _BLOCK - 1 - inside.flip(1).gt(0).long().argmax(dim=1)
    return block.squeeze(1) * _BLOCK + torch.minimum(token, last)


def running_sums(values: Tensor) -> Tensor:
    """Cumulative sums of [B, n] along the second axis, added in an order that is always the same.

    On a GPU `torch.cumsum` adds in no fixed order, and `trainer.deterministic=true` refuses it.
    """
    return values.cumsum(dim=1) if values.device.type == "cpu" else sums_by_doubling(values)


def sums_by_doubling(values: Tensor) -> Tensor:
    """Cumulative sums of [B, n] by about log2(n) additions of whole tensors."""
    step = 1
    while step < values.shape[1]:  # each entry is the sum of up to `step` original entries that end with it
        values = torch.cat([values[:, :step], values[:, step:] + values[:, :-step]], dim=1)
        step *= 2
    return values


class Sampler(RolloutEngine):
    """The rollout engine of this project: samples in the training process, by the very weights that are trained.

    Arguments and errors are those of `RolloutEngine`.
    """

    @torch.no_grad()
    def sample(
        self,
        engine: "Engine",
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        samples_per_prompt: int,
        *,
        generator: torch.Generator | PromptDraws | None = None,
        greedy: bool = False,
        stops: Stops | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Rollouts:
        """See `RolloutEngine`."""
        assert not greedy or samples_per_prompt == 1, "greedy completions of one prompt are all the same"
        device = next(engine.model.parameters()).device
        decoder = _Decoder(self, engine, tokenizer, stops or self.stops(tokenizer), generator, greedy)
        ids, mask = pad_left(prompt_ids, decoder.pad_id, device)
        check_positions(getattr(engine.model, "config", None), ids.shape[1], self.max_new_tokens)
        tokens, logprobs, lengths, finished = decoder.run(ids, mask, samples_per_prompt, on_token)
        completion_mask = torch.arange(tokens.shape[1], device=device)[None] < lengths[:, None]
        sequences = Sequences(
            ids.repeat_interleave(samples_per_prompt, dim=0),
            mask.repeat_interleave(samples_per_prompt, dim=0),
            tokens,
            completion_mask,
        )
        counts = lengths.tolist()
        texts = tokenizer.batch_decode(
            [row[:length] for row, length in zip(tokens.tolist(), counts, strict=True)], skip_special_tokens=True
        )
        thinking = [_ends_in_thinking(tokenizer, ids) for ids in prompt_ids for _ in range(samples_per_prompt)]
        completions = tuple(
            Completion(self._cut(text), *rest) for text, *rest in zip(texts, counts, finished.tolist(), thinking, strict=True)
        )
        return Rollouts(tuple(prompts), sequences, completions, logprobs, finished, samples_per_prompt)

    def _cut(self, text: str) -> str:
        ends = [text.index(stop) for stop in self.stop if stop in text]
        return text[: min(ends)] if ends else text


def _ends_in_thinking(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    return str(tokenizer.decode(list(ids[-16:]))).rstrip().endswith("<think>")


class _Decoder:
    """One call of `Sampler.sample`: prefill, then one token at a time for the sequences that have not ended."""

    def __init__(
        self,
        sampler: Sampler,
        engine: "Engine",
        tokenizer: PreTrainedTokenizerBase,
        stops: Stops,
        generator: torch.Generator | PromptDraws | None,
        greedy: bool,
    ) -> None:
        self.sampler, self.engine, self.generator, self.greedy = sampler, engine, generator, greedy
        self.device = next(engine.model.parameters()).device
        self.stop_ids, self.stop_criteria = torch.tensor(stops.ids, device=self.device), stops.strings
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def run(
        self, ids: Tensor, mask: Tensor, samples: int, on_token: Callable[[int, int], None] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode. Returns tokens [B, T], log-probabilities [B, T], lengths [B] and finished [B]."""
        decoding = decoding_of(self.engine, ids, mask, self.sampler.max_new_tokens)
        logits = decoding.prefill(samples)
        batch = logits.shape[0]
        rows = torch.arange(batch, device=self.device)  # the sequence of each row of the decoding batch
        running = torch.ones(batch, dtype=torch.bool, device=self.device)
        lengths = torch.zeros(batch, dtype=torch.long, device=self.device)
        tokens = torch.full((batch, self.sampler.max_new_tokens), self.pad_id, device=self.device)
        logprobs = torch.zeros(batch, self.sampler.max_new_tokens, device=self.device)
        leaving = max(1, round(decoding.leave_together * batch))
        for step in range(self.sampler.max_new_tokens):
            token, logprob = self._choose(logits, rows, step)
            live = rows[running]
            tokens[live, step], logprobs[live, step] = token[running], logprob[running]
            lengths[live] += 1
            running = running & ~self._ended(token, tokens[rows, : step + 1])
            alive = int(running.sum())
            if on_token is not None:
                on_token(alive, step + 1)
            if alive == 0 or step + 1 == self.sampler.max_new_tokens:
                break
            remaining = -(-alive // leaving) * leaving
            if remaining < len(rows):
                # Rows leave in multiples of `leaving`: some that have ended stay until enough can leave together.
                keep = running.logical_not().long().argsort(stable=True)[:remaining].sort().values
                decoding.select(keep)
                rows, token, running = rows[keep], token[keep], running[keep]
            logits = decoding.step(token)
        finished = torch.ones(batch, dtype=torch.bool, device=self.device)
        finished[rows[running]] = False
        longest = int(lengths.max())
        return tokens[:, :longest], logprobs[:, :longest], lengths, finished

    def _choose(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        sampler = self.sampler
        if not self.greedy and sampler.top_k == 0 and sampler.top_p == 1 and self.engine.backend.usable(logits):
            return self.engine.backend.draw_tokens(logits, self._uniform(rows, step), sampler.temperature)
        scaled = logits.float() if self.sampler.temperature == 1 else logits.float() / self.sampler.temperature
        if self.greedy:
            token = scaled.argmax(dim=-1)
        else:
            kept = filter_logits(scaled, self.sampler.top_k, self.sampler.top_p)
            token = draw(kept, self._uniform(rows, step))
        return token, scaled.log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)

    def _uniform(self, rows: Tensor, step: int) -> Tensor:
        if isinstance(self.generator, PromptDraws):
            return self.generator.numbers(rows, step)
        return torch.rand(len(rows), 1, dtype=torch.float64, device=self.device, generator=self.generator)

    def _ended(self, token: Tensor, completion: Tensor) -> Tensor:
        ended = torch.isin(token, self.stop_ids)
        if self.stop_criteria is not None:
            ended = ended | self.stop_criteria(completion, None).to(ended.device)
        return ended
