"""Episodes as they are played, trained on, measured and written, with a tiny policy and environments of the tests."""

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_calibration import assert_same_gradient, calibrate, mean_gradient
from tiny_models import build_model, plain_logprobs, tokens_of
from tiny_runs import InTwoRows, Log, OftenDone, Talk, build_data, build_policy, build_trainer, fit, trained
from torch.nn.utils.rnn import pad_sequence

from hybrid_lightning.advantages import LeaveOneOutAdvantage
from hybrid_lightning.callbacks import PredictionWriter, RolloutSamples
from hybrid_lightning.environments import EpisodeLimits, Failure, RunningEpisodes, Step
from hybrid_lightning.episodes.episodes import episode_metrics
from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.losses import DAPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss, GSPOTokenLoss
from hybrid_lightning.rollout import DynamicSampling, sampler
from hybrid_lightning.rollout.rng import PromptDraws, evaluation_draws
from hybrid_lightning.training import PolicyModule
from hybrid_lightning.training.sampled_groups import rollout_metrics
from hybrid_lightning.types import Prompt, Sequences

PROMPTS = [Prompt(text="3+4=", index=0), Prompt(text="12*3=", index=1, columns={"seed": 77})]


def arguments(environment=None, max_new_tokens=5, **limits):
    return {
        "reward": None,
        "turn_template": "{content}",
        "sampler": OftenDone(max_new_tokens),
        "environment": environment or Talk(),
        "episodes": EpisodeLimits(**{"max_tokens": 60, **limits}),
    }


@pytest.fixture(scope="module")
def play(model):
    def run(environment, *, samples=3, greedy=False, **options):
        policy = build_policy(model, **arguments(environment, **options))
        generator = None if greedy else PromptDraws(PROMPTS, samples, 5)
        return policy, policy.generate(PROMPTS, samples, generator, greedy)

    return run


def test_each_episode_is_what_was_sampled_and_what_was_added_in_one_row(play):
    policy, rollouts = play(Talk())
    sequences, tokenizer = rollouts.sequences, policy.tokenizer
    assert len({completion.episode.end for completion in rollouts.completions}) > 1
    for row, completion in enumerate(rollouts.completions):
        episode, (prompt, ids) = completion.episode, tokens_of(sequences, row)
        sampled = sequences.sampled_mask[row, : len(ids)].tolist()
        assert tokenizer.decode(prompt) == PROMPTS[row // 3].text + episode.messages[1]["content"]
        texts = {True: [], False: []}
        for own, span in groupby(zip(ids, sampled, strict=True), itemgetter(1)):
            texts[own].append(tokenizer.decode([token for token, _ in span], skip_special_tokens=True))
        said = [message["content"] for message in episode.messages if message["role"] == "assistant"]
        heard = [message["content"] for message in episode.messages[2:] if message["role"] == "user"]
        assert texts[True] == said and str(completion) == "\n".join(said) and episode.turns == len(said)
        assert texts[False] == heard[: len(said) - 1], "the last answer is shown, but not read"
        assert completion.num_tokens == sum(sampled) == int(sequences.sampled_mask[row].sum())
        true = plain_logprobs(policy.model, sequences, row)
        expected = torch.where(torch.tensor(sampled), true, 0.0)
        torch.testing.assert_close(rollouts.sampling_logprobs[row, : len(ids)], expected, atol=1e-5, rtol=1e-5)


def test_all_episodes_of_a_group_get_one_seed_and_a_row_can_have_its_own(play):
    rollouts = play(Talk())[1]
    begun = [completion.episode.messages[1]["content"] for completion in rollouts.completions]
    assert begun[:3] == [begun[0]] * 3 and begun[3:] == ["go7"] * 3
    policy, greedy = play(Talk(), samples=1, greedy=True)
    sampled = policy.generate(PROMPTS, 2, evaluation_draws(PROMPTS, 2, policy.task.seed))
    with pytest.raises(RolloutError, match="started episodes of the data row 0 differently with the same seed"):
        play(Talk(broken="begins"))
    assert greedy.completions[0].episode.messages[1] == sampled.completions[0].episode.messages[1], "in an evaluation too"


class AtOnce(Talk):
    """Adds nothing, pays for the length of the one message, and counts as we do."""

    def start(self, prompt, seed):
        return ()

    def step(self, message):
        return Step((), float(len(message["content"])), True, counts={"end/answered": 5, "turns": 9, "seen": 2})


def test_an_episode_of_one_turn_is_todays_completion_to_the_bit(model, play):
    # 16: attention without a kernel for heads of this size takes keys in multiples of 16, or as many as may come.
    rollouts = play(AtOnce(), max_new_tokens=16)[1]
    plain = build_policy(model, sampler=OftenDone(max_new_tokens=16)).generate(PROMPTS, 3, PromptDraws(PROMPTS, 3, 5))
    for name, value in vars(plain.sequences).items():
        assert torch.equal(getattr(rollouts.sequences, name), value), name
    assert torch.equal(rollouts.sampling_logprobs, plain.sampling_logprobs)
    assert [str(c) for c in rollouts.completions] == [str(c) for c in plain.completions]
    cut = ~plain.finished.flatten()
    assert torch.equal(rollouts.finished, plain.finished)
    assert [c.episode.end for c in rollouts.completions] == ["tokens" if of_row else "over" for of_row in cut]
    metrics = episode_metrics(rollouts.completions)  # the environment's counts replace none of these
    assert metrics["episodes/end/answered"] == 0 and metrics["episodes/turns"] == 1 and metrics["episodes/seen"] > 0


def test_every_bound_ends_an_episode_with_its_reason_and_an_answer_that_does_not_fit_is_cut(play):
    ends = lambda **options: Counter(c.episode.end for c in play(Talk(9), **options)[1].completions)  # noqa: E731
    assert ends(max_turns=2, max_new_tokens=30)["turns"] and ends(max_new_tokens=1)["tokens"]
    _, rollouts = play(Talk(9, length=9), max_tokens=24, max_new_tokens=12, too_long="end")
    assert "tokens" in {c.episode.end for c in rollouts.completions}
    assert rollouts.sequences.completion_mask.sum(dim=1).max() <= 24
    completions = play(Talk(9, length=500), max_tokens=50, max_new_tokens=8, max_turns=4)[1].completions
    cut = [c for c in completions if c.episode.counts.get("cut_answers")]
    assert cut and all("[cut]" in c.episode.messages[3]["content"] for c in cut)
    assert any(c.episode.turns > 1 for c in cut), "the policy has room for an answer"


class Digits(Talk):
    """Answers with many digits, which the embedded policy's tokenizer has, and letters it has not."""

    def start(self, prompt, seed):
        return ()

    def step(self, message):
        return Step([{"role": "user", "content": "7" * 500}])


def test_an_answer_is_cut_without_a_mark_where_the_tokenizer_cannot_write_it():
    policy = build_policy("embedded", **arguments(Digits(), max_tokens=40, max_turns=3, max_new_tokens=8))
    prompts = PROMPTS[1:]
    completions = policy.generate(prompts, 8, PromptDraws(prompts, 8, 5)).completions
    cut = [c.episode.messages[2]["content"] for c in completions if c.episode.counts.get("cut_answers")]
    assert cut and all(len(text) < 40 and set(text) == {"7"} for text in cut)


def test_masking_leaves_out_what_a_limit_of_tokens_ended_and_no_other_end(play):
    policy, rollouts = play(Talk(9), samples=8, max_turns=2, max_new_tokens=4)
    masking, ends = policy.task, [completion.episode.end for completion in rollouts.completions]
    assert set(ends) == {"turns", "tokens"} and not rollouts.finished.any()
    masking.options = replace(masking.options, mask_truncated_completions=True)
    learned = masking.rows_of_loss(masking.generation.score(rollouts)).sampled_mask.any(dim=1).tolist()
    assert learned == [end == "turns" for end in ends]


def test_a_failed_episode_is_left_out_of_its_group_and_too_many_end_the_run(play, capsys):
    policy, rollouts = play(Talk(broken="fails"), samples=8, max_new_tokens=20, max_failed_share=1.0)
    failed = torch.tensor([c.episode.end == "failed" for c in rollouts.completions])
    scored = policy.task.generation.score(rollouts)
    assert 0 < failed.sum() < len(failed)
    assert torch.equal(scored.rewards.counted.flatten(), ~failed) and not rollouts.sequences.sampled_mask[failed].any()
    advantages = policy.task.options.advantage.of_rewards(scored.rewards)
    assert not advantages.flatten()[failed].any() and advantages.flatten()[~failed].any()
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[])
    lost = replace(scored.rewards, counted=torch.zeros_like(scored.rewards.counted))
    scored = replace(scored, rewards=lost, advantages=advantages)
    RolloutSamples(1).on_rollout(trainer, SimpleNamespace(rollout=scored, rollout_number=0))
    assert "An episode of rollout 1, left out:" in capsys.readouterr().out, "not with a reward of 0"
    with pytest.raises(RolloutError, match=r"max_failed_share.*the board is gone"):
        play(Talk(broken="fails"), samples=8, max_new_tokens=20, max_failed_share=0.0)


def test_an_episode_that_fails_before_its_first_turn_is_hardly_sampled(play, monkeypatch):
    start, decode, lengths = RunningEpisodes.start, sampler._Decoder.decode, []

    def decoded(*arguments):
        found = decode(*arguments)
        lengths.append(found[1].sum(dim=1).tolist())
        return found

    async def started(running, number, *given):
        return await start(running, number, *given) if number else Failure("no board")

    monkeypatch.setattr(RunningEpisodes, "start", started)
    monkeypatch.setattr(sampler._Decoder, "decode", decoded)
    completions = play(Talk(), max_new_tokens=20)[1].completions
    assert [completion.episode.end == "failed" for completion in completions] == [True] + 5 * [False]
    assert lengths[0][0] == 1 and max(lengths[0]) > 1


def test_a_run_trains_on_what_was_sampled_alone_and_episodes_are_shown_measured_and_written(model, sums, tmp_path, capsys):
    log = Log()
    policy = fit(model, sums, tmp_path, log, RolloutSamples(1), policy=arguments(), max_steps=2)
    screen = capsys.readouterr().out
    assert "An episode of rollout 2, reward " in screen and "\n  assistant: " in screen and "\n  user: n" in screen
    metrics = log.metrics[-1]
    ends = [value for name, value in metrics.items() if name.startswith("episodes/end/")]
    assert sum(ends) == pytest.approx(1) and metrics["episodes/turns"] > 1 and metrics["episodes/heard"] > 0
    assert metrics["reward"] == pytest.approx(metrics["episodes/return"]) and metrics["grad_norm/lora"] > 0
    batch = log.batches[0].sequences
    assert (batch.completion_mask & ~batch.sampled_mask).any()
    assert metrics["completions/mean_length"] < float(batch.completion_mask.sum(dim=1).float().mean())
    path = tmp_path / "out.jsonl"
    build_trainer(tmp_path, PredictionWriter(str(path))).predict(policy, datamodule=build_data(sums, test_fraction=0.5))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["sample"] for line in lines if line["sample"] is not None) == [0] * 8 + [1] * 8 and len(lines) == 3 * 8
    for line in lines:
        assert len(line["completion_ids"]) == len(line["sampled"]) == len(line["logprobs"])
        assert any(message["role"] == "assistant" for message in line["messages"])
        assert all((value != 0) == own for value, own in zip(line["logprobs"], line["sampled"], strict=True))
        assert line["reward"] == pytest.approx(sum(line["turn_rewards"])) and line["end"]


def test_resume_is_bit_exact(model, sums, tmp_path):
    def run(folder, ckpt=None):
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        policy = {**arguments(), "credit": "turn", "minibatches_per_rollout": 2}
        return trained(fit(model, sums, folder, saves, policy=policy, max_steps=4, enable_checkpointing=True, ckpt=ckpt))

    whole = run(tmp_path / "whole")
    for step in (1, 2):  # the first between two minibatches of a rollout
        resumed = run(tmp_path / "resumed", tmp_path / f"whole/step={step}.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


# ---- credit by turn


def turn_advantages(rollouts):
    """An advantage for each sampled token, {(row, place): value}, with the mean over the others that have its turn."""
    episodes, found = [completion.episode for completion in rollouts.completions], {}
    samples = rollouts.group_size
    for row, episode in enumerate(episodes):
        others = [other for other in range(row // samples * samples, (row // samples + 1) * samples) if other != row]
        turn, was_sampled = -1, False
        for place, sampled in enumerate(rollouts.sequences.sampled_mask[row].tolist()):
            turn, was_sampled = turn + (sampled and not was_sampled), sampled
            to_go = [sum(episodes[other].rewards[turn:]) for other in others if episodes[other].turns > turn]
            if sampled:
                found[row, place] = sum(episode.rewards[turn:]) - sum(to_go) / len(to_go) if to_go else 0.0
        assert turn == episode.turns - 1
    return found


def by_turn(loss, environment=None, **options):
    return {**arguments(environment), "loss": loss, "credit": "turn", "advantage": LeaveOneOutAdvantage(), **options}


class ByTurn(Log):
    """Also computes the first step's gradient token by token, with the advantage of each token's turn."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rollouts, loss = in_one_row(batch.rollout), pl_module.task.loss
        advantages, lengths = turn_advantages(rollouts), rollouts.sequences.sampled_mask.sum(dim=1)
        assert torch.equal(rollouts.lengths.flatten(), lengths) and len({round(value, 5) for value in advantages.values()}) > len(
            lengths
        )
        value = 0.0
        for row, length in enumerate(lengths):
            logprobs = plain_logprobs(pl_module.model, rollouts.sequences, row)
            weight = 1 / (len(lengths) * (60 if isinstance(loss, DrGRPOLoss) else length))
            value -= weight * sum(advantages.get((row, place), 0.0) * logprob for place, logprob in enumerate(logprobs))
        named = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self.expected = dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


def in_one_row(rollout):
    """Undo `in_two_rows`: its second rows repeat the first ones in their prompts."""
    first = torch.tensor([rollout.first_row(number) for number in range(len(rollout.completions))])
    rows = [(rollout.episode_of_row == number).nonzero().flatten().tolist() for number in range(len(first))]
    joined = {}
    for name in ("completion_ids", "completion_mask", "sampled_mask"):
        of_rows = [
            value[mask] for value, mask in zip(getattr(rollout.sequences, name), rollout.sequences.completion_mask, strict=True)
        ]
        joined[name] = pad_sequence([torch.cat([of_rows[row] for row in own]) for own in rows], batch_first=True)
    prompts = {name: getattr(rollout.sequences, name)[first] for name in ("prompt_ids", "prompt_mask")}
    return replace(rollout, sequences=Sequences(**prompts, **joined), episode_of_row=torch.arange(len(first)))


# What each loss makes of advantages of tokens: `tests/losses/test_each_loss.py`.
@pytest.mark.parametrize("kind", [PolicyModule, InTwoRows])
@pytest.mark.parametrize("loss", [GSPOTokenLoss, DrGRPOLoss])
def test_the_tokens_of_a_turn_are_weighed_by_what_it_and_later_ones_earn(model, sums, tmp_path, loss, kind):
    found = ByTurn()
    fit(model, sums, tmp_path, found, policy=by_turn(loss(), max_tokens_per_micro_batch=60, kind=kind), max_steps=1)
    assert (len(found.batches[0].rollout.sequences) > 16) == (kind is InTwoRows)
    assert not any(batch.advantages[~batch.sequences.sampled_mask].any() for batch in found.batches)
    scale = max(float(gradient.abs().max()) for gradient in found.expected.values())
    for name, gradient in found.gradients[0].items():
        torch.testing.assert_close(gradient, found.expected[name], atol=1e-4 * scale, rtol=0, msg=name)


def test_modules_are_scored_by_the_same_credit(model, sums):
    policy, rollouts, losses = calibrate(model, sums, **by_turn(DAPOLoss()))
    base, advantages = build_model("llama", std=0.1).requires_grad_(True), turn_advantages(rollouts)
    rows = [plain_logprobs(base, rollouts.sequences, row) for row in range(len(rollouts.completions))]
    total = sum(advantage * rows[row][place] for (row, place), advantage in advantages.items())
    assert len(losses) > 2
    assert_same_gradient(mean_gradient(policy, losses), -total / rollouts.sequences.sampled_mask.sum(), base)


def test_episodes_of_one_turn_are_trained_alike_by_both_credits(model, sums, tmp_path):
    runs = [{**arguments(AtOnce()), "credit": credit, "dynamic_sampling": DynamicSampling(1)} for credit in ("episode", "turn")]
    one, other = (trained(fit(model, sums, tmp_path / run["credit"], policy=run, max_steps=2)) for run in runs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


class NowOrLater(Talk):
    """Pays 1 in the first turn or in the second."""

    def step(self, message):
        answer = super().step(message)
        first = len(message["content"]) % 2
        self.paid = first if self.said == 1 else 1 - self.paid
        return Step(answer.messages, float(self.paid), self.said == 2)


def test_a_group_with_tied_returns_teaches_by_turn_what_was_left_to_earn(model):
    # Enough tokens that few messages are cut, and nearly all returns are 1.
    policy = build_policy(model, **arguments(NowOrLater(), 30))
    prompts = [Prompt(text=f"{number}+1=", index=number) for number in range(8)]
    rollouts = policy.generate(prompts, 3, PromptDraws(prompts, 3, 5))
    rollouts, useful = policy.task.generation.score(rollouts), {}
    for credit in ("episode", "turn"):
        policy.task.options = replace(policy.task.options, credit=credit)
        of_groups = useful[credit] = policy.task.useful_groups(rollouts)
        metrics = rollout_metrics(rollouts, policy.task.credit(rollouts))
        assert metrics["frac_reward_zero_std"] == pytest.approx(1 - float(of_groups.float().mean()))
    assert not (useful["episode"] & ~useful["turn"]).any() and useful["turn"].sum() > useful["episode"].sum()


@pytest.mark.filterwarnings("ignore:nothing is learned from .* of a rollout's groups")
def test_a_failed_episode_is_in_no_turn(model, sums, tmp_path):
    policy = by_turn(GRPOLoss(), Talk(broken="fails"), dynamic_sampling=DynamicSampling(1))
    policy["episodes"] = EpisodeLimits(max_tokens=60, max_failed_share=1.0)
    log = Log()
    fit(model, sums, tmp_path, log, policy=policy, max_steps=1)
    shown, counted = log.batches[0].rollout.advantages, log.batches[0].rollout.rewards.counted
    assert not counted.all() and counted.any() and shown.any() and not shown[~counted].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"credit": "turn"}, r"credit=turn needs model\.environment, which is not set; set it, or set cr"),
        (by_turn(GSPOLoss()), r"GSPOLoss takes one advantage per sequence, but model\.credit=turn .*GSPOTokenLoss"),
        ({**by_turn(GRPOLoss()), "credit": "turns"}, r"model\.credit='turns'; give episode or turn"),
        ({"turn_template": "{content}"}, r"model\.turn_template needs model\.environment or model\.agent, and neither is set"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        build_policy(model, **options)
