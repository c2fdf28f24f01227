"""Draws that belong to a prompt, whatever its batch, order and rank; and random states that continue on other devices."""

import pytest
import torch

from hybrid_lightning.rollout.rng import PromptDraws, capture_random_state, restore_random_state
from hybrid_lightning.types import Prompt

PROMPTS = [Prompt(text=f"{index}+{index}=", index=index, set_name=name) for name in ("", "quiz") for index in range(3)]


def numbers(prompts, samples=2, seed=0, steps=130):
    draws = PromptDraws(prompts, samples, seed)
    rows = torch.arange(len(prompts) * samples)
    return torch.cat([draws.numbers(rows, step) for step in range(steps)], dim=1).view(len(prompts), samples, steps)


def test_every_completion_of_every_prompt_has_numbers_of_its_own_also_of_one_that_is_there_twice():
    everything = torch.cat([numbers(PROMPTS).flatten(), numbers(PROMPTS, seed=1).flatten()])
    assert len(everything.unique()) == len(everything) and float(everything.min()) >= 0 and float(everything.max()) < 1
    assert float(everything.mean()) == pytest.approx(0.5, abs=0.02)
    twice = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    of_all, of_second_rank = PromptDraws(twice, 2, 0, range(3)), PromptDraws(twice[1:2], 2, 0, [1])
    values = of_all.numbers(torch.arange(6), 0)
    assert len(values.unique()) == 6
    assert torch.equal(of_second_rank.numbers(torch.arange(2), 0), values[2:4])


def test_they_do_not_depend_on_the_other_prompts_and_on_rows_that_have_ended():
    together = numbers(PROMPTS)
    for position, prompt in enumerate(PROMPTS):
        assert torch.equal(numbers([prompt])[0], together[position])
    draws = PromptDraws(PROMPTS, 2, 0)
    for step in range(70):
        rows = torch.arange(12) if step < 5 else torch.tensor([3, 10])
        assert torch.equal(draws.numbers(rows, step).squeeze(1), together.view(12, -1)[rows, step])


def test_later_messages_have_numbers_of_their_own_whichever_episodes_go_on():
    draws, rows, turns = PromptDraws(PROMPTS, 2, 0), [0, 3, 4, 11], [1, 2, 1, 1]
    together = draws.of_turns(rows, turns).numbers(torch.arange(4), 0)
    alone = [draws.of_turns([row], [turn]).numbers(torch.arange(1), 0) for row, turn in zip(rows, turns, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    of_rank = PromptDraws(PROMPTS[2:3], 2, 0).of_turns([0], [1])
    assert of_rank.seeds == draws.of_turns([4], [1]).seeds
    others = [draws.of_turns([0, 1], turns) for turns in ([1, 1], [2, 2])] + [PromptDraws(PROMPTS, 2, 1).of_turns([0, 1], [1, 1])]
    assert len({seed for made in (draws, *others) for seed in made.seeds}) == 6 + 3 * 2


class Cuda:
    """The generators of some devices, one of them this process's, in place of `torch.cuda`'s functions."""

    def __init__(self, monkeypatch, devices, current):
        self.states = [torch.full((16,), number, dtype=torch.uint8) for number in range(devices)]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: self.states[current])
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: self.states.__setitem__(current, state))


@pytest.mark.parametrize(
    ("before", "now"), [((4, 3), (1, 0)), ((1, 0), (4, 3)), ((2, 1), (2, 1)), ((2, 1), (0, 0)), ((0, 0), (2, 1))]
)
def test_a_process_resumes_with_the_state_of_its_device_on_fewer_or_more(monkeypatch, before, now):
    Cuda(monkeypatch, *before)
    state, expected = capture_random_state(), torch.rand(3)
    here = Cuda(monkeypatch, *now)
    restore_random_state(state)
    own = before[1] if before[0] else now[1]  # from a CPU it continues as it was seeded
    assert [int(entry[0]) for entry in here.states] == [own if number == now[1] else number for number in range(now[0])]
    assert torch.equal(torch.rand(3), expected), "every run has the CPU's generator"
