"""Makes the start policies that the tasks of the study name: `python -m benchmarks.study.pretrain`.

One thread and a seed make them repeatable on one machine and one version of PyTorch. The embedded policy, which the tasks with
products name, is shipped in the package. With `--seeds` it makes others, one for each seed of the frontier.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.embedded_policy import pretrain_on
from benchmarks.study.policies import RECIPES, folder_of


def make(name: str, seed: int, own_folder: bool) -> None:
    """Pretrain a start policy and save it, unless it is there.

    Args:
        name: Of its recipe.
        seed: Of new weights, corpus and its order.
        own_folder: Whether its folder is named by the seed, too.
    """
    torch.set_num_threads(1)
    folder = folder_of(name, seed if own_folder else None)
    if (folder / "config.json").exists():
        print(f"{folder} is there already; remove it to make it anew")
        return
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    tokenizer = recipe.tokenizer()
    model = pretrain_on(
        recipe.model(tokenizer),
        tokenizer,
        recipe.corpus(seed),
        seed=seed,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        progress=not own_folder,
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # its config.json last says that the folder is whole
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters saved to {folder}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--policy", nargs="+", choices=RECIPES, default=["wide", "deep"], help="default: those of the tasks")
    parser.add_argument("--seed", type=int, default=0, help="of new weights, corpus and its order")
    parser.add_argument("--seeds", type=int, nargs="+", help="one policy for each of these seeds, in a folder of its own")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="with --seeds; default: the cores")
    arguments = parser.parse_args()
    if arguments.seeds is None:
        for name in arguments.policy:
            make(name, arguments.seed, own_folder=False)
        return
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for made in [pool.submit(make, name, seed, True) for seed in arguments.seeds for name in arguments.policy]:
            made.result()


if __name__ == "__main__":
    main()
