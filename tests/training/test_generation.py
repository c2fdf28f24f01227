"""Completions that are made elsewhere while the policy is trained: the same numbers as in turns, and nothing left over."""

import copy
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from tiny_runs import DigitShare, Log, Talk, build_data, build_policy, fit, trained

from hybrid_lightning.environments import EpisodeLimits, running
from hybrid_lightning.environments.objects import Objects
from hybrid_lightning.losses import GRPOLoss, SequenceMask, TokenMask, TokenTruncation
from hybrid_lightning.rollout import Sampler
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import Session, WeightedEngine
from hybrid_lightning.runner import token_logprobs
from hybrid_lightning.types import Prompt


class Elsewhere(WeightedEngine, Sampler):
    """Plays in threads, by a copy of the policy as it is when it is given weights."""

    is_remote = True

    def __init__(self, max_new_tokens=6):
        super().__init__(max_new_tokens)
        self.engine = self.own = None
        self.requests, self.running, self.at_update = 0, 0, []
        self.threads, self.lock = ThreadPoolExecutor(3), threading.Lock()
        self.seeds = []  # of the rollouts that were begun

    def __reduce__(self):  # as of `VLLMEngine`
        return type(self), (self.max_new_tokens,)

    def update(self, weights, model, everything=None, keeps_requests=False):
        if self.version != weights.version:
            self.at_update.append(self.running)
            with self.lock:
                self.copy_of(self.engine)
                self.version = weights.version

    def prompt_logprobs(self, token_ids):
        nothing = Future()
        nothing.set_result([])
        return nothing

    def copy_of(self, engine):
        self.engine, self.own = engine, engine and engine.of(copy.deepcopy(engine.model), is_copy=True)

    def sample(self, engine, tokenizer, request):
        with self.lock, torch.no_grad(), self.own.sampling():
            self.own.model.eval()
            self.requests += 1
            found = super().sample(self.own, tokenizer, request)
            made_by = torch.full_like(found.sequences.completion_ids, self.version.step)
        time.sleep(0.03)  # long enough for an update that does not wait
        return replace(found, sequences=replace(found.sequences, weights_step=made_by))

    def session(self, *arguments):
        return Session(self, *arguments)

    def play(self, engine, tokenizer, request, *arguments):
        if engine is not self.engine:  # nothing has been trained yet
            self.copy_of(engine)
        self.seeds.append(request.draws._seed if isinstance(request.draws, PromptDraws) else None)
        self.running += 1

        def play():
            try:
                super(Elsewhere, self).play(engine, tokenizer, request, *arguments)
            finally:
                self.running -= 1

        made = self.threads.submit(play)
        return RolloutFuture(made.result, made, on_cancel=made.cancel)


class Patient(Elsewhere):
    """Of a rollout that is under way over an update, begins the first turn before it and later ones only after it."""

    first_turns = 0

    def sample(self, engine, tokenizer, request):
        rollout, is_later = self.seeds.index(request.draws._seed), "turn" in request.draws._names[0]
        if is_later and rollout in range(2, len(LAGS) - 1):
            self.wait(lambda: self.version.step >= rollout - 1)
        found = super().sample(engine, tokenizer, request)
        with self.lock:
            self.first_turns += not is_later
        return found

    def update(self, *arguments, **options):
        self.wait(lambda: self.first_turns == len(self.seeds))
        super().update(*arguments, **options)

    def wait(self, reached):
        until = time.monotonic() + 60
        while not reached() and time.monotonic() < until:
            time.sleep(0.005)


class Weights(Callback):
    """Keeps each step's weights."""

    def on_train_start(self, trainer, pl_module):
        self.weights = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append(trained(pl_module))


class Here(Objects):
    """In place of processes, which take seconds to start."""

    def kill(self):
        pass


def in_this_process(environment, count, *told):
    return [Here(environment, *told)]


def metrics_of(log):
    """Without times, and what an engine alone has."""
    left_out = "time/", "throughput/", "sampling/weights_up", "sampling/waited", "sampling/engine", "sampling/weights_versions"
    return [{name: value for name, value in step.items() if not name.startswith(left_out)} for step in log.metrics]


@pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning")
@pytest.mark.parametrize(("ahead", "correction", "turns"), [(0, None, 1), (2, SequenceMask(), 1), (1, TokenMask(), 3)])
def test_a_run_with_completions_made_meanwhile_equals_the_same_schedule_in_turns(
    model, sums, tmp_path, ahead, correction, turns, monkeypatch
):
    monkeypatch.setattr(running, "workers_for", in_this_process)

    def run(sampler):
        policy = {"sampler": sampler, "rollouts_ahead": ahead, "correction": correction, "minibatches_per_rollout": 2}
        log = Log()
        policy |= {"loss": GRPOLoss(kl_coef=0.1), "reward": DigitShare(), "optimizer": torch.optim.SGD}
        if turns > 1:
            episodes = EpisodeLimits(max_turns=turns, max_tokens=24, workers=int(sampler is elsewhere))
            policy |= {"environment": Talk(), "episodes": episodes, "turn_template": "{content}", "reward": None}
        weights = trained(fit(model, sums, tmp_path, log, policy=policy, max_steps=6))
        return metrics_of(log), weights

    elsewhere = Elsewhere()
    (there, weights), (here, expected) = run(elsewhere), run(Sampler(6))
    assert len(there) == len(here) == 6
    for one, other in zip(there, here, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5), "rounding in float32"
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-5)
    assert ahead > 1 or not any(elsewhere.at_update), "with one ahead no completion has tokens by two versions of the weights"
    lags = [step["sampling/weights_version_lag"] for step in there]
    assert lags == {0: [0, 1, 0, 1, 0, 1], 1: [0, 1, 2, 3, 2, 3], 2: [0, 1, 2, 3, 4, 5]}[ahead]
    assert max(step["sampling/logp_difference/max"] for step in here[:1]) < 1e-5
    if ahead:  # the alarm for weights that did not arrive, with the lag in it
        assert here[-1]["sampling/logp_difference/max"] > 1e-3
    assert 3 <= elsewhere.requests <= 3 * turns, "none for a rollout that is not trained on"


class Seen(DigitShare):
    """Scores as completions arrive, and tells when it has been called in another thread."""

    apart = threading.Event()

    def __init__(self, overlap=True):
        self.overlap = overlap
        self.apart.clear()

    def overlaps(self, prompt):
        return self.overlap

    def __call__(self, completions, prompts):
        if threading.current_thread() is not threading.main_thread():
            self.apart.set()
        return super().__call__(completions, prompts)


@pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning", "ignore:Talk gives rewards:UserWarning")
@pytest.mark.parametrize(("engine", "ahead", "turns"), [(Elsewhere, 1, 1), (Sampler, 0, 2)])
def test_rewards_of_arriving_completions_equal_the_whole_rollouts(model, sums, tmp_path, engine, ahead, turns):
    def run(reward):
        log, policy = Log(), {"sampler": engine(6), "rollouts_ahead": ahead, "reward": reward}
        if turns > 1:
            episodes = EpisodeLimits(max_turns=turns, max_tokens=16)
            policy |= {"environment": Talk(), "episodes": episodes, "turn_template": "{content}"}
        weights = trained(fit(model, sums, tmp_path, log, policy=policy, max_steps=2))
        return metrics_of(log), weights

    (expected, same), (found, weights) = run(Seen(overlap=False)), run(Seen())
    assert Seen.apart.is_set()
    rounding = 0 if engine is Sampler else 1e-3  # of float32, in threads
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=rounding, abs=rounding / 100)
    torch.testing.assert_close(weights, same, rtol=rounding, atol=rounding / 100)


def test_completions_are_scored_while_others_are_still_generated(model):
    seen, policy = [], build_policy(model, reward=Seen(), sampler=Sampler(12))
    prompts = [Prompt(text=f"{number}+1=", index=number) for number in range(8)]

    def listener(running, decoded, longest):
        if running < 32 and not seen:
            seen.append(Seen.apart.wait(20))

    policy.run.listeners.append(listener)
    arriving = policy.task.generation.arriving(prompts, 4)
    rollouts = policy.task.generation.generate(prompts, 4, torch.Generator().manual_seed(0), on_completion=arriving.on_completion)
    assert seen == [True]
    early, late = (policy.task.generation.score(rollouts, *given) for given in ((arriving,), ()))
    assert torch.equal(early.scored.total, late.scored.total)


def test_validation_is_by_the_weights_of_now(model, sums, tmp_path):
    elsewhere = Elsewhere()
    policy = {"sampler": elsewhere, "rollouts_ahead": 1, "correction": TokenTruncation()}
    data = build_data(sums, validation_fraction=0.25)
    fit(model, sums, tmp_path, policy=policy, data=data, max_steps=3, val_check_interval=1)
    assert elsewhere.at_update == [0] * 4, "once for the rollouts of the start, and after each step"


# Of each rollout, in optimizer steps: of its first turn, and of later ones. Three are begun before the first is trained on.
LAGS = [(0, 0), (1, 1), (2, 1), (2, 1), (2, 1), (2, 2)]


@pytest.mark.filterwarnings("ignore:.*give --model.correction:UserWarning")
def test_turns_after_an_update_are_by_the_new_weights_and_each_token_says_which_made_it(model, sums, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "workers_for", in_this_process)
    log, kept, episodes = Log(), Weights(), EpisodeLimits(max_turns=2, max_tokens=24, workers=1)
    policy = {"environment": Talk(), "episodes": episodes, "turn_template": "{content}", "reward": None}
    policy |= {"sampler": Patient(), "rollouts_ahead": 2, "optimizer": torch.optim.SGD, "lr_lora": 1.0, "lr_full": 1.0}
    module = fit(model, sums, tmp_path, log, kept, policy=policy, max_steps=len(LAGS))
    found, moved = [], 0.0
    logprobs = []  # of each batch by the weights of each step
    for weights in kept.weights:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[name])
            logprobs.append([token_logprobs(module.policy.runner, batch.sequences, 1.0)[0] for batch in log.batches])
    for number, batch in enumerate(log.batches):
        sampled, step = batch.sequences.sampled_mask, batch.sequences.weights_step
        expected = torch.zeros_like(batch.sampling_logprobs)
        for of_step in range(number + 1):
            expected = torch.where(step == of_step, logprobs[of_step][number], expected)
        torch.testing.assert_close(batch.sampling_logprobs[sampled], expected[sampled], atol=1e-4, rtol=0)
        moved = max(moved, float((logprobs[0][number] - expected)[sampled].abs().max()))
        two_turns = (batch.sequences.completion_mask & ~sampled).any(dim=1)
        assert two_turns.any()
        pairs = {(int(row[mask][0]), int(row[mask][-1])) for row, mask in zip(step[two_turns], sampled[two_turns], strict=True)}
        found += [tuple(number - of_turn for of_turn in pair) for pair in pairs]
    assert found == LAGS and moved > 0.01
    assert [step["sampling/weights_versions"] > 1 for step in log.metrics] == [first > later for first, later in LAGS]
