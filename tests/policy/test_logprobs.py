import pytest
import torch
from tiny_models import FAMILIES, build_model

from hybrid_lightning.policy.logprobs import token_logprobs
from hybrid_lightning.rollout.padding import pad_left, pad_right
from hybrid_lightning.types import Sequences

LONG = [7, 8, 9, 10, 11, 12, 13]
# Rows of the same prompt next to each other share its forward pass; the first three rows share nothing.
SEPARATE = ([[4, 5, 13, 6, 16], [9], LONG], [[5, 2], [4, 6, 7, 2], [9, 10, 11]])
SHARED = ([LONG, LONG, LONG, [9], [9], LONG], [[5, 2], [4, 6, 7, 2], [9, 10, 11], [2], [4, 4], [5, 2]])
CASES = {"separate": SEPARATE, "shared": SHARED}


def build_sequences(case):
    prompts, completions = CASES[case]
    return Sequences(*pad_left(prompts, 0, "cpu"), *pad_right(completions, 0, "cpu"))


def plain(model, case, row, temperature):
    prompt, completion = CASES[case][0][row], CASES[case][1][row]
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float() / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_neither_padding_nor_sharing_changes_values_and_entropies(family, case):
    model = build_model(family)
    logprobs, entropy = token_logprobs(model, build_sequences(case), temperature=0.8)
    for row, completion in enumerate(CASES[case][1]):
        expected, expected_entropy = plain(model, case, row, 0.8)
        torch.testing.assert_close(logprobs[row, : len(completion)], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[row, : len(completion)], expected_entropy, atol=1e-5, rtol=0)
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_separate_unpadded_passes(family, case):
    model = build_model(family).requires_grad_(True)
    sequences = build_sequences(case)
    logprobs, entropy = token_logprobs(model, sequences, temperature=1.0)
    assert not entropy.requires_grad
    (logprobs * sequences.completion_mask).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.stack([plain(model, case, row, 1.0)[0].sum() for row in range(len(sequences))]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, atol=2e-5, rtol=1e-4)


def test_sharing_is_used_where_it_saves_work():
    model = build_model("llama")
    widths = []
    model.register_forward_pre_hook(lambda _, __, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    token_logprobs(model, build_sequences("shared"), 1.0)
    assert widths == [(3, 7), (6, 3)], "three runs of prompts, then six rows of completions"
    widths.clear()
    token_logprobs(model, build_sequences("separate"), 1.0)
    assert widths == [(3, 11)]


def test_blocks_of_rows_give_the_same(monkeypatch):
    model = build_model("llama").requires_grad_(True)
    sequences = build_sequences("shared")

    def run():
        model.zero_grad()
        logprobs, entropy = token_logprobs(model, sequences, 0.9)
        logprobs.sum().backward()
        return logprobs.detach(), entropy, {name: p.grad.clone() for name, p in model.named_parameters()}

    whole = run()
    monkeypatch.setattr("hybrid_lightning.policy.logprobs._BLOCK", 2 * 4 * 47)
    blocks = run()
    torch.testing.assert_close(blocks[:2], whole[:2])
    torch.testing.assert_close(blocks[2], whole[2])


def test_gradient_checkpointing_gives_the_same_gradients():
    sequences = build_sequences("shared")
    gradients = []
    for checkpointing in (False, True):
        model = build_model("llama").requires_grad_(True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        token_logprobs(model, sequences, 1.0)[0].masked_fill(~sequences.completion_mask, 0).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-5, rtol=1e-4)


def test_rows_cut_padding_that_all_share():
    rows = build_sequences("separate").rows(slice(0, 1))
    assert rows.prompt_ids.tolist() == [SEPARATE[0][0]] and rows.completion_ids.tolist() == [SEPARATE[1][0]]
    model = build_model("llama")
    alone, _ = token_logprobs(model, rows, 1.0)
    torch.testing.assert_close(alone[0], plain(model, "separate", 0, 1.0)[0], atol=1e-5, rtol=0)
