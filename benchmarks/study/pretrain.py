"""Makes the start policies that the tasks of the study name: `python -m benchmarks.study.pretrain`.

One thread and a seed make them repeatable on one machine and one version of PyTorch. The embedded policy, of the tasks with
products, is shipped in the package.
"""

import argparse

import torch

from benchmarks.embedded_policy import pretrain_on
from benchmarks.study.policies import FOLDER, RECIPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--policy", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0, help="of new weights, corpus and its order")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.policy:
        folder = FOLDER / name
        if (folder / "config.json").exists():
            print(f"{folder} is there already; remove it to make it anew")
            continue
        recipe = RECIPES[name]
        torch.manual_seed(arguments.seed)
        tokenizer = recipe.tokenizer()
        model = pretrain_on(
            recipe.model(tokenizer),
            tokenizer,
            recipe.corpus(arguments.seed),
            seed=arguments.seed,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            progress=True,
        )
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)  # its config.json last says that the folder is whole
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters saved to {folder}")


if __name__ == "__main__":
    main()
