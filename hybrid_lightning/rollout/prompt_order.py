"""The order in which training prompts are drawn: each prompt once per epoch, or sets in proportion to their weights.

The order is a function of seed and epoch alone, so a checkpoint only has to hold a position in it.
"""

import hashlib
import json
import random
from collections.abc import Sequence

import torch

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import Prompt


class PromptCursor:
    """Draws the next prompts of the order, which are the same on every rank; False for `shuffle` keeps the order of the data."""

    def __init__(
        self, prompts: Sequence[Prompt], seed: int = 0, epoch: int = 0, shuffle: bool = True, rank: int = 0, world_size: int = 1
    ) -> None:
        self.prompts, self.shuffle = prompts, shuffle
        # The whole state for a checkpoint: the epoch of the order, and the number of its prompts drawn so far.
        self.position = (epoch, 0)
        self._rank, self._world_size = rank, world_size
        self._prompt_order = PromptOrder(prompts, seed)

    def draw(self, count: int) -> list[Prompt]:
        """This rank's part of the next `count` prompts; fewer remaining prompts at the end of an epoch are left out."""
        epoch, start = self.position
        if start + count > len(self.prompts):
            epoch, start = epoch + 1, 0
        self.position = (epoch, start + count)
        order = self._prompt_order.of(epoch) if self.shuffle else range(len(self.prompts))
        # Each rank takes every world_size-th prompt, so that a minibatch has the same prompts on any number of ranks.
        return [self.prompts[i] for i in order[start : start + count][self._rank :: self._world_size]]


class PromptOrder:
    """The order of the prompts in each epoch, as positions; an epoch has one draw per prompt.

    Without weights an epoch is a permutation. With weights (`Prompt.set_weight`) the sets take turns: among the first n draws of
    an epoch each set has its share of n, to within less than one. The prompts of a set are drawn in one permutation after
    another, across epochs, so that all of them are drawn equally often, to within one.

    Raises:
        ConfigError: If the weight of a set is so small that its prompts are never drawn.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.seed = seed
        self._size = len(prompts)
        self._last = (-1, list[int]())  # an epoch and its order, kept since many rollouts draw from one epoch
        self._members: dict[str, list[int]] = {}
        weights: dict[str, float] = {}
        for position, prompt in enumerate(prompts):
            if prompt.set_weight is not None:
                self._members.setdefault(prompt.set_name, []).append(position)
                weights[prompt.set_name] = prompt.set_weight
        assert sum(map(len, self._members.values())) in (0, self._size), "all prompts have a weight, or none"
        self._turns = take_turns(weights, self._size)
        for name, weight in weights.items():
            if name not in self._turns:
                raise ConfigError(
                    f"the weight {weight:g} of set {name!r} gives it no draw in an epoch of {self._size} prompts, so it would "
                    "never be trained on; raise it, or leave the set out"
                )

    def of(self, epoch: int) -> list[int]:
        """Positions of the prompts in the order of an epoch."""
        if self._last[0] != epoch:
            self._last = (epoch, self._order(epoch))
        return self._last[1]

    def _order(self, epoch: int) -> list[int]:
        if not self._members:
            # Seed and epoch are combined by arithmetic, not by Python's hash(), which for some types differs between processes.
            order = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            return torch.randperm(self._size, generator=order).tolist()
        streams = {}
        for name, members in self._members.items():
            draws = self._turns.count(name)
            streams[name] = iter(self._stream(name, members, epoch * draws, draws))
        return [next(streams[name]) for name in self._turns]

    def _stream(self, name: str, members: list[int], start: int, count: int) -> list[int]:
        """Draws `start` to `start + count` from a set."""
        cycle, skip = divmod(start, len(members))
        drawn: list[int] = []
        while len(drawn) < skip + count:
            drawn += random.Random(f"{self.seed}/{name}/{cycle}").sample(members, len(members))
            cycle += 1
        return drawn[skip : skip + count]


def take_turns(weights: dict[str, float], count: int) -> list[str]:
    """Distribute turns in proportion to weights: among the first n turns each name has its share of n, to within less than one.

    This is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980): among the names that lag far
    enough below their share, the next turn goes to the one that would be the first to lag too far.

    Example:
        >>> "".join(take_turns({"a": 3, "b": 1}, 8))
        'aabaaaba'
    """
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    enough = 1 / max(1, 2 * len(shares) - 2) - 1e-9  # 1e-9 allows for rounding in the sums of shares
    owed = dict.fromkeys(shares, 0.0)
    turns = []
    for _ in range(count if shares else 0):
        for name, share in shares.items():
            owed[name] += share
        waiting = [name for name in shares if owed[name] >= enough]
        chosen = min(waiting, key=lambda name: (1 - enough - owed[name]) / shares[name])
        owed[chosen] -= 1
        turns.append(chosen)
    return turns


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the content of prompts, in their order.

    Columns that are not plain data count only by their type, since the text of an object may differ between processes. `source`
    does not count, since it may be the path of a file that has been moved.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        fields = {name: value for name, value in vars(prompt).items() if name != "source"}
        content = json.dumps(fields, default=lambda value: type(value).__qualname__, skipkeys=True)
        digest.update(content.encode() + b"\n")
    return digest.hexdigest()
