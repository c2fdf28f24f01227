from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from peft import LoraConfig, get_peft_model

from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.sharding import FSDP1Strategy, FSDP2Strategy
from hybrid_lightning.sharding.checks import check_strategy
from hybrid_lightning.sharding.parameters import decoder_blocks


def check(strategy, optimizer=torch.optim.AdamW, precision="32-true", dtype="float32", devices=2, fn="fit", **parts):
    state = SimpleNamespace(fn=fn)
    trainer = SimpleNamespace(strategy=strategy, precision=precision, state=state, world_size=devices, **parts)
    check_strategy(trainer, optimizer, dtype)


REMOTE, LOCAL = [ModelCheckpoint("memory://run")], [ModelCheckpoint("runs"), ModelCheckpoint()]
FOLDERS = partial(FSDP2Strategy, save_distributed_checkpoint=True), partial(FSDP1Strategy, state_dict_type="sharded")
PREDICTION = {"fn": "predict", "datamodule": SimpleNamespace(test_prompts=[1, 2])}
BFLOAT16 = {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("strategy", "run"),
    [
        (partial(SingleDeviceStrategy, "cpu"), {}),
        (DDPStrategy, {"precision": "16-mixed"}),
        (FSDP2Strategy, {"precision": "bf16-mixed", "devices": 1, "checkpoint_callbacks": REMOTE, **BFLOAT16}),
        (FSDP1Strategy, {"precision": "bf16-mixed"}),
        (FSDP1Strategy, {"precision": "bf16-true", **BFLOAT16}),
        *((strategy, {"checkpoint_callbacks": LOCAL}) for strategy in FOLDERS),
        (FSDP2Strategy, PREDICTION),
    ],
)
def test_what_works_is_let_through_and_looked_at(strategy, run):
    asked = []

    def optimizer(groups):
        asked.append(groups)
        return torch.optim.AdamW(groups)

    check(strategy(), optimizer, **run)
    split = isinstance(strategy(), (FSDP1Strategy, FSDP2Strategy))
    assert len(asked) == (split and "fn" not in run), "training on these alone depends on the optimizer"


@pytest.mark.parametrize(
    ("strategy", "run", "message"),
    [
        (FSDPStrategy, {}, r"FSDPStrategy is not supported.*configs/strategy/fsdp\.yaml"),
        (ModelParallelStrategy, {}, r"ModelParallelStrategy is not supported.*configs/strategy/fsdp\.yaml"),
        (FSDP1Strategy, {"devices": 1}, r"FSDP1Strategy has nothing to split on one device.*strategy=auto"),
        (FSDP1Strategy, {"precision": "bf16-mixed", **BFLOAT16}, r"bfloat16 does not work with FSDP1Strategy.*fsdp2\.yaml"),
        *((strategy, {"checkpoint_callbacks": REMOTE}, "memory://run cannot take sharded checkpoints") for strategy in FOLDERS),
        (FSDP2Strategy, {**PREDICTION, "devices": 3}, r"2 prompts cannot be predicted on 3 devices.*fewer devices"),
        (partial(FSDP1Strategy, state_dict_type="split"), {}, "state_dict_type must be full or sharded, got 'split'"),
    ],
)
def test_what_cannot_work_is_refused(strategy, run, message):
    with pytest.raises(ConfigError, match=message):
        check(strategy(), **run)


def test_blocks_are_found_by_structure(make_model):
    for family, name in (("llama", "LlamaDecoderLayer"), ("gpt2", "GPT2Block")):
        lora = LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2")
        for model in (make_model(family), get_peft_model(make_model(family), lora)):
            assert [type(block).__name__ for block in decoder_blocks(model)] == [name] * 2
    model, block = torch.nn.Module(), torch.nn.Module()
    block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model.layers = torch.nn.ModuleList([block])
    assert decoder_blocks(model) == [block], "lists within a block are no blocks"
    with pytest.raises(ModelError, match="no numbered decoder blocks"):
        decoder_blocks(torch.nn.Linear(2, 2))
