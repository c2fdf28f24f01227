"""What cannot work is refused at start, with the reason and the remedy."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.sharding import FSDP1Strategy, FSDP2Strategy
from hybrid_lightning.sharding.checks import check_strategy
from hybrid_lightning.sharding.parameters import decoder_blocks


def check(strategy, optimizer=torch.optim.AdamW, precision="32-true", dtype="float32", devices=2, fn="fit", **parts):
    state = SimpleNamespace(fn=fn)
    trainer = SimpleNamespace(strategy=strategy, precision=precision, state=state, world_size=devices, **parts)
    check_strategy(trainer, optimizer, dtype)


@pytest.mark.parametrize(
    ("strategy", "precision", "dtype"),
    [
        (lambda: SingleDeviceStrategy("cpu"), "32-true", "float32"),
        (DDPStrategy, "16-mixed", "float32"),
        (FSDP2Strategy, "bf16-mixed", "bfloat16"),
        (FSDP2Strategy, "16-mixed", "float16"),
        (FSDP1Strategy, "bf16-mixed", "float32"),
        (FSDP1Strategy, "bf16-true", "bfloat16"),
    ],
)
def test_what_works_is_let_through_and_looked_at(strategy, precision, dtype):
    asked = []

    def optimizer(groups):
        asked.append(groups)
        return torch.optim.AdamW(groups)

    check(strategy(), optimizer, precision, dtype)
    assert len(asked) == isinstance(strategy(), (FSDP1Strategy, FSDP2Strategy)), "these alone depend on the optimizer"


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_lightnings_own_sharding_is_refused(strategy):
    with pytest.raises(ConfigError, match=rf"{strategy.__name__} is not supported.*configs/strategy/fsdp2\.yaml"):
        check(strategy())


def test_one_device_is_refused_where_there_must_be_parts():
    check(FSDP2Strategy(), devices=1)
    with pytest.raises(ConfigError, match=r"FSDP1Strategy has nothing to split on one device.*strategy=auto"):
        check(FSDP1Strategy(), devices=1)


def test_two_dtypes_are_refused_where_a_block_can_have_one_only():
    with pytest.raises(ConfigError, match=r"bfloat16 does not work with FSDP1Strategy.*fsdp2\.yaml"):
        check(FSDP1Strategy(), precision="bf16-mixed", dtype="bfloat16")


def test_a_remote_folder_is_refused_where_checkpoints_are_folders():
    remote, local = [ModelCheckpoint("memory://run")], [ModelCheckpoint("runs"), ModelCheckpoint()]
    check(FSDP2Strategy(), checkpoint_callbacks=remote)
    for strategy in (FSDP2Strategy(save_distributed_checkpoint=True), FSDP1Strategy(state_dict_type="sharded")):
        with pytest.raises(ConfigError, match=r"dirpath=memory://run cannot take sharded checkpoints"):
            check(strategy, checkpoint_callbacks=remote)
        check(strategy, checkpoint_callbacks=local)


def test_a_type_of_checkpoint_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"state_dict_type must be full or sharded, got 'split'"):
        FSDP1Strategy(state_dict_type="split")


def test_fewer_prompts_than_devices_are_refused():
    data = SimpleNamespace(test_prompts=[1, 2])
    with pytest.raises(ConfigError, match=r"2 prompts cannot be predicted on 3 devices.*fewer devices"):
        check(FSDP2Strategy(), fn="predict", devices=3, datamodule=data)
    check(FSDP2Strategy(), fn="predict", devices=2, datamodule=data)


def test_an_optimizer_that_cannot_hold_parts_of_weights_is_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    check(DDPStrategy(), bitsandbytes.optim.AdamW8bit)
    with pytest.raises(ConfigError, match=r"AdamW8bit cannot hold.*torch\.optim\.AdamW"):
        check(FSDP2Strategy(), bitsandbytes.optim.AdamW8bit)


def test_blocks_are_found_by_structure(make_model):
    from peft import LoraConfig, get_peft_model

    for family, name in (("llama", "LlamaDecoderLayer"), ("gpt2", "GPT2Block"), ("qwen3", "Qwen3DecoderLayer")):
        model = make_model(family)
        assert [type(block).__name__ for block in decoder_blocks(model)] == [name] * 2
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2"))
        assert [type(block).__name__ for block in decoder_blocks(adapted)] == [name] * 2


def test_lists_within_a_block_are_no_blocks():
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    assert decoder_blocks(model) == [block]
    with pytest.raises(ModelError, match="no numbered decoder blocks"):
        decoder_blocks(torch.nn.Linear(2, 2))
