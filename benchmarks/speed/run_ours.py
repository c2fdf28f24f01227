"""Worker: hybrid_lightning with LoRA on all linear layers, like TRL and PEFT."""

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does

from benchmarks.training import Gated, build_adapter, build_policy, train
from benchmarks.worker import Gate
from benchmarks.workloads import Settings


def main() -> None:
    settings = Settings.from_arguments()
    gate = Gate(settings)
    train(settings, build_policy(settings), [build_adapter(settings.workload), Gated(gate)])


if __name__ == "__main__":
    main()
