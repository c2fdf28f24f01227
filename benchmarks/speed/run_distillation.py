"""Worker: TRL's DistillationTrainer with PEFT, or hybrid_lightning with LoRA, on the reverse KL over the vocabulary."""

from hybrid_lightning.process import prepare_process

prepare_process()  # as `python -m hybrid_lightning` does, which changes nothing that TRL computes

import tempfile
from typing import Any

import torch

from benchmarks.worker import Gate
from benchmarks.workloads import Settings, fastest_settings


def ours(settings: Settings) -> None:
    """Train with this project; the teacher is the start policy's model, loaded again."""
    from benchmarks.training import Gated, build_adapter, build_policy, train
    from hybrid_lightning.advantages import NoAdvantage
    from hybrid_lightning.losses import DAPOLoss, ReverseKL
    from hybrid_lightning.training import ModelTeacher

    learned: dict[str, Any] = {"teacher": ModelTeacher(str(settings.folder)), "distillation": ReverseKL()}
    policy = build_policy(settings, loss=DAPOLoss(), advantage=NoAdvantage(), **learned)  # which is a mean over tokens, as TRL's
    train(settings, policy, [build_adapter(settings.workload), Gated(Gate(settings))])


def trl(settings: Settings) -> None:
    """Train with TRL."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    workload, gate = settings.workload, Gate(settings)
    chosen = {**fastest_settings(workload), **settings.overrides}
    at_once = min(int(chosen["per_device_train_batch_size"]), workload.rows)

    lengths: list[int] = []

    class Trainer(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            lengths[:] = made["completion_mask"].sum(dim=1).tolist()
            return made

    class Waits(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = not gate.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            gate.done(lengths, state.global_step)
            control.should_training_stop = not gate.wait()

    def load() -> Any:
        options = {"dtype": getattr(torch, workload.dtype), "attn_implementation": chosen["attn_implementation"]}
        return AutoModelForCausalLM.from_pretrained(settings.folder, **options)

    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            use_cpu=settings.device == "cpu",
            bf16=workload.dtype == "bfloat16",
            seed=settings.seed,
            max_steps=settings.rollouts,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=workload.rows // at_once,
            gradient_checkpointing=False,
            max_completion_length=workload.max_new_tokens,
            beta=1.0,
            shuffle_dataset=False,
            learning_rate=workload.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=1.0,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(settings.folder, padding_side="left")
        trainer = Trainer(
            model=load(),
            teacher_model=load(),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": settings.prompts}),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=workload.rank, lora_alpha=workload.alpha, target_modules="all-linear"
            ),
            callbacks=[Waits()],
        )
        model: Any = trainer.model
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        gate.ready(tokenizer(settings.prompts)["input_ids"], trained, settings=chosen)
        trainer.train()


if __name__ == "__main__":
    given = Settings.from_arguments()
    {"ours": ours, "trl": trl}[given.side](given)
