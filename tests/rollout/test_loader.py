import itertools
import random
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from hybrid_lightning.errors import ConfigError, RolloutError
from hybrid_lightning.rollout.batching import minibatch
from hybrid_lightning.rollout.future import RolloutFuture
from hybrid_lightning.rollout.loader import RolloutLoader, RolloutSchedule
from hybrid_lightning.shared.stopping import RunStopped
from hybrid_lightning.training.run import Run
from hybrid_lightning.types import Completion, Episode, PolicyBatch, Prompt, Rewards, Rollout, Sequences


class Source:
    """Completions are random numbers; each sequence's prompt id is the index of its prompt."""

    needs_all_rows, plays_elsewhere = True, False
    minibatches, run = 1, Run()  # of its loader

    def __init__(self, samples, fail_at=None):
        self.samples, self.fail_at, self.calls, self.on_policy = samples, fail_at, 0, []

    def begin(self, prompts, generator, draw_more=None):
        self.calls += 1
        rows = len(prompts) * self.samples
        tokens = torch.randint(1000, (rows, 4), generator=generator)
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        lengths = torch.randint(1, 5, (rows,), generator=generator)
        ids = torch.tensor([[prompt.index] for prompt in prompts for _ in range(self.samples)])
        mask = torch.arange(4)[None] < lengths[:, None]
        sampled = mask & ((tokens % 3 > 0) | (torch.arange(4) == 0))  # an environment added the others
        sequences = Sequences(ids, torch.ones_like(ids, dtype=torch.bool), tokens, mask, sampled_mask=sampled)
        logprobs, advantages, metrics = -tokens.float() * mask, torch.randn(rows), {"reward": float(tokens.float().mean())}
        rollout = scored_rollout(prompts, sequences, logprobs, advantages, metrics)
        return RolloutFuture.of(PolicyBatch(sequences, advantages, logprobs, rollout=rollout))

    def finish(self, batch, number):
        parts = batch.split(self.minibatches)
        return [minibatch(part, number, self.needs_all_rows, self.samples, self.run.sum_over_ranks) for part in parts]

    def add_logprobs(self, batches, on_policy):
        self.on_policy += [on_policy] * len(batches)
        return batches


def scored_rollout(prompts, sequences, logprobs, advantages, metrics):
    """Every second completion is an episode."""
    lengths = sequences.sampled_mask.sum(dim=1).tolist()
    said = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})
    episode = Episode(said, 1, "answered", (0.5,), {"calls": 2}, (3,))
    texts = (Completion(f"{row}", length, row % 3 > 0, False, episode if row % 2 else None) for row, length in enumerate(lengths))
    of_groups = advantages.view(len(prompts), -1)
    rewards = Rewards(-of_groups, {"part": of_groups}, of_groups > 0)
    rollout = Rollout(tuple(prompts), tuple(texts), sequences, logprobs, rewards=rewards, metrics=metrics)
    return replace(rollout, advantages=of_groups, token_advantages=advantages[:, None] * sequences.sampled_mask)


class Restarted(Run):
    """Counts the calls that make it count its epoch from 0."""

    restarts = 0

    def restart_epoch(self):
        self.restarts += 1


def run_with(**answers):
    run = Restarted()
    vars(run).update(answers)
    return run


def build(prompts=12, source=None, schedule=None, accumulate=1, run=None, **arguments):
    schedule = schedule or RolloutSchedule(4, 2, minibatches_per_rollout=2)
    source = source or Source(schedule.samples_per_prompt)
    data = [Prompt(text=str(i), index=i) for i in range(prompts)]
    generator = torch.Generator().manual_seed(0)
    run = source.run = run or run_with(accumulate_grad_batches=accumulate)
    source.minibatches = schedule.minibatches_per_rollout
    return RolloutLoader(data, source, schedule, run, generator=generator, **arguments)


def flat(batch):
    """All of a micro-batch, and of the rollout that comes with it."""
    tensors = (batch.sequences.prompt_ids, batch.sequences.completion_ids, batch.sampling_logprobs, batch.advantages)
    rollout = batch.rollout
    tensors += (rollout.sequences.completion_ids, rollout.sampling_logprobs, rollout.episode_of_row, rollout.rewards.total)
    tensors += (rollout.advantages, rollout.token_advantages)
    plain = [rollout.prompts, [(text, vars(text)) for text in rollout.completions], batch.rollout_number, batch.metrics]
    return [*(tensor.tolist() for tensor in tensors), *plain]


def batches_of(loader, count):
    """Micro-batches, of as many epochs as it takes."""
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), count)


def take(loader, count):
    """The same; training on one draws numbers from the generators."""
    return [(flat(batch), random.random(), float(torch.rand(()))) for batch in batches_of(loader, count)]


def prompts_of(loader):
    """Prompts of one epoch, in order."""
    return [i for batch in loader for i in batch.sequences.prompt_ids[::2, 0].tolist()]


def seed(number):
    torch.manual_seed(number)
    random.seed(number)


def test_an_epoch_visits_every_prompt_once_in_an_order_that_changes():
    loader = build()
    assert len(loader) == 6
    first, second = prompts_of(loader), prompts_of(loader)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert prompts_of(build(epoch=1)) == second, "a loader that replaces another continues with the next order"


def test_micro_batches_carry_the_denominators_of_their_step_and_no_columns_of_padding():
    loader = build(schedule=RolloutSchedule(4, 6, minibatches_per_rollout=2, epochs_per_rollout=2), accumulate=3)
    batches = list(batches_of(loader, 12))
    assert len(loader) == 3 * 12 and all(len(batch.sequences) == 4 for batch in batches)
    for start in range(0, 12, 3):
        step = batches[start : start + 3]
        assert {batch.num_sequences for batch in step} == {12.0}
        assert {batch.num_tokens for batch in step} == {float(sum(batch.sequences.sampled_mask.sum() for batch in step))}
    assert [flat(batch) for batch in batches[:6]] == [flat(batch) for batch in batches[6:]]
    assert len({batch.sampling_logprobs.shape[1] for batch in build(accumulate=4)}) > 1


def test_only_the_first_step_of_a_single_pass_is_on_policy():
    for schedule, expected in (
        (RolloutSchedule(4, 2), [True, True]),
        (RolloutSchedule(4, 2, minibatches_per_rollout=2), [True, True, False, False]),
        (RolloutSchedule(4, 2, epochs_per_rollout=2), [False, False]),
    ):
        source = Source(2)
        next(iter(build(source=source, schedule=schedule, accumulate=2)))
        assert source.on_policy == expected


def test_rows_that_contribute_nothing_are_left_out_and_the_others_dealt_evenly():
    class Some(Source):
        def begin(self, prompts, generator, draw_more=None):
            return super().begin(prompts, generator).then(lambda made: replace(made, advantages=made.advantages.relu()))

    def advantages_of(source):
        torch.manual_seed(3)
        batches = list(build(source=source, accumulate=2))
        return batches, [float(advantage) for batch in batches for advantage in batch.advantages]

    some = Some(2)
    (_, every), some.needs_all_rows = advantages_of(Some(2)), False
    batches, kept = advantages_of(some)
    assert kept == [advantage for advantage in every if advantage] != every, "in their order"
    for step in zip(batches[::2], batches[1::2], strict=True):
        assert {batch.updated_sequences for batch in step} == {float(sum(len(batch.sequences) for batch in step))}
        assert abs(len(step[0].sequences) - len(step[1].sequences)) <= 1


def test_an_episode_of_several_rows_counts_once_and_is_in_one_micro_batch():
    class Rows(Source):
        def begin(self, prompts, generator, draw_more=None):
            def joined(made):
                rows = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7])
                part = made.rows(rows)
                weights = 1 / torch.bincount(rows)[rows] * (rows != 2)  # the third does not count
                return replace(part, episode_of_row=rows, row_weights=weights)

            return super().begin(prompts, generator).then(joined)

    batches = list(build(prompts=4, source=Rows(2), accumulate=2))
    assert [batch.episode_of_row.tolist() for batch in batches] == [[0, 0, 1], [2, 3, 3, 3], [4, 5], [6, 7]]
    assert [(batch.num_sequences, batch.updated_sequences) for batch in batches] == [(3.0, 3.0)] * 2 + [(4.0, 4.0)] * 2
    tokens = [float(batch.sequences.sampled_mask.sum()) for batch in batches]
    assert [batch.num_tokens for batch in batches[::2]] == [tokens[0] + tokens[1], tokens[2] + tokens[3]]


@pytest.mark.parametrize(("consumed", "ahead"), [(0, 0), (1, 0), (6, 0), (0, 1), (3, 1), (6, 2), (9, 4)])
def test_resuming_anywhere_gives_the_same_micro_batches(tmp_path, consumed, ahead):
    schedule = RolloutSchedule(4, 2, minibatches_per_rollout=2, rollouts_ahead=ahead)
    seed(1)
    expected = take(build(schedule=schedule), 16)
    seed(1)
    stopped = build(schedule=schedule)
    take(stopped, consumed)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    seed(99)
    resumed = build(schedule=schedule)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert take(resumed, 16 - consumed) == expected[consumed:]


@pytest.mark.parametrize(("consumed", "unfinished"), [(1, 1), (2, 2), (13, 1)])
def test_micro_batches_of_an_unfinished_step_are_given_back_with_their_random_numbers(consumed, unfinished):
    """Two micro-batches a step, twelve an epoch."""
    seed(1)
    whole = take(build(accumulate=2), 20)
    seed(1)
    stopped = build(accumulate=2)
    take(stopped, consumed)
    torch.rand(5)  # of a pass that was cut short
    stopped.give_back(unfinished)
    again = take(stopped, 20 - consumed + unfinished)
    assert again == whole[consumed - unfinished :]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_stop_leaves_the_position_as_if_the_rollout_had_not_begun(ahead):
    schedule = RolloutSchedule(4, 2, minibatches_per_rollout=2, rollouts_ahead=ahead)
    seed(3)
    expected = take(build(schedule=schedule), 6)
    seed(3)
    loader = build(source=Source(2, fail_at=2 + ahead), schedule=schedule)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for batch in loader:
            seen.append((flat(batch), random.random(), float(torch.rand(()))))
    state = loader.state_dict()
    seed(77)
    resumed = build(schedule=schedule)
    resumed.load_state_dict(state)
    assert len(seen) == 2 and seen + take(resumed, 4) == expected


def test_an_epoch_cut_short_continues_where_it_stopped_unless_order_is_kept():
    loader = build()
    iterator = iter(loader)
    first = [flat(next(iterator))[0] for _ in range(3)]
    assert flat(next(iter(loader)))[0] != first[0]
    assert len(loader._pending) == 0, "the fourth micro-batch was the second half of the second rollout"
    fixed = build(shuffle=False)
    assert [flat(next(iter(fixed)))[0] for _ in range(2)] == [[[0], [0], [1], [1]]] * 2


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError, match="cannot be split evenly into 6"):
        build(accumulate=3)
    with pytest.raises(ConfigError, match="multiple of the 3 devices"):
        build(run=run_with(world_size=3))
    with pytest.raises(ConfigError, match="prompts_per_rollout must be at least 1"):
        RolloutSchedule(0, 1)


def test_another_number_of_ranks_takes_over_what_is_left_and_the_rollouts_ahead():
    schedule = RolloutSchedule(4, 2, minibatches_per_rollout=2, rollouts_ahead=1)
    loaders = [build(run=run_with(rank=rank, world_size=2), schedule=schedule) for rank in range(2)]
    for loader in loaders:
        next(iter(loader))
    states = [loader.state_dict() for loader in loaders]
    one = build(schedule=schedule)
    one.load_state_dict({**states[0], "ranks": [state["ranks"][0] for state in states]})
    batches = list(one)
    left = [[*own._pending, *own._ahead[0].minibatches.result()] for own in loaders]
    expected = [[row for part in step for row in part.advantages.tolist()] for step in zip(*left, strict=True)]
    assert [batch.advantages.tolist() for batch in batches[:3]] == expected and len(batches) == 6
    visited = [i for batch in batches[1:5] for i in batch.sequences.prompt_ids[::2, 0].tolist()]
    assert len(set(visited)) == 8, "then the rollouts that follow"
    assert [batch.rollout_number for batch in batches[:4]] == [0, 1, 1, 2]
    shown, of_ranks = batches[0].rollout, [own._taken[0].rollout for own in loaders]
    assert shown.prompts == tuple(prompt for part in of_ranks for prompt in part.prompts)
    assert shown.completions == tuple(text for part in of_ranks for text in part.completions)
    assert torch.equal(shown.rewards.total, torch.cat([part.rewards.total for part in of_ranks]))
    two, third = build(run=run_with(rank=1, world_size=2), schedule=schedule), one._ahead[0].minibatches.result()[0].rollout
    two.load_state_dict(one.state_dict())
    mine = two._ahead[0].minibatches.result()[0].rollout
    assert mine.prompts == third.prompts[2:] and mine.completions == third.completions[4:]
    assert torch.equal(mine.advantages, third.advantages[2:]) and mine.episode_of_row.tolist() == [0, 1, 2, 3]


def test_other_prompts_are_drawn_from_the_beginning_of_their_order_and_batches_put_on_the_policys_device():
    loader = build()
    next(iter(loader))
    state = loader.state_dict()
    for changed in (build(prompts=13), build(shuffle=False)):
        changed.load_state_dict(state)
        fresh = build(prompts=len(changed.prompts), shuffle=changed.shuffle)
        assert changed.run.restarts == 1 and not changed._pending
        assert [p.index for p in changed._cursor.draw(12)] == [p.index for p in fresh._cursor.draw(12)]
    same = build(run=run_with(device=torch.device("meta")))
    same.load_state_dict(state)
    assert same._cursor.position == loader._cursor.position and not same.run.restarts
    batch = next(iter(same))
    assert batch.sequences.prompt_ids.is_meta and batch.advantages.is_meta and same.generator.device.type == "cpu"


def test_a_rollout_that_is_given_up_is_drawn_again_with_those_ahead_of_it():
    schedule = RolloutSchedule(4, 2, minibatches_per_rollout=2, rollouts_ahead=1)
    loader = build(schedule=schedule)
    next(iter(loader))
    state, expected = loader.state_dict(), loader._ahead[0].before.prompts
    for given_up, position, pending in ((False, loader._cursor.position, 1), (True, expected, 0)):
        resumed = build(schedule=schedule)
        resumed.load_state_dict({**state, "given_up": given_up})
        assert (resumed._cursor.position, len(resumed._pending), len(resumed._ahead)) == (position, pending, pending)
        assert bool(resumed.run.restarts) == given_up


class Elsewhere(Source):
    """Rollouts that are made elsewhere during training; notes what is done with each."""

    def __init__(self, samples, failure=None):
        super().__init__(samples)
        self.events, self.failure = [], failure

    plays_elsewhere = True

    def begin(self, prompts, generator, draw_more=None):
        rollout, number, made = super().begin(prompts, generator).result(), self.calls - 1, Future()
        rollout.metrics["number"] = number
        made.set_result(None)

        def made_up():
            if self.failure is not None:
                raise self.failure
            self.events.append(f"finish {number}")
            return rollout

        self.events.append(f"begin {number}")
        return RolloutFuture(made_up, made, on_wait=lambda: self.events.append(f"wait {number}"))

    def add_logprobs(self, batches, on_policy):
        self.events.append(f"train {batches[0].metrics['number']:.0f}")
        return super().add_logprobs(batches, on_policy)


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_each_rollout_is_begun_so_many_before_it_is_trained_on_and_none_that_is_not(ahead):
    schedule, batches, run, source = RolloutSchedule(4, 2, rollouts_ahead=ahead), [], run_with(steps_left=8), Elsewhere(2)
    loader = build(source=source, schedule=schedule, run=run)
    for batch in batches_of(loader, 8):
        batches.append(flat(batch)[:3])
        run.steps_left -= 1
    expected = ["begin 0"]
    for number in range(8):  # the engine has nothing under way of a rollout when it is given other weights for a later one
        later = range(number + ahead if number else 1, min(8, number + ahead + 1))
        expected += [f"wait {number}", *(f"begin {other}" for other in later), f"finish {number}", f"train {number}"]
    assert source.events == expected
    plain = batches_of(build(schedule=RolloutSchedule(4, 2)), 8)
    assert batches == [flat(batch)[:3] for batch in plain], "in the same order, none left out"


@pytest.mark.parametrize("failure", [RunStopped(15), RolloutError("no server answers")])
def test_rollouts_under_way_are_waited_for_or_begun_again_by_the_resumed_run(failure):
    schedule = RolloutSchedule(4, 2, rollouts_ahead=2)
    seed(5)
    expected = take(build(source=Elsewhere(2), schedule=schedule), 6)
    seed(5)
    loader = build(source=Elsewhere(2), schedule=schedule)
    first, whole = take(loader, 1), loader.state_dict()
    assert take(loader, 5) == expected[1:], "saving changes nothing"
    seed(5)
    failing = build(source=Elsewhere(2), schedule=schedule)
    take(failing, 1)
    failing.source.failure = failure
    cut = failing.state_dict()
    assert [len(state["ranks"][0]["ahead"]) for state in (cut, whole)] == [0, 2]
    with pytest.raises(type(failure)):
        take(failing, 1)
    for state, again in ((whole, 0), (cut, 2)):
        seed(7)
        resumed = build(source=Elsewhere(2), schedule=schedule)
        resumed.load_state_dict(state)
        found = take(resumed, 5)
        assert [batch[0][1] for batch in first + found] == [batch[0][1] for batch in expected], "the same random numbers"
        assert resumed.source.calls == 5 + again


def test_no_rollout_begins_after_one_with_failed_completions():
    class Failing(Source):
        plays_elsewhere = True

        def begin(self, prompts, generator, draw_more=None):
            made, work = super().begin(prompts, generator, draw_more), Future()
            work.set_exception(RolloutError("no server")) if self.calls == 2 else work.set_result(None)
            return RolloutFuture(lambda: (work.result(), made.result())[1], work)

    source = Failing(2)
    loader = build(source=source, schedule=RolloutSchedule(4, 2, rollouts_ahead=1))
    batches = iter(loader)
    next(batches)
    for _ in range(2):
        with pytest.raises(RolloutError, match="no server"):
            next(batches)
        batches = iter(loader)
    assert source.calls == 2
