"""`Sampler`: completions of prompts by a causal language model, in the training process.

Each prompt is prefilled once for its G completions, and sequences that have ended leave the decoding batch. Decoding is written
here rather than taken from `generate`. Training needs three things that `generate` does not give together: the shared prefill,
the log-probability of each token under softmax(logits / temperature) in float32, and its own random generator with a state that a
checkpoint can hold. Top-k and top-p (nucleus) truncate like the logits processors of transformers.

Axes: P prompts, G samples per prompt, B = P * G sequences, R rows of the decoding batch, S prompt tokens, T completion tokens,
V tokens of the vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TopKLogitsWarper

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.rollout.batching import pad_left, pad_token
from hybrid_lightning.rollout.interface import Draws, MessageRequest, Sampled, SamplingRequest
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import BatchEngine, Session, messages_of
from hybrid_lightning.runner import Decoding, OneKernel, SegmentDecoding, base_model, decoding_of
from hybrid_lightning.types import Rollout

if TYPE_CHECKING:
    from hybrid_lightning.runner import ModelRunner  # with PEFT, which is slow to import

_BLOCK = 256  # tokens of the vocabulary that `draw_tokens` adds up together
_ONE = 2.0**40  # the whole number that stands for 1
_EVERY = 16  # steps after which the number of running rows is copied from an accelerator


class Sampler(BatchEngine):
    """Samples in the training process, with the trained weights themselves; the default rollout engine.

    Args:
        max_new_tokens: Longest completion in tokens. A completion that reaches it without a stop token counts as not finished.
        cuda_graphs: Replay the step of a token from a CUDA graph, which saves launching its kernels one by one. A graph is
            recorded for each number of rows that lasts several tokens. It needs a GPU with kernels for attention by segments, and
            a model with rotary embeddings that do not depend on the longest row.
            `auto` uses graphs where they work and the first replayed steps equal plain steps to the bit, and prints the outcome;
            `true` refuses to run without them.
        options: Arguments of `RolloutEngine`.

    Raises:
        ConfigError: If a value is impossible.
    """

    def __init__(
        self,
        max_new_tokens: int = 256,
        *,
        cuda_graphs: bool | Literal["auto"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(max_new_tokens, **options)
        self.cuda_graphs = cuda_graphs

    @torch.no_grad()
    def sample(self, runner: "ModelRunner", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest) -> Rollout:
        """Complete every prompt of a request with the model's own passes."""
        limits, decoder = self.checked_limits(runner, request), _Decoder(self, runner, tokenizer, request)
        decoded = decoder.decode(decoder.read(request, max(limits)), request.draws, limits)
        return self.rollout(tokenizer, request, *decoded)

    def session(
        self, runner: "ModelRunner", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest, capacity: int | None
    ) -> Session:
        """Begin a rollout's episodes. Keys and values are kept between turns if the model's decoding supports that."""
        return (Session if capacity is None else _ContinuedSession)(self, runner, tokenizer, request, capacity)


class _KeptRow(NamedTuple):
    """A row of an episode whose keys and values are kept."""

    place: int  # row of the decoder
    prompt: int  # tokens of its prompt there
    ids: list[int]  # all of its tokens; all but the last one have been read


class _ContinuedSession(Session):
    """Continues from the existing keys and values, if the model's decoding supports that."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._decoder: _Decoder | None = None
        self._kept: dict[tuple[int, int], _KeptRow] = {}  # by episode and row

    @torch.no_grad()
    def sample(self, asked: Sequence[MessageRequest]) -> list[Sampled]:
        """See `Session`."""
        assert isinstance(self._engine, Sampler) and self._capacity is not None
        engine = self._engine
        kept = [self._kept.get((each.episode, each.row)) for each in asked]
        if all(found is not None and each.ids[: len(found.ids)] == found.ids for each, found in zip(asked, kept, strict=True)):
            assert self._decoder is not None, "which has these rows"
            if not self._decoder.decoding.can_extend:
                return super().sample(asked)
            return self._extend(self._decoder, asked, cast(list[_KeptRow], kept))
        self._decoder = None  # before its successor takes memory
        request, rows = self._request_for(asked)
        limits = engine.checked_limits(self._runner, request)
        self._decoder = decoder = _Decoder(engine, self._runner, self._tokenizer, request)
        begin = decoder.read(request, self._capacity, keeps_rows=True)
        rollout = engine.rollout(self._tokenizer, request, *decoder.decode(begin, request.draws, limits))
        found = messages_of(rollout, rows)
        self._kept = {
            (each.episode, each.row): _KeptRow(row, len(each.ids), [*each.ids, *message.ids])
            for each, row, message in zip(asked, rows, found, strict=True)
        }
        return found

    def _extend(self, decoder: "_Decoder", asked: Sequence[MessageRequest], kept: Sequence[_KeptRow]) -> list[Sampled]:
        order = sorted(range(len(asked)), key=lambda number: kept[number].place)
        asked, kept = [asked[number] for number in order], [kept[number] for number in order]
        request, limits = self._request_alone(asked), [each.limit for each in asked]
        # The last token that was sampled has not been read.
        read = [len(row.ids) - row.prompt - 1 for row in kept]
        added = [list(each.ids[row.prompt + count :]) for each, row, count in zip(asked, kept, read, strict=True)]
        begin = partial(decoder.decoding.extend, [row.place for row in kept], read, added)
        rollout = self._engine.rollout(self._tokenizer, request, *decoder.decode(begin, request.draws, limits))
        found = messages_of(rollout, range(len(asked)))
        for each, row, message in zip(asked, kept, found, strict=True):
            self._kept[each.episode, each.row] = row._replace(ids=[*each.ids, *message.ids])
        return [message for _, message in sorted(zip(order, found, strict=True), key=itemgetter(0))]


class _Decoder:
    """Prefill, then one token at a time for the sequences that still run."""

    decoding: Decoding
    generator: Draws

    def __init__(
        self, sampler: Sampler, runner: "ModelRunner", tokenizer: PreTrainedTokenizerBase, request: SamplingRequest
    ) -> None:
        self.sampler, self.runner, self.greedy, self.on_token = sampler, runner, request.greedy, request.on_token
        self.on_ended = sampler.listener(tokenizer, request)  # called for sequences that end early
        stops = request.stops or sampler.stops(tokenizer, None, request.stop)
        self.device = next(runner.model.parameters()).device
        self.stop_ids, self.stop_criteria = torch.tensor(stops.ids, device=self.device), stops.strings
        self.pad_id = pad_token(tokenizer)

    def read(self, request: SamplingRequest, capacity: int, keeps_rows: bool = False) -> Callable[[], Tensor]:
        """What reads the prompts for completions of at most `capacity` tokens; returns logits [B, V] of the first token of each.

        With `keeps_rows`, completions stay in the batch after they have ended.
        """
        ids, mask = pad_left(request.prompt_ids, self.pad_id, self.device)
        return partial(self._prefill, ids, mask, request.samples_per_prompt, capacity, keeps_rows)

    def _prefill(self, ids: Tensor, mask: Tensor, samples: int, capacity: int, keeps_rows: bool) -> Tensor:
        self.decoding = decoding = decoding_of(self.runner, ids, mask, capacity, keeps_rows)
        wanted = _replays(self.device) if self.sampler.cuda_graphs == "auto" else self.sampler.cuda_graphs
        reason = self._why_no_graphs() if wanted else ""
        if reason and self.sampler.cuda_graphs is True:
            raise ConfigError(f"sampler.cuda_graphs=true: {reason}; set it to auto")
        if reason:
            self.runner.graphs.warn_once(reason)
        elif wanted and isinstance(decoding, SegmentDecoding):
            decoding.graphs = self.runner.graphs
        return decoding.prefill(samples)

    def _why_no_graphs(self) -> str:
        if not isinstance(self.decoding, SegmentDecoding):
            reason = self.runner.passes().get("attention by segments", "a CPU has no CUDA graphs")
            return reason or "a sliding window of this model hides tokens of prompts"
        decoder: Any = base_model(self.runner.model).get_decoder()
        kinds = str(getattr(getattr(decoder, "rotary_emb", None), "rope_type", ""))  # of all layers, or by their types
        depends = any(kind in kinds for kind in ("dynamic", "longrope"))
        return "this model's RoPE depends on the positions, which the host has to read at each token" if depends else ""

    def decode(
        self, begin: Callable[[], Tensor], generator: Draws, limits: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode until all sequences have ended.

        Args:
            begin: Computes logits [B, V] of the first token of each. Passed as a function, so that these logits, the largest
                tensor, are freed before the next ones are computed.
            generator: See `SamplingRequest.draws`.
            limits: Most tokens of each sequence, [B].

        Returns:
            Tokens [B, T], their mask [B, T] bool, log-probabilities [B, T], and whether a stop token or string ended each
            sequence, [B] bool.
        """
        graphs, self.generator = self.runner.graphs, generator
        batch, most = len(limits), max(limits)
        limit = None  # of each sequence, if limits differ
        if min(limits) < most:
            limit = torch.tensor(limits, device=self.device)
        cut = torch.zeros(batch, dtype=torch.bool, device=self.device)  # ended by their own limit
        rows = torch.arange(batch, device=self.device)  # the sequence of each row of the decoding batch
        running = torch.ones(batch, dtype=torch.bool, device=self.device)
        lengths = torch.zeros(batch, dtype=torch.long, device=self.device)
        tokens = torch.full((batch, most), self.pad_id, device=self.device)
        logprobs = torch.zeros(batch, most, device=self.device)
        counter, known, reported = _Running(batch, self.device), batch, torch.zeros_like(running)
        for step in range(most):
            token, logprob = self._choose(begin(), rows, step)
            tokens[rows, step], logprobs[rows, step] = token.where(running, self.pad_id), logprob.where(running, 0)
            lengths[rows] = lengths[rows] + running
            running = running & ~self._ended(token, tokens[rows, : step + 1])
            if limit is not None:
                full = running & (limit[rows] <= step + 1)
                cut[rows], running = cut[rows] | full, running & ~full
            alive = counter.after(step, running)
            if self.on_ended is not None and alive < known:
                known, ended = alive, torch.ones_like(reported).index_fill_(0, rows[running], False)
                new = (ended & ~reported).nonzero().flatten()
                of_all = new.tolist(), tokens[new, : step + 1].tolist(), lengths[new].tolist(), cut[new].tolist()
                for row, ids, length, full in zip(*of_all, strict=True):
                    self.on_ended(row, ids[:length], not full)
                reported = ended
            if self.on_token is not None:
                self.on_token(alive, step + 1)
            if alive == 0 or step + 1 == most:
                break
            leaving = max(1, round(self.decoding.leave_together * batch))
            remaining = -(-alive // leaving) * leaving
            if remaining < len(rows):
                # Rows leave in multiples of `leaving`: the running rows stay, and enough of the ended ones to fill up.
                keep = running.logical_not().long().argsort(stable=True)[:remaining].sort().values
                self.decoding.select(keep)
                rows, token, running = rows[keep], token[keep], running[keep]
            begin = partial(self.decoding.step, token)
        if graphs.why_not and self.sampler.cuda_graphs is True:
            raise ConfigError(f"sampler.cuda_graphs=true: {graphs.why_not}; set it to auto")
        finished = ~cut
        finished[rows[running]] = False
        longest = int(lengths.max())
        mask = torch.arange(longest, device=tokens.device)[None] < lengths[:, None]
        return tokens[:, :longest], mask, logprobs[:, :longest], finished

    def _choose(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The next token [R] of each row of the decoding batch, and its log-probability [R], from logits [R, V]."""
        if logits.device.type == "mps":  # MPS has no float64
            token, logprob = self._choose(logits.cpu(), rows.cpu(), step)
            return token.to(logits.device), logprob.to(logits.device)
        sampler = self.sampler
        if not self.greedy and sampler.keeps_all_tokens:
            if self.runner.backend.usable(logits):
                return self.runner.backend.draw_tokens(logits, self._uniform(rows, step), sampler.temperature)
            if logits.device.type != "cpu":
                return draw_by_integers(logits, self._uniform(rows, step), sampler.temperature)
        scaled = logits.float() if sampler.temperature == 1 else logits.float() / sampler.temperature
        if self.greedy:
            token = scaled.argmax(dim=-1)
        else:
            kept = filter_logits(scaled, sampler.top_k, sampler.top_p, sampler.min_p)
            token = draw_tokens(kept, self._uniform(rows, step))
        return token, scaled.log_softmax(dim=-1).gather(1, token[:, None]).squeeze(1)

    def _uniform(self, rows: Tensor, step: int) -> Tensor:
        """A uniform random number for each row of the decoding batch, [R, 1] float64."""
        if isinstance(self.generator, PromptDraws):
            return self.generator.numbers(rows, step)
        return torch.rand(len(rows), 1, dtype=torch.float64, device=rows.device, generator=self.generator)

    def _ended(self, token: Tensor, completion: Tensor) -> Tensor:
        """Whether each row of the decoding batch has ended, [R] bool, from its last token [R] and all of its tokens."""
        ended = (token[:, None] == self.stop_ids).any(dim=1)
        if self.stop_criteria is not None:
            ended = ended | self.stop_criteria(completion, None).to(ended.device)
        return ended


def _replays(device: torch.device) -> bool:
    return device.type == "cuda"


class _Running:
    """Number of running rows, as far as the host knows it.

    On a CPU the number is known at every step. On an accelerator, reading it would wait until all queued work is done, and leave
    the device idle. So the number is copied every `_EVERY` steps, and read when the next copy begins. Until then a few rows that
    have ended continue; their tokens are ignored.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.known = rows
        self._every = 1 if device.type in ("cpu", "mps") else _EVERY  # on MPS the host draws each token
        self._copy = torch.empty(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._event: Any = None

    def after(self, step: int, running: Tensor) -> int:
        """The number known after a step, never less than the true one, which is the sum of `running` [R] bool."""
        if (step + 1) % self._every:
            return self.known
        count = running.sum()
        if self._every == 1:
            self.known = int(count)
            return self.known
        if self._event is not None:
            self._event.synchronize()  # finished long ago
            self.known = int(self._copy.numpy()[0])
        self._copy.copy_(count[None], non_blocking=True)
        self._event = torch.Event(count.device)
        self._event.record()
        return self.known


def filter_logits(logits: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Logits [R, V] with minus infinity for excluded tokens: by top-k, then top-p, then min-p, as in `generate`."""
    if top_k > 0:
        unused = torch.empty(0, dtype=torch.long)  # in place of the tokens so far, which the processor does not use
        logits = TopKLogitsWarper(top_k)(unused, logits)
    if top_p < 1:  # like `TopPLogitsWarper`; on a GPU the order of its sums is not fixed
        ascending, order = logits.sort(dim=1, stable=True)
        left_out = running_sums(ascending.softmax(dim=1)) <= 1 - top_p
        left_out[:, -1] = False
        logits = logits.masked_fill(left_out.scatter(1, order, left_out), float("-inf"))
    if min_p > 0:  # a share of the largest probability is a distance from the largest logit
        logits = logits.masked_fill(logits < logits.amax(dim=1, keepdim=True) + math.log(min_p), float("-inf"))
    return logits


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token for each row of logits from one random number, by inverting the cumulative distribution.

    `torch.multinomial` draws V exponential numbers for a token. With a vocabulary of 50,000 that takes longer on a CPU than the
    model's output layer. Here the number is first looked up among the sums of blocks of tokens, so only one block is summed token
    by token. Running sums are float64: in float32, V small numbers would not add up to 1 accurately enough.

    Args:
        logits: [R, V].
        uniform: Uniform random numbers in [0, 1), [R, 1] float64.

    Returns:
        Tokens [R] int64.
    """
    probabilities = logits.softmax(dim=-1)
    if probabilities.shape[1] % _BLOCK:
        probabilities = F.pad(probabilities, (0, -probabilities.shape[1] % _BLOCK))
    blocks = probabilities.view(len(logits), -1, _BLOCK)
    ends = running_sums(blocks.sum(dim=2).double())
    target = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    # The first token with a cumulative probability above the number. If there is none, because the block's sum was rounded: the
    # last token with any probability, since a token of probability 0 is never drawn.
    token = torch.searchsorted(running_sums(inside.double()), target - before, right=True).squeeze(1)
    last = _BLOCK - 1 - inside.flip(1).gt(0).long().argmax(dim=1)
    return block.squeeze(1) * _BLOCK + torch.minimum(token, last)


def draw_by_integers(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits on an accelerator, with its log-probability, in few passes over the logits.

    Probabilities are summed as whole multiples of 2^-40, so sums are exact and do not depend on the order in which the device
    adds. A probability below 2^-40 counts as 0.

    Args:
        logits: [R, V].
        uniform: Uniform random numbers in [0, 1), [R, 1] float64.
        temperature: Divides the logits.

    Returns:
        Tokens [R] int64, and their log-probabilities [R] float32 under softmax(logits / temperature).
    """
    width = logits.shape[1]
    size = next((size for size in (_BLOCK, _BLOCK // 2, _BLOCK // 4, _BLOCK // 8) if width % size == 0), 0)
    if not size:
        logits, size = F.pad(logits, (0, -width % _BLOCK), value=float("-inf")), _BLOCK
    blocks = logits.view(len(logits), -1, size)
    highest, sums = _block_sums(blocks, temperature)
    top = highest.amax(dim=1, keepdim=True)
    ends = _whole(sums * (highest - top).exp()).cumsum(dim=1)
    target = (uniform * ends[:, -1:].double()).long().clamp_(max=ends[:, -1:] - 1)
    block = torch.searchsorted(ends, target, right=True)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, size)).squeeze(1).float() / temperature - top
    weights = _whole(inside.exp())
    token = torch.searchsorted(weights.cumsum(dim=1), target - before, right=True).squeeze(1)
    # As in `draw_tokens`: the whole parts of a block's numbers may add up to a little less than the whole part of their sum.
    last = size - 1 - weights.flip(1).gt(0).long().argmax(dim=1)
    token = torch.minimum(token, last)
    logprob = inside.gather(1, token[:, None]).double() - (ends[:, -1:].double() / _ONE).log()
    return block.squeeze(1) * size + token, logprob.float().squeeze(1)


@partial(OneKernel, "rows _ _")
def _block_sums(blocks: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """For each block of x = logits / temperature: the highest x, and the sum of exp(x - highest), [R, blocks] float32 each."""
    scaled = blocks.float() / temperature
    highest = scaled.amax(dim=2, keepdim=True)
    lowest = torch.finfo(torch.float32).min  # where all are minus infinity
    return highest.squeeze(2), (scaled - highest.clamp(min=lowest)).exp().sum(dim=2)


def _whole(values: Tensor) -> Tensor:
    return values.double().mul_(_ONE).long()


def running_sums(values: Tensor) -> Tensor:
    """Cumulative sums of [R, n] along the second axis, always added in the same order.

    `torch.cumsum` has no fixed order on a GPU, and `trainer.deterministic=true` refuses it there.
    """
    return values.cumsum(dim=1) if values.device.type == "cpu" else sums_by_doubling(values)


def sums_by_doubling(values: Tensor) -> Tensor:
    """Cumulative sums of [R, n] along the second axis, by about log2(n) additions of whole tensors."""
    step = 1
    while step < values.shape[1]:  # each entry is the sum of up to `step` original entries that end with it
        values = torch.cat([values[:, :step], values[:, step:] + values[:, :-step]], dim=1)
        step *= 2
    return values
