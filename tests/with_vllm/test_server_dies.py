"""A run whose server dies stops with a checkpoint, and goes on from it with a server that was started again."""

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import fit, write_sums
from vllm_of_tests import Server, needs_vllm, wait_at_most, write_model

from hybrid_lightning.callbacks import GracefulStop
from hybrid_lightning.errors import RolloutError
from hybrid_lightning.losses import TokenTruncation
from hybrid_lightning.rollout import VLLMServerSampler


class Kill(Callback):
    def __init__(self, server):
        self.server = server

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            self.server.stop()
            wait_at_most(pl_module.task.generation.sampler, 3)


@needs_vllm
@pytest.mark.filterwarnings("ignore:.*is left out:UserWarning")
def test_a_run_stops_with_a_checkpoint_when_its_server_dies_and_goes_on_with_a_new_one(tmp_path):
    model, sums = write_model(tmp_path / "model"), write_sums(tmp_path / "sums.jsonl")
    server = Server(model, tmp_path / "log.txt")

    def run(steps, *callbacks, ckpt=None):
        sampler = VLLMServerSampler(max_new_tokens=16, urls=[server.url])
        policy = {"sampler": sampler, "rollouts_ahead": 2, "correction": TokenTruncation()}
        return fit(model, sums, tmp_path, *callbacks, policy=policy, ckpt=ckpt, max_steps=steps)

    try:
        with pytest.raises(RolloutError, match=server.url):
            run(400, GracefulStop(), Kill(server))
        (checkpoint,) = tmp_path.rglob("stopped.ckpt")
        made = torch.load(checkpoint, weights_only=False)["global_step"]
        server.start()
        assert made >= 3 and run(made + 2, ckpt=checkpoint).trainer.global_step == made + 2
    finally:
        server.stop()
