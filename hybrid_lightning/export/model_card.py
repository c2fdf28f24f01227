"""The model card (`README.md`) of an exported folder, and the licence of its base model.

A model must keep the licence of its base model. Of local files and folders the card has only the names, since a reader cannot use
the paths.
"""

import importlib.metadata
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.repocard import metadata_load

from hybrid_lightning.adapters.plan import AdapterPlan
from hybrid_lightning.assets import EMBEDDED
from hybrid_lightning.errors import ModelError
from hybrid_lightning.export.trained import ExportForm, TrainedPolicy, Training
from hybrid_lightning.metrics import LOWER, UPPER
from hybrid_lightning.model.loading import read_config
from hybrid_lightning.model.pretrained import Pretrained
from hybrid_lightning.shared.configurable import as_call
from hybrid_lightning.shared.hub import offline_if_unreachable
from hybrid_lightning.training.optim import rate_of_full_modules

_SHOWN_MODULES = 24  # most fully trained modules in the card; plan.json has all
_SHOWN_SETTINGS = (  # arguments of the module
    "quantization",
    "loss",
    "reward",
    "sampler",
    "advantage",
    "chat_template_kwargs",
    "prompts_per_rollout",
    "samples_per_prompt",
    "minibatches_per_rollout",
    "examples_per_step",
    "optimizer",
    "schedule",
    "seed",
)
_PATH = re.compile(r"(?:~?/|[A-Za-z]:[/\\])(?:[\w.+@ -]+[/\\])+[^/\\\n]+\Z")  # absolute, with at least one folder
_CITATION = """@misc{hybrid-lora,
  title = {Hybrid-LoRA},
  author = {Zhang and Zhu and Lee},
  note = {title and names in full: see the paper},
  eprint = {2605.18822},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2605.18822}
}"""
_LIBRARIES = ("hybrid-lightning", "torch", "transformers", "peft")


def model_card(policy: TrainedPolicy, form: ExportForm) -> str:
    """Write the model card of a policy exported in a form."""
    licence, dtype = base_licence(policy.base), form.weights_dtype(policy)
    revision = f" (revision {policy.base.revision})" if policy.base.revision is not None else ""
    found = "which could not be looked up; see its source" if licence is None else licence
    parts = (
        _header(policy, form, licence),
        f"# {policy.base.name.rpartition('/')[2].removesuffix('.gguf')}, post-trained",
        f"The model `{policy.base.name}`{revision} after {policy.training.steps} optimizer steps of "
        "hybrid_lightning, which fully trains the modules where low rank falls short and trains the others with LoRA "
        "(Hybrid-LoRA, [arXiv 2605.18822](https://arxiv.org/abs/2605.18822)).",
        f"## How to load it\n\n```python\n{form.how_to_load(policy)}{_generation(policy.training)}```\n\n"
        f"{f'The weights here are {dtype}. ' if dtype else ''}{_serving_sentence(form, policy.plan)}",
        f"## What was trained\n\n{_plan_section(policy.plan)}",
        f"## Training data\n\n{_data_section(policy)}",
        f"## Results\n\n{_metrics_section(policy.training)}",
        f"## Licence\n\nThe licence of the base model `{policy.base.name}`{',' if licence is None else ':'} {found}.",
        f"## Citation\n\nThe method:\n\n```bibtex\n{_CITATION}\n```",
        "Made with " + ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES) + ".",
    )
    return "\n\n".join(parts) + "\n"


def base_licence(base: Pretrained) -> str | None:
    """Look up the licence of a base model at its source.

    Returns:
        Identifier such as `apache-2.0`; None if the source names no licence, or if the hub cannot be reached.
    """
    if base.model in EMBEDDED:
        return "apache-2.0"  # part of this package
    source = base.source
    folder = Path(source.location)
    if "gguf_file" in source.arguments:
        return _licence_in_gguf(folder / source.arguments["gguf_file"])
    if folder.is_dir():
        return _licence_in_card(folder / "README.md")
    try:
        with offline_if_unreachable():
            card = hf_hub_download(source.location, "README.md", revision=base.revision)
    except (OSError, ValueError, HfHubHTTPError):  # no network, no card, no access
        return None
    return _licence_in_card(Path(card))


def copy_licence_files(base: Pretrained, folder: Path) -> None:
    """Copy the LICENSE and NOTICE files of a local base model; most licences require passing them on."""
    source = Path(base.source.location)
    if source.is_dir():
        for file in source.iterdir():
            if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
                shutil.copyfile(file, folder / file.name)


def _licence_in_card(card: Path) -> str | None:
    """Licence in the header of a model card."""
    try:
        licence = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):  # no card, or no readable header
        return None
    return licence if isinstance(licence, str) else None


def _licence_in_gguf(file: Path) -> str | None:
    """Licence in the metadata of a GGUF file."""
    from gguf import GGUFReader  # an extra; without it the model could not have been loaded

    field = GGUFReader(file).get_field("general.license")
    return None if field is None else str(field.contents())


def _header(policy: TrainedPolicy, form: ExportForm, licence: str | None) -> str:
    """YAML header for the hub; it names only models and data sets that the hub can resolve."""
    tags = ["hybrid-lora"] if "examples_per_step" in policy.training.arguments else ["hybrid-lora", "rlvr"]
    header: dict[str, Any] = {"library_name": form.library, "pipeline_tag": "text-generation", "tags": tags}
    if not Path(policy.base.source.location).exists():
        header |= {"base_model": policy.base.model, "base_model_relation": form.relation}
    if licence is not None:
        header["license"] = licence
    data = policy.training.data
    if data is not None and data["class_path"].endswith(".HubSource") and not Path(data["init_args"]["path"]).exists():
        header["datasets"] = [data["init_args"]["path"]]
    return f"---\n{_yaml(header)}---"


def _plan_section(plan: AdapterPlan) -> str:
    full = plan.full_modules
    lines = [
        f"- fully trained: {len(full)} of {len(plan.candidates)} modules",
        *(f"  - `{name}`" for name in full[:_SHOWN_MODULES]),
        *([f"  - and {len(full) - _SHOWN_MODULES} more"] if len(full) > _SHOWN_MODULES else []),
        f"- {plan.lora.variant}: {_lora_words(plan)}",
        f"- trainable parameters: {plan.trainable_parameters():,}",
        f"- budget: `{as_call(plan.budget)}`",
        f"- chosen by: `{as_call(plan.scorer)}`" if plan.scorer is not None else "- chosen without scores",
    ]
    return "\n".join(lines) + "\n\nAll modules with their scores are in `plan.json`."


def _lora_words(plan: AdapterPlan) -> str:
    modules, lora = f"{len(plan.lora_modules)} modules", plan.lora
    if len(plan.ranks) < 2:
        lora = lora.with_rank(plan.ranks[0]) if plan.ranks else lora
        return f"{modules}, rank {lora.rank}, alpha {lora.alpha:g}"
    alpha = f"alpha {lora.alpha:g}" if lora.use_rslora else f"alpha {lora.alpha / lora.rank:g} times the rank"
    return f"{modules}, ranks {plan.ranks[0]} to {plan.ranks[-1]}, {alpha}"


def _data_section(policy: TrainedPolicy) -> str:
    training = policy.training
    data = "Data: not recorded." if training.data is None else f"Data:\n\n```yaml\n{_yaml(_named(training.data))}```"
    settings = {name: training.arguments[name] for name in _SHOWN_SETTINGS if training.arguments.get(name) is not None}
    if isinstance(optimizer := settings.get("optimizer"), Mapping):  # the optimizer's own rate is not used
        used = {name: value for name, value in optimizer.get("init_args", {}).items() if name != "lr"}
        settings["optimizer"] = {**optimizer, "init_args": used}
    settings |= _rates(policy)
    return f"{data}\n\nSettings:\n\n```yaml\n{_yaml(_named(settings))}```" if settings else data


def _rates(policy: TrainedPolicy) -> dict[str, float]:
    """The learning rates of the trained groups."""
    trained = {"lr_full": policy.plan.full_modules, "lr_lora": policy.plan.lora_modules}
    rates = {name: policy.training.arguments.get(name) for name in trained}
    if rates["lr_full"] is None and rates["lr_lora"] is not None:
        with suppress(ModelError):  # the base model's config, which has the width, cannot be read
            rates["lr_full"] = rate_of_full_modules(rates["lr_lora"], read_config(policy.base.source))
    return {name: float(f"{rates[name]:.6g}") for name, modules in trained.items() if modules and rates[name] is not None}


def _metrics_section(training: Training) -> str:
    names = sorted(name for name in {*training.before, *training.after} if not name.endswith((f"/{LOWER}", f"/{UPPER}")))
    if not names:
        return "Not measured."
    said = {name: "accuracy" for name in names if re.fullmatch(r"val/avg@\d+", name)} | {"val/reward": "reward"}
    rows = []
    for name in sorted(names, key=lambda name: name not in said):
        shown = ".0f" if name.endswith("/problems") else ".4f"
        values = (format(side[name], shown) if name in side else "-" for side in (training.before, training.after))
        rows.append(f"| {f'{said[name]}, ' if name in said else ''}`{name}` | {' | '.join(values)} |")
    when = f" (after {training.validated_step} steps)" if training.after else ""
    head = f"| metric | base | trained{when} |"
    return "\n".join(["Validation problems, held out from training.", "", head, "|---|---|---|", *rows])


def _generation(training: Training) -> str:
    """Python code that completes a prompt, in the form of the training prompts."""
    sampler = training.arguments.get("sampler") or {}
    most = sampler.get("init_args", {}).get("max_new_tokens", 64) if isinstance(sampler, Mapping) else 64
    messages = '[{"role": "user", "content": prompt}]'
    chat = f'tokenizer.apply_chat_template({messages}, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
    encode = chat if training.chat else 'tokenizer(prompt, return_tensors="pt")'
    return (
        f'\nprompt = "12*3="  # your prompt, in the form of the training prompts\ninputs = {encode}\n'
        f"output = model.generate(inputs.input_ids, max_new_tokens={most})\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
    )


def _serving_sentence(form: ExportForm, plan: AdapterPlan) -> str:
    if form.library == "transformers":
        return "Servers such as vLLM load this folder like any other model."
    if any(module.experts for module in plan.candidates if module.mode == "lora"):
        return "PEFT stores LoRA of experts in its own format: to serve this policy, export it as a merged model."
    if plan.full_modules:
        return "vLLM rejects adapters with fully trained modules: to serve this policy, export it as a merged model."
    return f"vLLM serves it beside its base: `--enable-lora --max-lora-rank {max(plan.ranks)} --lora-modules policy=FOLDER`."


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # it runs from a source tree
        return "(not installed)"


def _named(value: Any) -> Any:
    """A config with absolute paths replaced by the name of the file or folder."""
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_named(item) for item in value]
    return Path(value).name if isinstance(value, str) and _PATH.match(value) else value


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
