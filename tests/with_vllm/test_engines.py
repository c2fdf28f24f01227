"""What every rollout engine promises, with ours, with vLLM in process, and with a vLLM server."""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from ranks_of_tests import run
from test_ranks_with_vllm import check, train
from tiny_runs import Talk
from vllm_of_tests import largest_difference, move, needs_vllm, own_logprobs, policy_of, write_model

from hybrid_lightning.environments import EpisodeLimits
from hybrid_lightning.episodes.episodes import Episodes
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import SampledReverseKL
from hybrid_lightning.rollout import RolloutEngine, Sampler, VLLMSampler, VLLMServerSampler
from hybrid_lightning.rollout.rng import PromptDraws
from hybrid_lightning.rollout.rollout_engine import WeightedEngine
from hybrid_lightning.training import PolicyModule, ServerTeacher
from hybrid_lightning.types import Prompt

TEXTS = ("12+3=", "what is 7 plus 15?\n", "9=", "abc", "84*7=")
ENGINES = [Sampler, pytest.param(VLLMSampler, marks=needs_vllm), pytest.param(VLLMServerSampler, marks=needs_vllm)]


@pytest.fixture(scope="module", params=ENGINES)
def policy(model: Path, request: pytest.FixtureRequest) -> Iterator[PolicyModule]:
    """A hybrid policy; its engine is made once."""
    options = {"urls": [request.getfixturevalue("server").url]} if request.param is VLLMServerSampler else {}
    sampler = request.param(max_new_tokens=20, **options)
    policy = policy_of(sampler, model, "hybrid")
    policy.task.generation.check()
    yield policy
    sampler.shut_down()


@pytest.fixture
def sampler(policy: PolicyModule) -> Iterator[RolloutEngine]:
    """The engine; a test may change its settings."""
    before = dict(vars(policy.task.generation.sampler))
    yield policy.task.generation.sampler
    for name in ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop"):
        setattr(policy.task.generation.sampler, name, before[name])
    policy.task.generation.__dict__.pop("_stops", None)


def prompts(texts=TEXTS) -> list[Prompt]:
    return [Prompt(text=text, index=index) for index, text in enumerate(texts)]


def complete(policy: PolicyModule, texts=TEXTS, samples: int = 4, seed: int = 0, **options):
    asked = prompts(texts)
    return policy.task.generation.generate(asked, samples, PromptDraws(asked, samples, seed), **options)


def tokens_of(rollouts) -> list[list[int]]:
    masks = rollouts.sequences.completion_mask
    return [row[mask].tolist() for row, mask in zip(rollouts.sequences.completion_ids, masks, strict=True)]


@pytest.mark.parametrize(("temperature", "tolerance"), [(1.0, 1e-4), (0.7, 3e-4)])
def test_log_probabilities_equal_the_full_softmax_at_the_temperature(policy, sampler, temperature, tolerance):
    sampler.temperature = temperature
    assert largest_difference(policy, complete(policy)) < tolerance


def test_an_episode_continues_after_added_tokens(policy, sampler):
    generation = policy.task.generation
    player = generation.player
    generation.player = generation.episodes = Episodes(
        Talk(), EpisodeLimits(max_tokens=40), policy.policy.pretrained, "{content}"
    )
    generation.__dict__.pop("_stops", None)
    try:
        rollouts = complete(policy, samples=8)
    finally:
        generation.episodes.shut_down()
        generation.player, generation.episodes = player, None
        generation.__dict__.pop("_stops", None)
    assert max(completion.episode.turns for completion in rollouts.completions) > 1
    assert (rollouts.sequences.completion_mask & ~rollouts.sequences.sampled_mask).any()
    assert largest_difference(policy, rollouts) < 1e-4


def test_completions_are_in_the_order_of_the_prompts_and_end_by_their_stop_token(policy):
    told = {}
    rollouts = complete(policy, samples=4, on_completion=told.__setitem__)
    assert all(completion == rollouts.completions[row] for row, completion in told.items())
    assert set(rollouts.finished.flatten().nonzero().flatten().tolist()) <= set(told)
    assert rollouts.prompts == tuple(prompts()) and len(rollouts.completions) == 20 and rollouts.group_size == 4
    stop = set(policy.policy.pretrained.stop_ids)
    rows = zip(tokens_of(rollouts), rollouts.finished.flatten().tolist(), rollouts.completions, strict=True)
    for row, (tokens, finished, text) in enumerate(rows):
        ids = rollouts.sequences.prompt_ids[row][rollouts.sequences.prompt_mask[row]].tolist()
        assert ids == policy.task.generation.encode(rollouts.prompts[row // 4]), "completions of a prompt are neighbours"
        assert finished == (tokens[-1] in stop) and not stop & set(tokens[:-1])
        assert text.num_tokens == len(tokens) and text.finished == finished
    assert rollouts.finished.any()


def test_a_seed_gives_the_same_completions_whatever_is_sampled_beside_it_and_another_others(policy):
    """Equal up to the rounding of a batch, which can turn a draw that lies on the edge between two tokens."""
    whole = tokens_of(complete(policy))
    assert whole == tokens_of(complete(policy)) != tokens_of(complete(policy, seed=1))
    assert len({tuple(row) for row in whole[:4]}) > 1, "completions of a prompt differ"
    alone = []
    for prompt in prompts():
        alone += tokens_of(policy.generate([prompt], 4, PromptDraws([prompt], 4, 0)))
    assert sum(one == other for one, other in zip(whole, alone, strict=True)) >= len(whole) - 1


def logits_of(policy: PolicyModule, rollouts) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The tokens of each completion, and the policy's logits for them."""
    with policy.policy.inference():
        for row, tokens in enumerate(tokens_of(rollouts)):
            prompt = policy.task.generation.encode(rollouts.prompts[row // rollouts.group_size])
            yield tokens, policy.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]


def test_greedy_takes_the_most_probable_token_and_a_completion_ends_by_its_stop_token_or_the_limit(policy, sampler):
    sampler.max_new_tokens = 3
    rollouts = complete(policy, samples=1, greedy=True)
    for tokens, logits in logits_of(policy, rollouts):
        assert logits.argmax(-1).tolist() == tokens and len(tokens) <= 3
    assert max(map(len, tokens_of(rollouts))) == 3
    first = tokens_of(rollouts)[0][0]  # with which the policy stops at once, if it is a stop token
    policy.task.generation.__dict__["_stops"] = type(policy.task.generation._stops)((first,), None)
    rollouts = complete(policy, TEXTS[:1], samples=1, greedy=True)
    assert tokens_of(rollouts) == [[first]] and rollouts.finished.tolist() == [[True]]
    assert rollouts.sampling_logprobs.shape == (1, 1)


def test_a_stop_string_ends_the_completion_stays_in_the_tokens_and_leaves_the_text(policy, sampler):
    sampler.stop = ("1",)
    policy.task.generation.__dict__.pop("_stops", None)
    rollouts = complete(policy, samples=8)
    ended = [policy.tokenizer.decode(tokens).endswith("1") for tokens in tokens_of(rollouts)]  # one token is one character
    assert any(ended)
    for tokens, text, by_string in zip(tokens_of(rollouts), rollouts.completions, ended, strict=True):
        assert "1" not in text
        assert "1" not in policy.tokenizer.decode(tokens[:-1])
        assert not by_string or text.finished
    assert largest_difference(policy, rollouts) < 1e-4


@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_truncation_leaves_out_improbable_tokens(policy, sampler, truncation):
    ((name, value),) = truncation.items()
    setattr(sampler, name, value)
    rollouts = complete(policy, samples=8)
    for tokens, logits in logits_of(policy, rollouts):
        for probabilities, token in zip(logits.softmax(-1), tokens, strict=True):
            kept = probabilities.sort(descending=True).values
            if name == "top_p":  # what is more probable adds up to less than the share
                assert probabilities[probabilities > probabilities[token]].sum() < value + 1e-4
            else:
                assert probabilities[token] >= (kept[1] if name == "top_k" else kept[0] * value) * 0.999
    mask = rollouts.sequences.completion_mask
    full, sampled = own_logprobs(policy, rollouts)[mask], rollouts.sampling_logprobs[mask]
    if isinstance(sampler, WeightedEngine):  # among the tokens that are kept
        assert (sampled >= full - 1e-4).all() and (sampled - full).max() > 0.01
    else:
        torch.testing.assert_close(sampled, full, atol=1e-4, rtol=0)


EPISODES = {"environment": Talk(), "episodes": EpisodeLimits(max_tokens=40, workers=1), "turn_template": "{content}"}


@needs_vllm
@pytest.mark.parametrize(("episodes", "sync"), [({}, "adapter"), (EPISODES, "merged")], ids=["completions", "episodes"])
def test_requests_go_on_over_an_update_and_each_token_has_the_probability_of_the_weights_that_made_it(
    model, server, monkeypatch, episodes, sync
):
    sampler, steps = VLLMServerSampler(max_new_tokens=16 if episodes else 40, urls=[server.url], sync=sync), [0]
    policy = policy_of(sampler, model, "hybrid" if sync == "merged" else "lora", rollouts_ahead=2, **episodes)
    policy.task.generation.check()
    monkeypatch.setattr(type(policy.run), "step", property(lambda run: steps[-1]))
    # Enough that some wait, however late the update comes. With LoRA apart a CPU takes longer for each.
    asked = prompts([f"{number}*7=" for number in range(120 if sync == "merged" else 40)])
    both = []  # rows with tokens by the weights before and after the update
    for seed in range(10):  # until one comes before all are completed, which a busy machine may not manage
        before = copy.deepcopy(policy.model.state_dict())
        move(policy, seed=seed)
        after = copy.deepcopy(policy.model.state_dict())
        policy.model.load_state_dict(before)
        ended: list[int] = []
        draws = PromptDraws(asked, 8, 0)
        told = lambda row, _, ended=ended: ended.append(row)  # noqa: E731
        begun = policy.task.generation.begin(asked, 8, draws, on_completion=told, ahead=True)
        while not (begun.done() or ended):
            time.sleep(0.005)
        policy.model.load_state_dict(after)
        steps.append(seed + 1)
        later = policy.task.generation.begin(asked[:1], 1, PromptDraws(asked[:1], 1, 0), ahead=True).result()
        assert later.sequences.weights_step[later.sequences.sampled_mask].unique().tolist() == [seed + 1]
        rollouts = begun.result()
        mask, step = rollouts.sequences.sampled_mask, rollouts.sequences.weights_step
        both = [row for row in range(len(mask)) if step[row][mask[row]].unique().tolist() == [seed, seed + 1]]
        if both:
            break
    assert both, "some were under way at one of ten updates"
    new = own_logprobs(policy, rollouts)
    policy.model.load_state_dict(before)
    old = own_logprobs(policy, rollouts)
    assert (new - old)[mask].abs().max() > 1e-2, "the move has to be seen"
    expected = torch.where(step == seed + 1, new, old)
    torch.testing.assert_close(rollouts.sampling_logprobs[mask], expected[mask], atol=1e-4, rtol=0)
    policy.teardown("fit")


def test_completions_say_which_weights_made_them_and_follow_these(policy):
    before = complete(policy)
    assert before.sequences.weights_step.unique().tolist() == [0]
    move(policy, seed=5)
    after = complete(policy)
    assert largest_difference(policy, after) < 1e-4
    rows = slice(0, 4)
    moved = own_logprobs(policy, before)[rows] - before.sampling_logprobs[rows]
    assert moved[before.sequences.completion_mask[rows]].abs().max() > 1e-2, "the move has to be seen"


def test_a_prompt_without_room_is_refused_progress_is_told_and_an_exception_from_it_ends_the_sampling(policy):
    with pytest.raises(ConfigError, match="exceed"):
        complete(policy, ("1" * 60,), samples=1)
    calls, stop = [], Mock(side_effect=KeyboardInterrupt)
    policy.run.listeners.append(lambda running, decoded, longest: calls.append((running, decoded, longest)))
    complete(policy)
    assert calls and all(longest == 20 for *_, longest in calls)
    policy.run.listeners.append(stop)
    with pytest.raises(KeyboardInterrupt):
        complete(policy)
    policy.run.listeners.clear()
    assert largest_difference(policy, complete(policy)) < 1e-4, "the requests that had begun are gone"


# ---- with the server that is up for this file


@needs_vllm
def test_two_ranks_train_with_one_server(tmp_path, model, server):
    options = {"folder": model, "root": tmp_path / "run", "sampler": "server", "urls": [server.url]}
    check(run(2, tmp_path / "ranks", train, 240, **options))


@needs_vllm
def test_a_server_of_another_model_is_refused(tmp_path, server):
    sampler = VLLMServerSampler(max_new_tokens=8, urls=[server.url])
    policy = policy_of(sampler, write_model(tmp_path / "model", layers=2))
    with pytest.raises(ConfigError, match="another model: num_hidden_layers is 3 there and 2 in the policy's config"):
        policy.task.generation.check()


@needs_vllm
def test_a_server_teaches_what_the_same_weights_teach_here(model, server, tmp_path):
    sampler = VLLMServerSampler(max_new_tokens=12, urls=[server.url])
    policy = policy_of(sampler, model, "hybrid")  # the server receives its weights
    rollouts = complete(policy)
    teacher = ServerTeacher(server.url, cache_dir=str(tmp_path / "cache"))
    teacher.check(policy.task.passes, SampledReverseKL())
    found = teacher.logprobs(policy.task.passes, rollouts.sequences)
    mask = rollouts.sequences.sampled_mask
    torch.testing.assert_close(found[mask], own_logprobs(policy, rollouts)[mask], atol=1e-3, rtol=1e-3)
    assert not found[~mask].any() and (found[mask] < 0).all()
