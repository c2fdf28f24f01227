"""Exports only the adapter, as PEFT saves it: `AdapterFolder`, or `LoraFolder` if no module is fully trained."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.errors import ConfigError
from hybrid_lightning.export.trained import ExportForm, TrainedPolicy


class AdapterFolder(ExportForm):
    """The adapter in float32: LoRA, and the fully trained modules as PEFT's `modules_to_save`.

    `PeftModel.from_pretrained` loads it onto the base model. vLLM loads only adapters that can be exported as `LoraFolder`.
    """

    name = "adapter"
    library = "peft"
    relation = "adapter"

    def weights_dtype(self, policy: TrainedPolicy) -> str:
        """Always float32, the dtype of trainable weights."""
        return "float32"

    def write(self, policy: TrainedPolicy, folder: Path) -> None:
        """Write the adapter and the tokenizer.

        Raises:
            ConfigError: If the base model is itself an adapter, or if the plan has DoRA on modules that PEFT takes for experts
                (see `target_exactly`).
            PlanError: If modules of the plan are missing in the base model.
        """
        source, skeleton = policy.base.source, policy.base.skeleton()
        if source.adapter is not None:
            raise ConfigError(
                f"form=AdapterFolder: the run started from the adapter {policy.base.model!r}, and PEFT cannot stack adapters; "
                "export form=MergedModel"
            )
        policy.plan.check_model(skeleton)
        config = policy.plan.to_peft_config(skeleton)
        path = Path(source.location)  # absolute, since an adapter may be loaded from any working directory
        config.base_model_name_or_path = str(path.absolute()) if path.exists() else source.location
        config.revision = policy.base.revision
        config.inference_mode = True  # a loaded adapter is frozen, unless it is loaded as trainable
        config.save_pretrained(str(folder))
        weights = {name: weight.to(torch.float32).contiguous() for name, weight in policy.weights.items()}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        policy.base.trained_tokenizer.save_pretrained(folder)

    def how_to_load(self, policy: TrainedPolicy) -> str:
        """Python code that loads the base model, then the adapter."""
        source = policy.base.source
        options = {"dtype": policy.base.dtype, **source.arguments}
        arguments = "".join(f", {name}={value!r}" for name, value in options.items())
        local = Path(source.location).exists()
        base = "PeftConfig.from_pretrained(folder).base_model_name_or_path" if local else repr(source.location)
        return (
            f"from peft import {'PeftConfig, ' if local else ''}PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'folder = "."  # this one\n'
            f"base_model = {base}{f'  # where {policy.base.name} was; elsewhere your copy of it' if local else ''}\n"
            f"base = AutoModelForCausalLM.from_pretrained(base_model{arguments})\n"
            "model = PeftModel.from_pretrained(base, folder)\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        )


class LoraFolder(AdapterFolder):
    """The adapter as plain LoRA, if no module is fully trained; servers such as vLLM load it onto a base model."""

    name = "lora"

    def check(self, plan: AdapterPlan) -> None:
        """Reject plans with more than plain LoRA.

        Raises:
            ConfigError: If the plan trains modules fully, uses DoRA, or has LoRA on experts.
        """
        if plan.full_modules:
            raise ConfigError(
                f"form=LoraFolder: the plan trains {len(plan.full_modules)} modules fully, such as {plan.full_modules[0]}, which "
                "a LoRA folder cannot hold; export form=MergedModel to serve the policy, or form=AdapterFolder for PEFT"
            )
        if plan.lora.use_dora:
            raise ConfigError("form=LoraFolder: the plan has DoRA, which vLLM rejects; export form=MergedModel to serve it")
        if plan.has_experts:
            raise ConfigError(
                "form=LoraFolder: the plan has LoRA on experts, which PEFT stores in its own format; export form=MergedModel to "
                "serve it, or form=AdapterFolder for PEFT"
            )
