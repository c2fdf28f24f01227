from types import SimpleNamespace

import pytest

from hybrid_lightning.data import PlainFormat, PromptDataModule, PromptSource, Row, Splits
from hybrid_lightning.errors import ConfigError, DataError
from hybrid_lightning.types import Prompt


class Words(PromptSource):
    """Problems 0, 1, 2, ... with as many words as their number."""

    def __init__(self, train: int = 10, validation: int = 0, test: int = 0) -> None:
        self.sizes = {"train": train, "validation": validation, "test": test}
        self.reads = 0

    def read(self) -> Splits:
        self.reads += 1
        sizes = self.sizes.items()
        return Splits(**{split: [Row(f"{split} " + "w " * n, str(n), n, split) for n in range(size)] for split, size in sizes})


def words(prompt: Prompt) -> list[int]:
    assert prompt.text is not None
    return list(range(len(prompt.text.split())))


def test_batches_are_of_prompts_and_a_policy_makes_the_training_batches():
    source = Words(train=4, validation=3, test=5)
    data = PromptDataModule(source, PlainFormat(), max_prompt_tokens=3, eval_batch_size=2)
    policy = SimpleNamespace(encode=words, rollout_loader=lambda prompts: [prompt.index for prompt in prompts])
    data.trainer = SimpleNamespace(lightning_module=policy)
    data.setup()
    assert data.train_dataloader() == [0, 1, 2]
    loaders = (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
    assert [[[prompt.index for prompt in batch] for batch in loader] for loader in loaders] == [[[0, 1], [2]]] * 3
    assert source.reads == 1 and PromptDataModule(Words(), PlainFormat()).val_dataloader() == []
    del policy.rollout_loader
    with pytest.raises(ConfigError, match=r"rollout_loader\(prompts\)"):
        data.train_dataloader()


def test_what_a_source_of_ones_own_gets_wrong_is_said():
    for returned, message in (
        ([Row("1+1=", "2")], r"Mine\.read returned a list; return Splits\("),
        (Splits(train=[("1+1=", "2")]), r"Mine\.read: train row 0 is a tuple; make it a Row\(question, answer\)"),
        (Splits(train=[Row("2+1=", "3"), Row(None, "3", 1)]), r"Mine\.read: the question of train row 1 is None; give text"),
        (Splits(train=[Row("1", "1", 4, "s"), Row("2", "2", 4, "s")]), "two train rows from 's' have index 4; give each row its"),
    ):
        with pytest.raises(DataError, match=message):
            type("Mine", (PromptSource,), {"read": lambda self, returned=returned: returned})().load()


def test_long_prompts_are_dropped_with_a_count_and_never_cut(caplog):
    data = PromptDataModule(Words(train=10, validation=2), PlainFormat(), max_prompt_tokens=4)
    with caplog.at_level("INFO"):
        data.setup("fit", encode=words)
        data.setup("fit")
    assert [prompt.index for prompt in data.train_prompts] == [0, 1, 2, 3]
    assert data.train_prompts[3].text == "train w w w "
    assert caplog.text.count("dropped 6 of 10 train prompts longer than max_prompt_tokens=4") == 1
    assert "validation prompts" not in caplog.text


def test_prompts_that_are_too_long_or_cannot_be_counted_impossible_limits_and_stages_without_rows_are_refused():
    data = PromptDataModule(Words(train=3), PlainFormat("a b c d {question}"), max_prompt_tokens=4)
    message = r"all 3 train prompts are longer than max_prompt_tokens=4 \(from 5 to 7 tokens\); raise it"
    with pytest.raises(DataError, match=message):
        data.setup("fit", encode=words)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        PromptDataModule(Words(), PlainFormat(), max_prompt_tokens=4).setup("fit")
    for name in ("max_prompt_tokens", "eval_batch_size"):
        with pytest.raises(ConfigError, match=f"{name}=0; give at least 1"):
            PromptDataModule(Words(), PlainFormat(), **{name: 0})
    for stage, split in (("validate", "validation"), ("predict", "test")):
        with pytest.raises(DataError, match=f"Words has no {split} rows, but {stage} needs some"):
            PromptDataModule(Words(train=3), PlainFormat()).setup(stage)


def test_limits_draw_by_seed_and_keep_the_index():
    source = Words(train=50, validation=50, test=50)
    data = PromptDataModule(source, PlainFormat(), validation_prompts=10, test_prompts=60, seed=1)
    data.setup()
    indices = [prompt.index for prompt in data.validation_prompts]
    assert len(set(indices)) == 10 and indices == sorted(indices)
    assert len(data.test_prompts) == len(data.train_prompts) == 50
    again = PromptDataModule(source, PlainFormat(), validation_prompts=10, seed=1)
    assert again.validation_prompts == data.validation_prompts
    other = PromptDataModule(source, PlainFormat(), validation_prompts=10, seed=2)
    assert other.validation_prompts != data.validation_prompts
    assert [len(batch) for batch in data.val_dataloader()] == [10]
