"""Writes the reference pages that come from docstrings, and the table of what was tried with families of models.

    python docs/generate.py             # reference/configuration.md and reference/api.md; or --check, whether they are stale
    python docs/generate.py --models    # reference/models.md, by tests/families: minutes

They are kept in git so that they can be read in the repository; a test fails when one of them is stale.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whatever is installed

import hybrid_lightning.cli.main as cli
from hybrid_lightning import export
from hybrid_lightning.callbacks import HybridAdapterSetup, PolicyExport, PredictionWriter, RewardDivergence, RolloutSamples
from hybrid_lightning.cli.help import Section
from hybrid_lightning.cli.parser import known_classes, type_of
from hybrid_lightning.data import PromptDataModule
from hybrid_lightning.sharding import FSDP2Strategy
from hybrid_lightning.shared.configurable import public_path
from hybrid_lightning.training import LanguageModule, PolicyModule

REFERENCE = Path(__file__).parent / "reference"
# Rooms of the package with public names, in the order of the two flows.
ROOMS = (
    "types", "data", "agents", "rollout", "rewards", "advantages", "losses", "adapters", "model", "training", "metrics",
    "sharding", "export", "callbacks", "trainer", "process", "shared.configurable", "errors",
)  # fmt: skip
GENERATED = "<!-- Written by docs/generate.py from signatures and docstrings: change those and run it again. -->\n"

_CONFIGURATION = """\
# Configuration

Most runs start from a [shipped config](commands.md) and change only these options.

| to choose | option |
|---|---|
| the model | [`model.model`](#policymodule): a folder, a GGUF file, a hub id, or `embedded` |
| your problems | [`data.source=FileSource`](#filesource), `data.source.train=FILE`, `data.source.validation_fraction` |
| how a problem is written | [`data.format`](#promptdatamodule): `ChatFormat` or `PlainFormat` |
| what is rewarded | [`model.reward`](#policymodule): `MathMatch`, `ExactMatch`, `FunctionReward`, ... |
| the learning rate | `model.lr_lora`; `model.lr_full` follows from it |
| LoRA, hybrid or full | [`adapter.rank`, `adapter.alpha`](#hybridadaptersetup), `adapter.budget.share` (0: LoRA, 1: full) |
| how much is sampled | `model.prompts_per_rollout`, `model.samples_per_prompt`, [`model.sampler.max_new_tokens`](#sampler) |
| how long to train | `trainer.max_steps`, `trainer.val_check_interval` |
| precision | `model.dtype`, `trainer.precision` |
| seeds | `seed_everything`, `model.seed` |

Set an option in a config, or on the command line after it:

```yaml
model:
  loss:
    class_path: GSPOLoss
    init_args: {clip_high: 5.0e-4}
```

```bash
python -m hybrid_lightning fit --config configs/gspo.yaml --model.loss=GSPOLoss --model.loss.clip_high=5e-4
```

- Parts such as losses and rewards are classes. A config names one by `class_path` and `init_args`, the command line by
  `--KEY=CLASS` and `--KEY.OPTION=VALUE`. A class of this package goes by its name alone, any other by `module.Class`.
- Where a text below says None, write `null`.
- `--print_config` shows the config that results. `--help` after a command and its config lists the options of the classes that
  the config names, with their values.

The rest of this page lists every option of every class that a config or the command line can name. The options of `trainer`, of
optimizers and of loggers are Lightning's or torch's and are not listed, but these defaults differ from Lightning's:

"""


def configuration() -> str:
    """The page of all options."""
    page = [GENERATED, _CONFIGURATION, *_changed_defaults()]
    seen: set[type] = set()
    for title, text, key, classes in _roots():
        page.append(f"\n## {title}\n\n{text}\n")
        for place, part, options in _parts(key, classes):
            if part not in seen:
                seen.add(part)
                page.append(f"\n### {part.__name__}\n\n`{place}`: {_sentence(part)}\n\n")
                page += [_option(action) for action in options] or ["No options.\n"]
    return "".join(page)


def keys() -> set[str]:
    """All options as they are typed, such as `model.loss.clip_low`, and what can be named, such as `model.loss`."""
    return {action.dest for _, _, key, classes in _roots() for _, _, options in _parts(key, classes) for action in options}


def _parts(key: str, classes: list[type]) -> Iterator[tuple[str, type, list[Any]]]:
    """Yield where a class can be named, the class, and its options; the classes of its options come after all of its kind."""
    waiting = [(key, part) for part in classes]
    found = set()
    while waiting:
        place, part = waiting.pop(0)
        if (place, part) in found or place.count(".") > 3:
            continue
        found.add((place, part))
        options = Section(place, part, {}).options()
        yield place, part, options
        waiting += [(action.dest, other) for action in options for other in _ours(type_of(action))]


def _roots() -> Iterator[tuple[str, str, str, list[type]]]:
    models = sorted(_ours(LanguageModule), key=lambda part: part is not PolicyModule)  # stable: it comes first
    yield "model", "The model and how it is trained: by RL, on demonstrations, or on preferences.", "model", models
    yield "data", "Where problems come from, and how they become prompts.", "data", [PromptDataModule]
    yield "adapter", "Which modules are fully trained, and the LoRA of the others.", "adapter", [HybridAdapterSetup]
    yield "samples", "Pages of sampled completions for the loggers.", "samples", [RolloutSamples]
    yield "divergence", "A warning where a part of the reward rises while correctness falls.", "divergence", [RewardDivergence]
    yield "predictions", "The file that `predict` writes.", "predictions", [PredictionWriter]
    yield "form", "The form of an export: `--form CLASS`, `--form.OPTION`.", "form", _ours(export.ExportForm)
    text = "Add a callback with `--trainer.callbacks+=CLASS`. Every command adds its own as well."
    yield "trainer.callbacks", text, "trainer.callbacks", [PolicyExport]
    text = "For several devices: `configs/strategy/` has overlays. Options that are not listed are Lightning's."
    yield "trainer.strategy", text, "trainer.strategy", [FSDP2Strategy]


def _changed_defaults() -> list[str]:
    given = {key: value for key, value in added().defaults.items() if key.startswith(("trainer.", "checkpoint."))}
    theirs: dict[str, Any] = {}
    for key, base in (("trainer", LightningTrainer), ("checkpoint", LightningModelCheckpoint)):
        parameters = inspect.signature(base.__init__).parameters.values()
        theirs |= {f"{key}.{parameter.name}": parameter.default for parameter in parameters}
    rows = [f"| `{key}` | `{_plain(value)}` | `{_plain(theirs[key])}` |\n" for key, value in given.items()]
    return ["| option | default here | Lightning's |\n|---|---|---|\n", *rows]


class _Recorder:
    """Records what the command line adds to its parser."""

    def __init__(self) -> None:
        self.parts: dict[str, type] = {}
        self.defaults: dict[str, Any] = {}

    def add_lightning_class_args(self, part: type, key: str) -> None:
        self.parts[key] = part

    def set_defaults(self, defaults: dict[str, Any]) -> None:
        self.defaults |= defaults


def added() -> _Recorder:
    """The groups of options that the command line has beside `model`, `data` and `trainer`, and all its defaults."""
    recorder = _Recorder()
    cli.HybridLightningCLI.add_arguments_to_parser(None, recorder)  # type: ignore[arg-type]
    return recorder


def _ours(kind: Any) -> list[type]:
    return [part for part in known_classes(kind).values() if part.__module__.startswith("hybrid_lightning.")]


def _option(action: Any) -> str:
    name = action.dest.rpartition(".")[2]
    facts = [f"`{_type(type_of(action))}`", "required" if action.required else f"default `{_plain(action.default)}`"]
    return f"- **`{name}`** ({', '.join(facts)}): {_text(action.help)}\n"


def _plain(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    if isinstance(value, type):
        return public_path(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(_type(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is Callable:
        return _type(get_args(kind)[1])  # called with the parameters that it trains
    if get_args(kind):
        return f"{get_origin(kind).__name__}[{', '.join(_type(part) for part in get_args(kind))}]"
    return "null" if kind is NoneType else "..." if kind is Ellipsis else getattr(kind, "__name__", "") or str(kind or "any")


def _sentence(part: Any) -> str:
    return re.sub(r":$", ".", _text((inspect.getdoc(part) or "").split("\n\n")[0]))


def _text(text: str | None) -> str:
    """One line of Markdown from a docstring: single backticks, and signs escaped outside of them."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join((text or "").replace("``", "`").split()))
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<>|\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


_API = """\
# API

The public names of the package, by room (subpackage). Import a name from its room, such as
`from hybrid_lightning.losses import GSPOLoss`: these paths stay, even if files move. The built pages have the whole docstrings,
with all members; in Python, use `help(GSPOLoss)`. Losses, advantages and scorers need only torch.
"""


def api() -> str:
    """The page of all public names."""
    page = [GENERATED, _API]
    for room in ROOMS:
        module = import_module(f"hybrid_lightning.{room}")
        page.append(f"\n## hybrid_lightning.{room}\n\n{_sentence(module)}\n\n| name | what |\n|---|---|\n")
        page += [f"| `{name}` | {_sentence(value)} |\n" for name, value in public(room).items()]
    return "".join(page)


def public(room: str) -> Mapping[str, Any]:
    """The classes and functions that a room exports."""
    module = import_module(f"hybrid_lightning.{room}")
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
    found = {name: getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isfunction(value)}


_MODELS = """\
# Models

This table shows what works with each family of models. A test tries each cell with a tiny random model (`tests/families`), on a
CPU, and takes the numbers and names of the last two columns from the family's default config in transformers {version}. Nothing
here tells how well a large model learns: see [Limitations](../limitations.md#models).

- *LoRA*, *full*: the candidates that LoRA, and full fine-tuning, train in two steps of GRPO. LoRA leaves out the last product
  of a state space layer, because kernels read its weight directly: it is frozen, or trained fully.
- *hybrid by score*: two steps with a plan in which the scores of all candidates choose the fully trained ones.
- *passes*: whether training packs sequences, or pads them; [on a GPU](../performance.md#what-makes-the-difference) kernels of
  other packages let it pack more families.
- *agreement*: after these steps, sampling, training and plain transformers compute the same log-probabilities, up to rounding.
- *export*: the merged model in plain transformers, and the adapter in plain PEFT, have the logits of the policy in memory.
- *NF4 base*: two steps of LoRA on a base in 4 bits.
- *memory*: `plan` predicts the memory of a run, or gives an upper bound.
- *vLLM*: the architecture's name in vLLM 0.32; [Generate with vLLM](../how-to/vllm.md#what-was-run) lists what vLLM was run with.
- *stays frozen*: the share of the weights that are not candidates: embeddings, norms, a vision tower and, by far the most,
  experts, unless [they are named](../how-to/adapter.md#experts).

"""


_WRAPPERS = """
## Models that see images as well

Only the text part of a vision-language model is trained. It is loaded as transformers' `AutoModelForCausalLM` loads it:

| on the hub | loaded | its vision tower |
|---|---|---|
| `Qwen3_5ForConditionalGeneration`, `Qwen3_5MoeForConditionalGeneration` | the text part | left out, of exports too |
| `Gemma3ForConditionalGeneration`, `Gemma4ForConditionalGeneration` | the whole model | stays as it is, in exports too |
| `Mistral3ForConditionalGeneration` and others | refused | |

Plain transformers loads an export as the same class. Exports, and the weights that go to vLLM, have the hub's names. Rows with
images are refused, since nothing would read them.

If a model is refused, save its text part in a folder of its own, and give that folder as `model.model`:

<!-- run: text_part -->
```python
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

name = "vision/model"  # a hub id or a folder
wrapper = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
text = AutoModelForCausalLM.from_config(wrapper.config.text_config, dtype=wrapper.dtype)
text.model.load_state_dict(wrapper.model.language_model.state_dict())
text.lm_head.load_state_dict(wrapper.lm_head.state_dict())
text.save_pretrained("text")
AutoTokenizer.from_pretrained(name).save_pretrained("text")
```
"""


def models() -> str:
    """The page of what works with each family of models; takes minutes."""
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "families")]
    import torch
    import transformers
    from columns import COLUMNS, ROWS

    torch.set_num_threads(1)  # as in tests: with several, small products wait for each other
    page = [GENERATED.replace("from signatures and docstrings: change those and", "--models from tests/families:")]
    page.append(_MODELS.format(version=transformers.__version__))
    page += [f"| `model_type` | {' | '.join(COLUMNS)} |\n", f"|---{'|---' * len(COLUMNS)}|\n"]
    page += [f"| `{row}` | {' | '.join(column(row) for column in COLUMNS.values())} |\n" for row in ROWS]
    return "".join([*page, _WRAPPERS])


PAGES: Mapping[str, Callable[[], str]] = {"configuration.md": configuration, "api.md": api}

if __name__ == "__main__":
    if "--models" in sys.argv:
        (REFERENCE / "models.md").write_text(models(), encoding="utf-8")
        sys.exit()
    made = {REFERENCE / name: make() for name, make in PAGES.items()}
    stale = [str(path) for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv and stale:
        sys.exit(f"stale: {', '.join(stale)}; run python docs/generate.py")
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
