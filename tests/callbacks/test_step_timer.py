"""Time passes only where a test lets it, so every logged second is known in advance."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import StartsWithDigit, build_adapter, build_data, build_policy, build_trainer

from hybrid_lightning.callbacks import StepTimer
from hybrid_lightning.callbacks.step_timer import RUN_PHASES, STEP_PHASES
from hybrid_lightning.losses import GRPOLoss, TokenTruncation
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.loader import RolloutSchedule
from hybrid_lightning.training import step_times
from hybrid_lightning.training.module import LanguageModule

GENERATE, REWARD, LOGPROBS, UPDATE, BEFORE, AFTER, VALIDATION, SAVE, SCORE = 64.0, 16.0, 3.0, 8.0, 0.25, 0.5, 20.0, 40.0, 7.0
STEPS = 6
TIME = SimpleNamespace(now=0.0)


@pytest.fixture(autouse=True)
def clock_of_the_test(monkeypatch):
    TIME.now = 0.0
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: TIME.now))


class SlowSampler(Sampler):
    def sample(self, engine, tokenizer, request):
        TIME.now += GENERATE
        return super().sample(engine, tokenizer, request)


class SlowReward(StartsWithDigit):
    def __call__(self, completions, prompts):
        TIME.now += REWARD
        return super().__call__(completions, prompts)


class SlowLoss(GRPOLoss):
    ignores_zero_advantage = False  # so that every micro-batch has rows

    def policy_term(self, inputs, old_logprobs):
        TIME.now += UPDATE
        return super().policy_term(inputs, old_logprobs)


class Slow(Callback):
    """Takes time in hooks of every kind, and keeps what was logged at each step."""

    def __init__(self):
        self.steps, self.tokens, self.validations, self.saves = [], [], 0, 0

    def setup(self, trainer, pl_module, stage):
        TIME.now += SCORE

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        TIME.now += BEFORE

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        TIME.now += AFTER
        if not trainer.fit_loop._should_accumulate():
            names = [name for name in trainer.callback_metrics if name.startswith(("time/", "throughput/"))]
            self.steps.append({name: float(trainer.callback_metrics[name]) for name in names})
            if "num_tokens" in trainer.callback_metrics:
                self.tokens.append((batch.num_tokens, trainer.callback_metrics["num_tokens"].item()))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        TIME.now += VALIDATION
        self.validations += 1

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        TIME.now += SAVE
        self.saves += 1


def run(model, sums, root, *callbacks, ckpt=None, policy=None, data=None, share=0.0, **flags):
    torch.manual_seed(11)
    arguments = {"sampler": SlowSampler(max_new_tokens=6), "reward": SlowReward(), "loss": SlowLoss(), **(policy or {})}
    module = build_policy(model, **arguments)
    plain = module.task.passes.logprobs

    def logprobs(sequences):
        if not torch.is_grad_enabled():
            TIME.now += LOGPROBS
        return plain(sequences)

    module.task.passes.logprobs = logprobs
    timer, slow = StepTimer(), Slow()
    trainer = build_trainer(root, timer, slow, build_adapter(share), *callbacks, **{"max_steps": STEPS, **flags})
    trainer.fit(module, datamodule=data or build_data(sums), ckpt_path=ckpt)
    return timer, slow


def test_each_second_is_logged_once_and_where_it_belongs(model, sums, tmp_path):
    """A rollout has four steps: two minibatches for two epochs. Old log-probabilities are computed once for both epochs."""
    policy = {"minibatches_per_rollout": 2, "epochs_per_rollout": 2}
    timer, slow = run(model, sums, tmp_path, policy=policy, accumulate_grad_batches=2)
    expected = {"generate": GENERATE / 4, "reward": REWARD / 4, "logprobs": 2 * 2 * LOGPROBS / 4, "update": 2 * UPDATE}
    assert len(slow.steps) == STEPS
    for number, step in enumerate(slow.steps):
        whole = {**expected, "other": 2 * (BEFORE + AFTER) - (AFTER if number == 0 else 0.0)}
        times = {f"time/{phase}_s": seconds for phase, seconds in (*whole.items(), ("step", sum(whole.values())))}
        assert {name: value for name, value in step.items() if name.startswith("time/")} == pytest.approx(times)
    for (trained, whole), step in zip(slow.tokens, slow.steps, strict=True):
        rate = trained / (expected["update"] + expected["logprobs"])
        assert step["throughput/trained_tokens_per_second"] == pytest.approx(rate)
        assert step["throughput/tokens_per_second"] == pytest.approx(whole / 4 / step["time/step_s"])
    first = sum(trained for trained, _ in slow.tokens[:2])
    assert slow.steps[0]["throughput/generated_tokens_per_second"] == pytest.approx(first / GENERATE)
    assert sum(timer.totals().values()) == pytest.approx(TIME.now), "every moment is somewhere"


def test_with_rollouts_ahead_seconds_are_those_that_training_waits_and_tokens_those_it_trains_on(model, sums, tmp_path):
    timer, slow = run(model, sums, tmp_path, policy={"rollouts_ahead": 2, "correction": TokenTruncation()})
    assert [step["time/generate_s"] for step in slow.steps] == [3 * GENERATE, *[GENERATE] * 3, 0, 0], "six rollouts in all"
    for (_, whole), step in zip(slow.tokens, slow.steps, strict=True):
        assert step["throughput/tokens_per_second"] == pytest.approx(whole / step["time/step_s"])
        assert "throughput/generated_tokens_per_second" not in step
    assert timer.rates()["tokens_per_second"] * sum(step["time/step_s"] for step in slow.steps) == pytest.approx(
        sum(whole for _, whole in slow.tokens), rel=1e-2
    )


def test_validation_checkpoints_and_scoring_are_no_part_of_a_step(model, sums, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    flags = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": -1, "enable_checkpointing": True}
    data = build_data(sums, validation_fraction=0.3)
    timer, slow = run(model, sums, tmp_path, saver, data=data, share=0.2, **flags)
    totals = timer.totals()
    assert totals.keys() == set(RUN_PHASES) and sum(totals.values()) == pytest.approx(TIME.now)
    assert slow.validations == 3 and slow.saves >= 3
    # Validation generates and scores twice a batch: greedy and sampled.
    assert totals["validation"] == pytest.approx(slow.validations * (VALIDATION + 2 * GENERATE + 2 * REWARD))
    assert totals["checkpoint"] == pytest.approx(slow.saves * SAVE)
    assert totals["startup"] == SCORE and totals["scoring"] >= GENERATE + REWARD, "these rollouts do not count as training"
    assert totals["generate"] == STEPS * GENERATE and totals["reward"] == STEPS * REWARD and totals["logprobs"] == 0
    steps = sum(step["time/step_s"] for step in slow.steps)
    assert steps == pytest.approx(sum(totals[name] for name in STEP_PHASES) - AFTER), "all but the time after the last step"


def test_a_resumed_run_continues_to_add(model, sums, tmp_path):
    """The run stops within a rollout. Steps after the resume still get their shares of its time."""
    policy = {"minibatches_per_rollout": 4}
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    run(model, sums, tmp_path, saver, policy=policy, max_steps=2, enable_checkpointing=True)
    TIME.now = 0.0
    timer, slow = run(model, sums, tmp_path, policy=policy, max_steps=8, ckpt=tmp_path / "step=2.ckpt")
    assert [step["time/generate_s"] for step in slow.steps] == [GENERATE / 4] * 6
    assert slow.steps[0]["throughput/generated_tokens_per_second"] > 0
    # Two micro-batches, and the part of the checkpoint that came before its callbacks' states.
    before = SCORE + GENERATE + REWARD + 3 * LOGPROBS + 2 * (BEFORE + UPDATE + AFTER)
    assert sum(timer.totals().values()) == pytest.approx(before + TIME.now)
    assert timer.totals()["generate"] == 2 * GENERATE and timer.totals()["update"] == 8 * UPDATE
    assert timer.totals()["scoring"] == 0, "LoRA everywhere needs no scores"
    assert timer.rates()["trained_tokens_per_second"] == pytest.approx(
        timer.rates()["generated_tokens_per_second"] * 2 * GENERATE / (8 * UPDATE + 6 * LOGPROBS)
    ), "after whole rollouts every generated token has been trained on once"


def test_values_are_means_over_processes_and_rates_count_all_of_them():
    def reduce(values, reduce_op):
        assert reduce_op == "mean" and values.dim() == 1, "one reduction a step"
        return (values + torch.tensor([4.0, 2.0, 0.0, 6.0, 2.0, 100.0, 300.0])) / 2

    timer = StepTimer()
    timer.clock.seconds = lambda: {"generate": 2.0, "reward": 2.0, "update": 6.0, "other": 0.0}
    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    mask = torch.ones(1, 60, dtype=torch.bool)  # 50 of them were sampled
    sequences = SimpleNamespace(completion_mask=mask, sampled_mask=mask[:, :50], prompt_mask=mask[:, :40])
    schedule = RolloutSchedule(1, 1, minibatches_per_rollout=2)
    module = Mock(spec=LanguageModule, task=SimpleNamespace(schedule=schedule))
    batch = SimpleNamespace(rollout=SimpleNamespace(sequences=sequences))
    values = timer._measure_step(SimpleNamespace(world_size=2, strategy=strategy), module, batch)
    times = {"generate": 1.5, "reward": 1.0, "logprobs": 0.0, "update": 6.0, "other": 1.0, "step": 9.5}
    assert {f"time/{name}_s": value for name, value in times.items()}.items() <= values.items()
    assert values["throughput/generated_tokens_per_second"] == pytest.approx((50 + 100) / 3)
    assert values["throughput/tokens_per_second"] == pytest.approx((100 + 300) / 2 / 9.5)
