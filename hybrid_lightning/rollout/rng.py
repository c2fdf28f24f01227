"""Random numbers for completions, which depend on the prompt and not on its batch; and the random states of a run."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid_lightning.types import Prompt

_STEPS = 64  # tokens for which numbers are drawn at once: a compromise between one call per token and the longest completion


class PromptDraws:
    """Uniform random numbers for the completions of a batch of prompts, from one generator per prompt.

    Batch size, number of ranks and order of prompts then affect only the rounding of logits.

    Args:
        prompts: P prompts.
        samples_per_prompt: G.
        seed: Seed that all generators share.
        places: Distinguishes the prompts, for example by their numbers in a rollout over all ranks, which may have a prompt
            twice; None takes the set and the index of each prompt.
    """

    def __init__(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, places: Sequence[int | str] | None = None
    ) -> None:
        names = [f"{prompt.set_name}/{prompt.index}" for prompt in prompts] if places is None else list(map(str, places))
        assert len(names) == len(prompts)
        self._prompts, self._seed, self._names = prompts, seed, names
        digests = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names]
        self.seeds = [int.from_bytes(digest) >> 1 for digest in digests]  # one per prompt, below 2^63
        self._generators = [(torch.Generator().manual_seed(seed), samples_per_prompt) for seed in self.seeds]
        self._samples = samples_per_prompt
        self._chosen: Tensor | None = None  # which of the generators' numbers belong to the completions; None: all, in order
        self._block = torch.empty(0)
        self._next = 0  # the first step after the block

    def numbers(self, rows: Tensor, step: int) -> Tensor:
        """Numbers in [0, 1) for the next token.

        Args:
            rows: [R] int64, the numbers of the unfinished ones among the P * G completions.
            step: Number of tokens that they have; it must grow by one at each call.

        Returns:
            [R, 1] float64 on the device of `rows`.
        """
        if step == self._next:
            parts = [
                torch.rand((samples, _STEPS), dtype=torch.float64, generator=generator) for generator, samples in self._generators
            ]
            block = torch.cat(parts) if self._chosen is None else torch.cat(parts)[self._chosen]
            if rows.device.type == "cuda":  # from pinned memory, so that the host need not wait for the device
                block = block.pin_memory()
            self._block, self._next = block.to(rows.device, non_blocking=True), self._next + _STEPS
        return self._block[rows, step - self._next + _STEPS, None]

    def of_turns(self, rows: Sequence[int], turns: Sequence[int | str]) -> "PromptDraws":
        """New draws for messages of some episodes, from one generator for each message.

        Numbers depend only on the prompt, the sample, the turn and the seed, and not on which other episodes ask for messages.

        Args:
            rows: Numbers of R of the P * G completions.
            turns: Number of the next message of each, or its name. Message 0, the first, has the numbers that these draws give.

        Returns:
            Draws of R prompts with one sample each.
        """
        places = [divmod(row, self._samples) for row in rows]
        names = [
            f"{self._names[place]}/{sample} turn {turn}" if turn else self._names[place]
            for (place, sample), turn in zip(places, turns, strict=True)
        ]
        draws = PromptDraws([self._prompts[place] for place, _ in places], 1, self._seed, names)
        if not all(turns):
            draws._share(
                self._samples, [(place, None if turn else sample) for (place, sample), turn in zip(places, turns, strict=True)]
            )
        return draws

    def of_prompts(self, places: Sequence[int]) -> "PromptDraws":
        """New draws for the first messages of some of the prompts."""
        return PromptDraws([self._prompts[n] for n in places], self._samples, self._seed, [self._names[n] for n in places])

    def _share(self, samples: int, places: Sequence[tuple[int, int | None]]) -> None:
        """Give first messages, which have a sample beside their prompt's place, the numbers of one generator per prompt."""
        generators, chosen, begins, count = [], [], dict[int, int](), 0
        for row, ((place, sample), (generator, _)) in enumerate(zip(places, self._generators, strict=True)):
            if sample is None or place not in begins:
                generators.append((generator, 1 if sample is None else samples))
                begins |= {} if sample is None else {place: count}
                count += generators[-1][1]
            chosen.append(count - 1 if sample is None else begins[place] + sample)
            self.seeds[row] += sample or 0
        self._generators, self._chosen = generators, torch.tensor(chosen)

    def seed_of(self, row: int, turn: int | str) -> int:
        """A seed below 2^63 for message `turn`, from 0, of one of the P * G completions, for engines that draw by themselves.

        The first messages of a prompt have successive seeds, as vLLM gives them to the completions of one request.
        """
        if turn:
            return self.of_turns([row], [turn]).seeds[0]
        place, sample = divmod(row, self._samples)
        return self.seeds[place] + sample


def evaluation_draws(prompts: Sequence[Prompt], samples_per_prompt: int, seed: int) -> PromptDraws:
    """Random numbers that are the same in every evaluation, and independent of training."""
    return PromptDraws(prompts, samples_per_prompt, seed + 104_729)


def task_seeds(prompts: Sequence[Prompt], generator: torch.Generator | PromptDraws | None, seed: int) -> list[int]:
    """A seed for the task of each prompt, in [0, 2^31).

    If a row has a column `seed`, it is the seed, so that the row is always the same task. For other rows, each rollout draws new
    seeds, and every evaluation uses the same seeds, which follow from the policy's `seed`. Greedy completions have no generator,
    and use the seeds of evaluations.
    """
    if isinstance(generator, torch.Generator):
        drawn = torch.randint(2**31, (len(prompts),), generator=generator, device=generator.device).tolist()
    else:
        drawn = (generator or evaluation_draws(prompts, 1, seed)).seeds
    own = [prompt.columns.get("seed") for prompt in prompts]
    return [(row if type(row) is int else other) % 2**31 for row, other in zip(own, drawn, strict=True)]


def capture_random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, as plain data and tensors.

    On CUDA only the generator of this process's device is captured: other devices belong to other processes, and reading their
    state would take memory there.
    """
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(algorithm), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global generators to a state from `capture_random_state`.

    If the state comes from a process without CUDA, the generator of this process's device stays as it was seeded.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())
