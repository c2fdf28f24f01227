"""Makes the start policies that the tasks of the study name: `python -m benchmarks.study.pretrain`.

With one thread and a seed, they are repeatable on one machine and one version of PyTorch. The embedded policy, which the tasks
with products name, is shipped in the package. `--seeds` makes other policies, one for each seed of the frontier. A policy that
has not learned its pretraining data, by its recipe's test, is drawn again: no method could teach it anything.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.commands import CORES, command
from benchmarks.embedded_policy import pretrain_on
from benchmarks.study.policies import RECIPES, PolicyRecipe, folder_of

ATTEMPTS = 5
QUESTIONS = 500  # that test whether a policy has learned


def make(name: str, seed: int, own_folder: bool) -> None:
    """Pretrain a start policy and save it, unless it is there."""
    torch.set_num_threads(1)
    folder, recipe = folder_of(name, seed if own_folder else None), RECIPES[name]
    if (folder / "config.json").exists():
        print(f"{folder} is there already; remove it to make it again")
        return
    tokenizer = recipe.tokenizer()
    for attempt in range(ATTEMPTS):
        drawn = seed + 10_000 * attempt
        torch.manual_seed(drawn)
        how = {"steps": recipe.steps, "batch_size": recipe.batch_size, "lr": recipe.lr}
        new, corpus = recipe.model(tokenizer), recipe.corpus(drawn)
        model = pretrain_on(new, tokenizer, corpus, seed=drawn, progress=not own_folder, **how)
        if recipe.learned_below is None or (loss := answer_loss(model, tokenizer, recipe)) < recipe.learned_below:
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)  # config.json comes last: with it the folder is complete
            print(f"{sum(p.numel() for p in model.parameters()):,} parameters saved to {folder}", flush=True)
            return
        print(f"{folder} has not learned ({loss:.2f} nats a token); trying other weights", flush=True)
    raise SystemExit(f"error: none of {ATTEMPTS} policies of {name}, seed {seed}, has learned; give another seed")


@torch.no_grad()
def answer_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: PolicyRecipe) -> float:
    """Nats per token of the answers to questions like the pretraining's, on which no seed was pretrained."""
    total, tokens = 0.0, 0
    for row in recipe.lines(QUESTIONS, 1_000_000).read().train:
        question, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row.question, str(row.answer)))
        logprobs = model(torch.tensor([question + answer])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[len(question) - 1 + place, token]) for place, token in enumerate(answer))
        tokens += len(answer)
    return total / tokens


def main() -> None:
    parser = command("study.pretrain", __doc__)
    parser.add_argument("--policy", nargs="+", choices=RECIPES, default=["wide", "deep"], help="default: the tasks' own")
    parser.add_argument("--seeds", type=int, nargs="+", help="one policy for each of these seeds, in a folder of its own")
    parser.add_argument("--workers", type=int, default=CORES, help="with --seeds; default: the cores")
    arguments = parser.parse_args()
    if arguments.seeds is None:
        for name in arguments.policy:
            make(name, 0, own_folder=False)
        return
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for made in [pool.submit(make, name, seed, True) for seed in arguments.seeds for name in arguments.policy]:
            made.result()


if __name__ == "__main__":
    main()
