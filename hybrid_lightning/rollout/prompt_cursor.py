"""A position in the order of the training prompts, from which rollouts draw."""

from collections.abc import Sequence

from hybrid_lightning.rollout.prompt_order import PromptOrder
from hybrid_lightning.types import Prompt


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
