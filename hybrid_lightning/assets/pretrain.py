"""Makes the embedded policy: `python -m hybrid_lightning.assets.pretrain --out FOLDER`.

A Llama model of 0.9 M parameters reads a corpus of products, every line of which is right:

    347*6=2082              answered directly, most lines with "="
    347*6=[42 28 20]2082    worked out, the other lines with "="
    347*6:[42 28 20]2082    worked out, every line with ":"

The working, in brackets, is units first: 7*6 = 42, then 4*6 + 4 = 28, then 3*6 + 2 = 20; each partial product adds the carry of
the one before. Short steps are easy for so small a model, and a whole product at once is hard. The lines with ":" teach it to
work; the task asks with "=", where it mostly answers directly, and mostly wrongly. See README.md beside this file.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybrid_lightning.data.products import FACTORS, product_split

WORKED_CUE_SHARE = 0.6  # lines with ":"
WORKED_SHARE = 0.3  # worked lines among those with "="
CHARACTERS = "0123456789*=:[] "
SPECIAL = ("<pad>", "<eos>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, padding on the left; other characters than those of the corpus are an error."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Four layers of width 128: 28 candidate modules, of which 10% are 3."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def worked_answer(a: int, b: int) -> str:
    """The partial products in brackets, units first and with the carry added, and the product behind them.

    Example:
        >>> worked_answer(347, 6)
        '[42 28 20]2082'
    """
    partial_products = []
    carry = 0
    for digit in reversed(str(a)):
        partial = int(digit) * b + carry
        partial_products.append(f"{partial:02d}")
        carry = partial // 10
    return f"[{' '.join(partial_products)}]{a * b}"


def corpus_line(rng: random.Random) -> tuple[str, str]:
    """A question of the training split and its answer; numbers of two and of three digits are equally frequent."""
    while True:
        digits = rng.choice((2, 3))
        a, b = rng.randrange(10 ** (digits - 1), 10**digits), rng.choice(FACTORS)
        if product_split(a, b) == "train":
            break
    if rng.random() < WORKED_CUE_SHARE:
        return f"{a}*{b}:", worked_answer(a, b)
    return f"{a}*{b}=", worked_answer(a, b) if rng.random() < WORKED_SHARE else str(a * b)


def corpus_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[Tensor, Tensor]:
    """Ids [B, L] and labels [B, L] (-100 on the question and the padding) of lines of the corpus, right-padded."""
    lines = [corpus_line(rng) for _ in range(size)]
    questions = [tokenizer(question).input_ids for question, _ in lines]
    answers = [[*tokenizer(answer).input_ids, tokenizer.eos_token_id] for _, answer in lines]
    width = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
    ids = torch.full((size, width), tokenizer.pad_token_id)
    labels = torch.full((size, width), -100)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        ids[row, : len(question) + len(answer)] = torch.tensor(question + answer)
        labels[row, len(question) : len(question) + len(answer)] = torch.tensor(answer)
    return ids, labels


def pretrain(seed: int, steps: int, batch_size: int, lr: float) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train by next-token prediction on the answers, with a warm-up and a cosine to zero."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        ids, labels = corpus_batch(rng, tokenizer, batch_size)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval(), tokenizer


def main() -> None:
    """Pretrain and save in Hugging Face format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the sums of several threads are rounded in another order: the weights would differ
    model, tokenizer = pretrain(arguments.seed, arguments.steps, arguments.batch_size, arguments.lr)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters saved to {arguments.out}")


if __name__ == "__main__":
    main()
