from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from peft import LoraConfig, get_peft_model

from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.sharding import FSDP2Strategy
from hybrid_lightning.sharding.checks import check_strategy
from hybrid_lightning.sharding.fsdp2 import chosen_strategy
from hybrid_lightning.sharding.parameters import decoder_blocks


def check(strategy, optimizer=torch.optim.AdamW, devices=2, fn="fit", **parts):
    check_strategy(SimpleNamespace(strategy=strategy, state=SimpleNamespace(fn=fn), world_size=devices, **parts), optimizer)


REMOTE, LOCAL = [ModelCheckpoint("memory://run")], [ModelCheckpoint("runs"), ModelCheckpoint()]
FOLDERS = partial(FSDP2Strategy, save_distributed_checkpoint=True)
PREDICTION = {"fn": "predict", "datamodule": SimpleNamespace(test_prompts=[1, 2])}


@pytest.mark.parametrize(
    ("strategy", "run"),
    [
        (partial(SingleDeviceStrategy, "cpu"), {}),
        (DDPStrategy, {}),
        (FSDP2Strategy, {"devices": 1, "checkpoint_callbacks": REMOTE}),
        (FOLDERS, {"checkpoint_callbacks": LOCAL}),
        (FSDP2Strategy, PREDICTION),
    ],
)
def test_what_works_is_let_through_and_looked_at(strategy, run):
    asked = []

    def optimizer(groups):
        asked.append(groups)
        return torch.optim.AdamW(groups)

    check(strategy(), optimizer, **run)
    trains = isinstance(strategy(), FSDP2Strategy) and "fn" not in run
    assert len(asked) == trains, "training under this alone depends on the optimizer"


@pytest.mark.parametrize(
    ("strategy", "run", "message"),
    [
        (FSDPStrategy, {}, r"FSDPStrategy is not supported.*else fsdp, which is FSDP2"),
        (ModelParallelStrategy, {}, r"ModelParallelStrategy is not supported.*else fsdp, which is FSDP2"),
        (FOLDERS, {"checkpoint_callbacks": REMOTE}, "memory://run cannot take sharded checkpoints"),
        (FSDP2Strategy, {**PREDICTION, "devices": 3}, r"got 2 for 3 devices; use fewer devices"),
    ],
)
def test_what_cannot_work_is_refused(strategy, run, message):
    with pytest.raises(ConfigError, match=message):
        check(strategy(), **run)


def test_lightnings_names_for_fsdp_are_fsdp2_and_its_own_strategy_is_refused():
    for name, offloads in (("fsdp", False), ("fsdp_cpu_offload", True)):
        chosen = chosen_strategy(name)
        assert isinstance(chosen, FSDP2Strategy) and chosen.cpu_offload is offloads
    assert chosen_strategy("ddp") == "ddp" and chosen_strategy(chosen) is chosen
    with pytest.raises(ConfigError, match="FSDPStrategy is FSDP1, which is not supported; give fsdp"):
        chosen_strategy(FSDPStrategy())


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
