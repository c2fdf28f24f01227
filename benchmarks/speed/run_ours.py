"""Worker: hybrid_lightning with LoRA on all linear layers, as TRL and PEFT have it."""

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

from benchmarks.training import Gated, build_policy, train
from benchmarks.worker import Gate
from benchmarks.workloads import Settings
from hybrid_lightning.adapters.budgets import ModuleBudget
from hybrid_lightning.callbacks import HybridAdapterSetup


def main() -> None:
    settings = Settings.from_arguments()
    workload, gate = settings.workload, Gate(settings)
    adapter = HybridAdapterSetup(budget=ModuleBudget(share=0.0), rank=workload.rank, alpha=workload.alpha)
    train(settings, build_policy(settings), [adapter, Gated(gate)])


if __name__ == "__main__":
    main()
