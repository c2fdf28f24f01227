"""In which order training prompts are drawn, each once an epoch or sets in their proportions; and a place in that order.

The order is a function of seed and epoch alone, so that a position in it is all that a checkpoint has to hold.
"""

import hashlib
import json
import random
from collections.abc import Sequence

import torch

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.types import Prompt


class PromptOrder:
    """Positions of prompts, epoch by epoch; an epoch is as many draws as there are prompts.

    Without weights an epoch is a permutation. With weights (`Prompt.set_weight`) the sets take turns: of the first n draws of an
    epoch each set has its share of n, to within less than one. Each set is gone through in permutations of its own, one after the
    other and over epochs, so that all prompts of a set are drawn equally often, to within one.

    Args:
        prompts: The training prompts, the same on every rank.
        seed: Of the permutations.

    Raises:
        ConfigError: If a weight is so small that an epoch, and so any, has no draw of its set.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.seed = seed
        self._size = len(prompts)
        self._last: tuple[int, list[int]] | None = None  # of an epoch many rollouts are drawn
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
                    f"the weight {weight:g} of set {name!r} gives it no draw in an epoch of {self._size} prompts, so that it "
                    "would never be trained on: raise it, or leave the set out"
                )

    def of(self, epoch: int) -> list[int]:
        """Positions of the prompts in the order of an epoch."""
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._mixed(epoch) if self._members else self._permutation(epoch))
        return self._last[1]

    def _permutation(self, epoch: int) -> list[int]:
        # Mixed by arithmetic and not by Python's hash(), which differs between processes for some types.
        order = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self._size, generator=order).tolist()

    def _mixed(self, epoch: int) -> list[int]:
        streams = {}
        for name, members in self._members.items():
            draws = self._turns.count(name)
            streams[name] = iter(self._stream(name, members, epoch * draws, draws))
        return [next(streams[name]) for name in self._turns]

    def _stream(self, name: str, members: list[int], start: int, count: int) -> list[int]:
        """Draws `start` to `start + count` of a set."""
        cycle, skip = divmod(start, len(members))
        drawn: list[int] = []
        while len(drawn) < skip + count:
            drawn += random.Random(f"{self.seed}/{name}/{cycle}").sample(members, len(members))
            cycle += 1
        return drawn[skip : skip + count]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the content of prompts, in their order.

    Of columns that are no plain data the type counts: how an object is written may differ between processes. `source` does not,
    which has the path of a file: it may have been moved.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        fields = {name: value for name, value in vars(prompt).items() if name != "source"}
        content = json.dumps(fields, default=lambda value: type(value).__qualname__, skipkeys=True)
        digest.update(content.encode() + b"\n")
    return digest.hexdigest()


def take_turns(weights: dict[str, float], count: int) -> list[str]:
    """Names in the proportions of their weights: of the first n turns each has its share of n, to within less than one.

    Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980): among those that lag behind enough,
    next is whoever would soonest lag by too much.

    Args:
        weights: Name -> positive number; only their ratios count.
        count: How many turns.

    Example:
        >>> "".join(take_turns({"a": 3, "b": 1}, 8))
        'aabaaaba'
    """
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    enough = 1 / max(1, 2 * len(shares) - 2) - 1e-9  # less what sums of shares are rounded by
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


class PromptCursor:
    """Draws the prompts that come next, and knows where it is: `position` is all that a checkpoint has to hold.

    Args:
        prompts: The training prompts, the same on every rank.
        seed: Of their order.
        epoch: In whose order to begin.
        shuffle: False keeps the order of the data.
        rank: This process.
        world_size: Number of processes that share each draw.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int = 0, epoch: int = 0, shuffle: bool = True, rank: int = 0, world_size: int = 1
    ) -> None:
        self.prompts, self.shuffle = prompts, shuffle
        self.position = (epoch, 0)  # the epoch of the order, and how many of its prompts have been drawn or left out
        self._rank, self._world_size = rank, world_size
        self._prompt_order = PromptOrder(prompts, seed)

    def draw(self, count: int) -> list[Prompt]:
        """This rank's part of the next `count` prompts. The last ones of an order that are fewer are left out."""
        epoch, start = self.position
        if start + count > len(self.prompts):
            epoch, start = epoch + 1, 0
        self.position = (epoch, start + count)
        order = self._prompt_order.of(epoch) if self.shuffle else range(len(self.prompts))
        # Dealt one by one, so that a minibatch has the same prompts however many ranks share it.
        return [self.prompts[i] for i in order[start : start + count][self._rank :: self._world_size]]
