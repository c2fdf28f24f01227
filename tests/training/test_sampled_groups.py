"""Groups of equal rewards are replaced: what is sampled, trained on, logged and shown, and that a run resumes bit for bit."""

import statistics
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import Constant, DigitShare, Log, StartsWithDigit, build_policy, fit, trained, write_sums

from hybrid_lightning.advantages import BatchStdAdvantage, GroupAdvantage, GroupMeanAdvantage
from hybrid_lightning.rewards import OverlongPenalty, WeightedSum
from hybrid_lightning.rollout.batching import pad_left, pad_right
from hybrid_lightning.rollout.dynamic_sampling import DynamicSampling
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.training import sampled_groups
from hybrid_lightning.training.sampled_groups import rollout_metrics, rows_to_train, sample_groups, with_advantages
from hybrid_lightning.types import Completion, Episode, Prompt, Rewards, Rollout, Sequences


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("dynamic") / "sums.jsonl", 20)


# ---- groups of made rewards


def made(prompts):
    """Two completions a prompt: of prompt i, i + 1 tokens that are i, every other one sampled; prompts of odd index earn 1 and 0,
    the others a tie.
    """
    index = [prompt.index for prompt in prompts for _ in range(2)]
    sequences = Sequences(*pad_left([[i] for i in index], 0, "cpu"), *pad_right([[i] * (i + 1) for i in index], 0, "cpu"))
    every_other = torch.arange(sequences.completion_ids.shape[1]) % 2 == 0
    sequences = replace(sequences, sampled_mask=sequences.completion_mask & every_other)
    total = torch.tensor([[0.0, float(prompt.index % 2)] for prompt in prompts])
    texts, logprobs = (Completion("", 1, True),) * len(index), -sequences.completion_ids.float()
    return Rollout(tuple(prompts), texts, sequences, logprobs, rewards=Rewards(total, {"match": total}, total >= 1))


def teaches(rollout):
    return torch.tensor([prompt.index % 2 == 1 for prompt in rollout.prompts])


def sampled(first, then, bound=3):
    """The first prompts, and prompts that are drawn one after the other -> all groups, and the sizes of draws."""
    asked, rest = [], iter(then)

    def draw(count):
        asked.append(count)
        return [Prompt(text="", index=next(rest)) for _ in range(count)]

    prompts = [Prompt(text="", index=index) for index in first]
    return sample_groups(DynamicSampling(bound), made(prompts), draw, made, teaches), asked


def to_train(rollout, estimator=None, credited=None):
    """The rollout with advantages, and the share of four groups that is trained on."""
    rollout = with_advantages(rollout, credited or rollout.rewards, estimator or GroupAdvantage(), wanted=4)
    return rollout, rows_to_train(rollout, rollout.sequences, wanted=4, minibatches=1, rank=0)


def test_the_groups_that_teach_are_kept_with_their_tokens_in_order():
    rollout, asked = sampled([2, 1, 4, 6], [8, 3, 10, 5, 7, 12, 14, 16, 18])
    # One of four teaches, so that three missing ones need all of P; then three of eight, and one is missing: 2.7 prompts.
    assert asked == [4, 3] and [prompt.index for prompt in rollout.prompts] == [2, 1, 4, 6, 8, 3, 10, 5, 7, 12, 14]
    rollout, trained = to_train(rollout)
    rows, index = trained.sequences, trained.sequences.prompt_ids
    assert index[:, 0].tolist() == [1, 1, 3, 3, 5, 5, 7, 7] and torch.equal(rows.completion_mask, rows.completion_ids == index)
    assert torch.equal(rows.completion_mask.sum(dim=1), index[:, 0] + 1)
    assert torch.equal(rows.sampled_mask.sum(dim=1), index[:, 0] // 2 + 1)
    assert torch.equal(trained.sampling_logprobs, -rows.completion_ids.float())
    expected = GroupAdvantage()(torch.tensor([[0.0, 1.0]] * 4))
    assert torch.equal(trained.advantages, expected.flatten())
    shown = rollout.advantages
    assert torch.equal(shown[[1, 5, 7, 8]], expected) and int((shown != 0).any(dim=1).sum()) == 4
    wanted = {"extra_rollouts": 2.0, "kept_groups": 4 / 11, "surplus_groups": 0.0, "filled_groups": 0.0}
    assert rollout.metrics == {f"sampling/{name}": value for name, value in wanted.items()}


def test_what_is_too_much_is_dropped_and_at_the_bound_groups_fill_up_without_advantage():
    rollout, _ = sampled([2, 1, 3, 4], [5, 7, 9, 11])
    trained = to_train(rollout, BatchStdAdvantage())[1]
    assert trained.sequences.prompt_ids[::2, 0].tolist() == [1, 3, 5, 7]
    assert torch.equal(trained.advantages, BatchStdAdvantage()(torch.tensor([[0.0, 1.0]] * 4)).flatten())
    assert (rollout.metrics["sampling/kept_groups"], rollout.metrics["sampling/surplus_groups"]) == (4 / 8, 2 / 8)
    rollout, asked = sampled([2, 4, 6, 8], [10, 12, 1, 14, 16, 18, 20, 22], bound=2)
    trained = to_train(rollout)[1]
    assert asked == [4, 4] and trained.sequences.prompt_ids[::2, 0].tolist() == [2, 4, 6, 1]
    assert trained.advantages[:6].tolist() == [0.0] * 6 and bool((trained.advantages[6:] != 0).all())
    assert (rollout.metrics["sampling/kept_groups"], rollout.metrics["sampling/filled_groups"]) == (1 / 12, 3 / 4)
    penalised = to_train(replace(rollout, rewards=replace(rollout.rewards, total=torch.rand(12, 2))))[1]
    assert penalised.advantages[:6].tolist() == [0.0] * 6, "also where they differ in something other than success"


def test_rows_that_do_not_count_are_in_no_advantage_and_stay_uncounted():
    rollout, _ = sampled([2, 1, 4, 6], [8, 3, 10, 5, 7, 12, 14, 16, 18])
    counted = torch.ones(11, 2, dtype=torch.bool)
    counted[1, 0] = counted[7, 1] = False  # of prompts 1 and 5
    lost = torch.where(counted, rollout.rewards.total, torch.nan)
    rollout, trained = to_train(replace(rollout, rewards=replace(rollout.rewards, total=lost, counted=counted)))
    assert trained.row_weights.tolist() == [0, 1, 1, 1, 1, 0, 1, 1]
    assert (trained.advantages != 0).tolist() == [False, False, True, True, False, False, True, True], "none in a group of one"
    assert not rollout.advantages[~counted].any()


def test_credit_by_turn_goes_with_the_tokens_of_its_group(monkeypatch):
    rollout, _ = sampled([2, 1, 4, 6], [8, 3, 10, 5, 7, 12, 14, 16, 18])
    # Of each group the first has a second turn, where it is alone with nothing to learn.
    lengths = [(1, n - 1) if n > 1 and row % 2 == 0 else (n,) for row, n in enumerate(rollout.lengths.flatten().tolist())]
    lengths[15] = (1, 2)  # but of prompt 5 both have a second turn
    texts = tuple(Completion("", sum(n), True, episode=Episode((), len(n), "over", (), lengths=n)) for n in lengths)
    counted = torch.tensor([[True, len(n) > 1] for n in lengths]).view(11, 2, 2)
    total = torch.stack([rollout.rewards.total, 3 * torch.arange(22.0).view(11, 2)], dim=2)
    both = Rewards(total, {}, torch.zeros_like(counted), counted=counted)
    monkeypatch.setattr(sampled_groups, "share_groups", lambda *_: [[2, 1, 0, 3]])
    _, trained = to_train(replace(rollout, completions=texts), GroupMeanAdvantage(), both)
    assert trained.sequences.prompt_ids[::2, 0].tolist() == [5, 3, 1, 7] and bool((trained.row_weights == 1).all())
    rows = [of_row[own].tolist() for of_row, own in zip(trained.advantages, trained.sequences.sampled_mask, strict=True)]
    assert rows == [[-0.5, -1.5, -1.5], [0.5, 1.5, 1.5], [-0.5, 0.0], [0.5] * 2, [-0.5], [0.5], [-0.5, 0.0, 0.0, 0.0], [0.5] * 4]
    assert not trained.advantages[~trained.sequences.sampled_mask].any()


# ---- runs


class Sampled(Log):
    """And the rollouts."""

    def __init__(self):
        super().__init__()
        self.rollouts = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.rollouts or self.rollouts[-1] is not batch.rollout:
            self.rollouts.append(batch.rollout)


def test_metrics_are_of_all_groups_denominators_of_those_trained_on_and_a_run_resumes_bit_for_bit(model, sums, tmp_path):
    log, rest = Sampled(), Sampled()
    reward = WeightedSum([StartsWithDigit(), OverlongPenalty(6, 4)])
    policy = {"reward": reward, "dynamic_sampling": DynamicSampling(2), "minibatches_per_rollout": 2, "samples_per_prompt": 3}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5)
    module = fit(model, sums, tmp_path, log, saver, policy=policy, max_steps=8, enable_checkpointing=True)
    assert len(log.rollouts) == 4 and len(log.batches) == 8
    sizes = set()
    for number, rollout in enumerate(log.rollouts):
        metrics, steps, rewards = log.metrics[2 * number], log.batches[2 * number : 2 * number + 2], rollout.rewards
        solved, advantages = rewards.parts["starts_with_digit"].mean(dim=1), rollout.advantages
        mixed = (solved > 0) & (solved < 1)
        sizes.add(len(mixed))
        assert metrics["reward"] == pytest.approx(float(rewards.total.mean()))
        assert metrics["sampling/kept_groups"] == pytest.approx(min(4, int(mixed.sum())) / len(mixed))
        tokens = float(rollout.sequences.completion_mask.sum() + rollout.sequences.prompt_mask.sum())
        assert metrics["num_tokens"] == tokens
        assert ((advantages != 0).any(dim=1) <= mixed).all(), "a penalty alone teaches nothing"
        assert [batch.num_sequences for batch in steps] == [6.0, 6.0]
        assert sum(batch.updated_sequences for batch in steps) == int((advantages != 0).sum())
        assert sum(batch.num_tokens for batch in steps) < tokens
    assert max(sizes) > 4 and max(sizes) <= 12
    resumed = fit(model, sums, tmp_path, rest, policy=policy, ckpt=tmp_path / "step=5.ckpt", max_steps=8)
    assert rest.metrics == log.metrics[5:], "from within a rollout"
    assert all(torch.equal(weight, trained(module)[name]) for name, weight in trained(resumed).items())


def test_where_nothing_teaches_it_ends_at_the_bound_and_warns_once(model, sums, tmp_path):
    log, policy = Sampled(), {"reward": Constant(), "dynamic_sampling": DynamicSampling(2)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, sums, tmp_path, log, policy=policy, max_steps=3)
    assert [len(rollout.prompts) for rollout in log.rollouts] == [12] * 3
    assert all(len(batch.sequences) == 4 and not batch.advantages.any() and batch.num_sequences == 16 for batch in log.batches)
    assert all(step["sampling/filled_groups"] == 1 and step["frac_reward_zero_std"] == 1 for step in log.metrics)
    said = [str(one.message) for one in caught if "nothing is learned" in str(one.message)]
    assert len(said) == 1 and said[0].startswith("nothing is learned from 100% of a rollout's groups, even after 2 extra")


@pytest.mark.filterwarnings("ignore:nothing is learned from .* of a rollout's groups")
def test_groups_that_are_to_be_overfitted_are_not_replaced(model, sums, tmp_path):
    log, policy = Sampled(), {"reward": Constant(), "dynamic_sampling": DynamicSampling(1)}
    fit(model, sums, tmp_path, log, policy=policy, max_steps=2, overfit_batches=1)
    assert [len(rollout.prompts) for rollout in log.rollouts] == [4, 4]


def test_a_metric_that_is_not_paid_does_not_decide_which_groups_teach(model):
    graded, useful = DigitShare(), []
    graded.measures_correctness = False
    for weight in (0.0, 1.0):
        policy = build_policy(model, reward=WeightedSum([graded, Constant()], [1.0, weight]))
        prompts = [Prompt(text=f"{number}+1=", index=number) for number in range(4)]
        rollout = policy.generate(prompts, 4, PromptDraws(prompts, 4, 5))
        useful.append(policy.task.useful_groups(policy.task.generation.score(rollout)))
    assert useful[0].any() and not useful[1].any()


# ---- metrics


PROMPT_LENGTHS, LENGTHS = [3, 2, 1], [1, 4, 2, 2, 3, 3, 1, 1, 4]
TOTAL = [1.0, 0.0, 0.5, 0.25, 0.25, 0.25, 1.0, 1.5, 1.0]
FINISHED = [True, False, True, True, True, True, True, True, False]


def build(samples=3, total=TOTAL, sets=("", "", "")):
    """A rollout in which an environment added two tokens to each completion."""
    count = len(total)
    prompts = [Prompt(text=str(i), index=i, set_name=sets[i % 3]) for i in range(count // samples)]
    ids = [[5] * PROMPT_LENGTHS[row // samples % 3] for row in range(count)]
    sequences = [[6] * LENGTHS[row] + [7] * 2 for row in range(count)]
    sequences = Sequences(*pad_left(ids, 0, "cpu"), *pad_right(sequences, 0, "cpu"))
    sequences = replace(sequences, sampled_mask=sequences.completion_ids == 6)
    texts = tuple(Completion("", LENGTHS[row], FINISHED[row]) for row in range(count))
    values = torch.tensor(total).view(-1, samples)
    rewards = Rewards(values, {"match": values}, values >= 1)
    return Rollout(tuple(prompts), texts, sequences, torch.zeros(sequences.completion_ids.shape), rewards=rewards)


def by_hand(groups):
    """The metrics of completions, given by their rows, group by group."""
    rows = [row for group in groups for row in group]
    solved = [statistics.mean(TOTAL[row] >= 1 for row in group) for group in groups]
    values, lengths = ([of[row] for row in rows] for of in (TOTAL, LENGTHS))
    spreads = [statistics.stdev(TOTAL[row] for row in group) if len(group) > 1 else 0.0 for group in groups]
    return {
        "reward": statistics.mean(values),
        "reward_std": statistics.mean(spreads),
        "frac_reward_zero_std": statistics.mean(spread == 0 for spread in spreads),
        "accuracy": statistics.mean(value >= 1 for value in values),
        "solve_rate/all": statistics.mean(share == 1 for share in solved),
        "solve_rate/none": statistics.mean(share == 0 for share in solved),
        "solve_rate/mixed": statistics.mean(0 < share < 1 for share in solved),
        "completions/mean_length": statistics.mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": statistics.mean(not FINISHED[row] for row in rows),
        "num_tokens": sum(LENGTHS) + 9 * 2 + 3 * sum(PROMPT_LENGTHS),
        "rewards/match/mean": statistics.mean(values),
        "rewards/match/std": statistics.stdev(values),
    }


def test_every_value_by_hand_and_completions_that_do_not_count_are_in_none():
    metrics, expected = rollout_metrics(build()), by_hand([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    assert metrics == pytest.approx(expected, abs=1e-6) and all(type(value) is float for value in metrics.values())
    # Of the first group two count, of the second none, of the third one.
    counted = torch.tensor([row in (0, 2, 7) for row in range(9)]).view(3, 3)
    rollout = build(sets=("sums", "lost", "quiz"))

    def counting(some, total=rollout.rewards.total):
        return replace(rollout, rewards=replace(rollout.rewards, total=total, parts={"match": total}, counted=some))

    metrics = rollout_metrics(counting(counted, torch.where(counted, rollout.rewards.total, torch.nan)))
    of_sets = {"sets/sums/reward": 0.75, "sets/sums/accuracy": 1 / 2, "sets/sums/mean_length": 1.5}
    of_sets |= {"sets/quiz/reward": 1.5, "sets/quiz/accuracy": 1, "sets/quiz/mean_length": 1}
    assert metrics == pytest.approx(by_hand([[0, 2], [7]]) | of_sets, abs=1e-6)
    metrics_of_ties, of_one = rollout_metrics(build(total=[0.1] * 9)), rollout_metrics(build(samples=1, total=[0.5]))
    assert metrics_of_ties["frac_reward_zero_std"] == of_one["frac_reward_zero_std"] == 1
    assert of_one["reward_std"] == of_one["rewards/match/std"] == 0
    assert rollout_metrics(counting(torch.zeros_like(counted))) == {"num_tokens": metrics["num_tokens"]}
    assert rollout_metrics(counting(torch.ones_like(counted))) == rollout_metrics(rollout), "to the bit"


def test_sets_of_other_ranks_count_too(monkeypatch):
    """This rank has no quiz, the other nothing else; each has nine sequences."""
    module = "hybrid_lightning.training.sampled_groups"
    gathered = lambda columns: {name: torch.cat([column, column.flip(0)]) for name, column in columns.items()}  # noqa: E731
    monkeypatch.setattr(f"{module}.gather_columns", gathered)
    monkeypatch.setattr(f"{module}.gather_objects", lambda names: [names, ["quiz", "quiz", "riddles"]])
    metrics = rollout_metrics(build(sets=("sums", "riddles", "riddles")))
    assert metrics["sets/sums/reward"] == pytest.approx(statistics.mean(TOTAL[:3]))
    assert metrics["sets/quiz/reward"] == pytest.approx(statistics.mean(TOTAL[3:]))
    assert metrics["sets/riddles/reward"] == pytest.approx(statistics.mean(TOTAL[3:] + TOTAL[:3]))
