"""`ReasoningGymSource`: procedural problems from the library reasoning-gym; each task has its own verifier."""

from typing import Any

from hybrid_lightning.data.source import PromptSource
from hybrid_lightning.data.splitting import Row, Splits
from hybrid_lightning.errors import ConfigError, DataError, one_line
from hybrid_lightning.shared.reasoning_gym_tasks import library


class ReasoningGymSource(PromptSource):
    """Problems of one reasoning-gym task, for `ReasoningGymReward`.

    All splits are slices of one generated set, in which every problem has its own random seed. Training rows that repeat a
    held-out problem are dropped, so a task with few different problems gives fewer rows.

    Args:
        task: Name of the task, such as "leg_counting".
        size: Number of training problems.
        validation_size: Number of validation problems.
        test_size: Number of test problems.
        seed: Seed of the generated set.
        config: Further arguments of the task, such as `{"max_animals": 5}`.
    """

    def __init__(
        self,
        task: str,
        size: int = 1000,
        validation_size: int = 100,
        test_size: int = 100,
        seed: int = 0,
        config: dict[str, Any] | None = None,
    ) -> None:
        sizes = {"size": size, "validation_size": validation_size, "test_size": test_size}
        for name, value in sizes.items():
            if value < 0:
                raise ConfigError(f"{name}={value}; give 0 or more problems")
        if not sum(sizes.values()):
            raise ConfigError("size, validation_size and test_size are all 0; set at least one of them")
        for name in {"size", "seed"} & set(config or {}):
            raise ConfigError(f"config has {name!r}; set the argument {name} of ReasoningGymSource instead")
        self.task = task
        self.sizes = (size, validation_size, test_size)
        self.seed = seed
        self.config = dict(config or {})

    def read(self) -> Splits:
        """Generate the problems."""
        # The columns hold what the reward needs to regenerate the same entry in any process. The entry itself may hold tuples
        # and other objects that JSON would change.
        config = {**self.config, "seed": self.seed, "size": sum(self.sizes)}
        factory = library(type(self).__name__)
        if self.task not in factory.DATASETS:
            raise ConfigError(f"reasoning-gym has no task {self.task!r}; it has {', '.join(sorted(factory.DATASETS))}")
        try:
            dataset = factory.create_dataset(self.task, **config)
        except Exception as error:
            raise ConfigError(
                f"reasoning-gym task {self.task!r} rejects config={self.config}: {one_line(error)}; correct it"
            ) from error
        rows = []
        for item in range(sum(self.sizes)):
            try:
                entry = dataset[item]
            except Exception as error:
                raise DataError(
                    f"reasoning-gym task {self.task!r} cannot make problem {item}: {one_line(error)}; change the seed or config"
                ) from error
            columns = {"question": entry["question"], "task": self.task, "config": config, "item": item}
            answer = entry["answer"]
            rows.append(
                Row(entry["question"], None if answer is None else str(answer), item, f"reasoning-gym {self.task}", columns)
            )
        held_out, test = self.sizes[0], self.sizes[0] + self.sizes[1]
        return Splits(train=rows[:held_out], validation=rows[held_out:test], test=rows[test:])
