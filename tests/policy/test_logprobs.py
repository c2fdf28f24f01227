import pytest
import torch
from conftest import FAMILIES, build_model

from hybrid_lightning.policy.logprobs import token_logprobs
from hybrid_lightning.rollout.padding import pad_left, pad_right
from hybrid_lightning.types import Sequences

PROMPTS = [[4, 5, 13, 6, 16], [9], [7, 8, 9, 10, 11, 12, 13]]
COMPLETIONS = [[5, 2], [4, 6, 7, 2], [9, 10, 11]]


def build_sequences():
    return Sequences(*pad_left(PROMPTS, 0, "cpu"), *pad_right(COMPLETIONS, 0, "cpu"))


def plain(model, row, temperature):
    prompt, completion = PROMPTS[row], COMPLETIONS[row]
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float() / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_values_nor_entropies(family):
    model = build_model(family)
    logprobs, entropy = token_logprobs(model, build_sequences(), temperature=0.8)
    for row, completion in enumerate(COMPLETIONS):
        expected, expected_entropy = plain(model, row, 0.8)
        torch.testing.assert_close(logprobs[row, : len(completion)], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[row, : len(completion)], expected_entropy, atol=1e-5, rtol=0)
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_separate_unpadded_passes(family):
    model = build_model(family).requires_grad_(True)
    sequences = build_sequences()
    logprobs, entropy = token_logprobs(model, sequences, temperature=1.0)
    assert not entropy.requires_grad
    (logprobs * sequences.completion_mask).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.stack([plain(model, row, 1.0)[0].sum() for row in range(3)]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, atol=2e-5, rtol=1e-4)


def test_rows_cut_padding_that_all_share():
    rows = build_sequences().rows(slice(0, 1))
    assert rows.prompt_ids.tolist() == [PROMPTS[0]] and rows.completion_ids.tolist() == [COMPLETIONS[0]]
    model = build_model("llama")
    alone, _ = token_logprobs(model, rows, 1.0)
    torch.testing.assert_close(alone[0], plain(model, 0, 1.0)[0], atol=1e-5, rtol=0)
