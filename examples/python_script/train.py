"""Training without the command line: python train.py [SEED]."""

import sys

from hybrid_lightning.process import prepare_process

prepare_process()  # before torch is imported: waiting threads soon sleep

import lightning
from lightning.pytorch.loggers import TensorBoardLogger
from my_reward import right  # in a file of its own, so that checkpoints can name it

from hybrid_lightning import GSPOLoss, HybridAdapterSetup, PolicyModule, PromptDataModule, Sampler
from hybrid_lightning.data import PlainFormat, RowsSource
from hybrid_lightning.trainer import run_callbacks
from hybrid_lightning.training import LinearSchedule


class ShareWorked(lightning.Callback):
    """Every ten steps, prints how many completions of the last rollout work the answer out."""

    def on_train_batch_end(self, trainer, policy, outputs, batch, batch_idx):
        """`batch.rollout` has the completions, their rewards and advantages."""
        if trainer.global_step % 10 == 0:
            texts, rewards = batch.rollout.completions, batch.rollout.rewards.total
            share = sum(text.startswith("[") for text in texts) / len(texts)
            print(f"step {trainer.global_step}: worked out {share:.0%}, reward {rewards.mean():.2f}")


seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
lightning.seed_everything(seed)
rows = [{"question": f"{a}*{b}=", "answer": a * b} for a in range(100, 1000, 7) for b in range(2, 10)]
data = PromptDataModule(RowsSource(rows, validation_fraction=0.1), PlainFormat(), eval_batch_size=128)
policy = PolicyModule(
    loss=GSPOLoss(),
    reward=right,
    sampler=Sampler(max_new_tokens=20),
    prompts_per_rollout=32,
    minibatches_per_rollout=2,
    lr_full=3e-4,
    lr_lora=3e-3,
    schedule=LinearSchedule(warmup_steps=5, final_factor=0.1),
    seed=seed,
)
trainer = lightning.Trainer(
    accelerator="cpu",
    max_steps=30,
    gradient_clip_val=1.0,
    check_val_every_n_epoch=None,
    val_check_interval=10,
    num_sanity_val_steps=-1,  # measures the accuracy before training
    log_every_n_steps=1,
    enable_progress_bar=False,
    logger=TensorBoardLogger("runs", "python_script"),
    callbacks=[*run_callbacks(), HybridAdapterSetup(rank=8, alpha=16), ShareWorked()],
)
trainer.fit(policy, datamodule=data)
print(policy.generate(data.validation_prompts[:4], greedy=True).completions)
