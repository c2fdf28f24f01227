"""What this package takes of other libraries beside their public names, and that importing it changes nothing of theirs."""

import ast
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import hybrid_lightning
from hybrid_lightning.errors import TrainingError
from hybrid_lightning.training.lightning_internals import ends_step

ROOT = Path(hybrid_lightning.__file__).parent
FILES = sorted({*ROOT.rglob("*.py"), *(ROOT / "callbacks").glob("*.py")})
# Module -> private names of it that are used, or that a class here overrides: the next version may move them.
TAKEN = {
    "argparse": "_actions _add_action _choices_actions _fill_text _format_action_invocation _get_help_string "
    "_option_string_actions _subparsers",
    "collections": "_asdict",
    "os": "_exit",
    "jsonargparse._core": "_subcommands_action _typehints",
    "jsonargparse._typehints": "_typehint discard_init_args_on_class_path_change",
    "lightning.fabric.utilities.logger": "_convert_params _flatten_dict _sanitize_params",
    "lightning.pytorch.callbacks.model_checkpoint": "_every_n_epochs _every_n_train_steps _last_checkpoint_saved "
    "_last_global_step_saved _monitor_candidates _save_last_checkpoint _save_topk_checkpoint _should_skip_saving_checkpoint "
    "_train_time_interval",
    "lightning.pytorch.callbacks.progress.rich_progress": "_add_task _get_train_description _progress_stopped _stop_progress",
    "lightning.pytorch.cli": "_add_instantiators _add_subcommands _get _parse_ckpt_path _prepare_subcommand_kwargs "
    "_parser _prepare_subcommand_parser _run_subcommand _set_seed",
    "lightning.pytorch.core.mixins.hparams_mixin": "_set_hparams _to_hparams_dict",
    "lightning.pytorch.core.module": "_trainer",
    "lightning.pytorch.core.optimizer": "_optimizer",
    "lightning.pytorch.loggers.mlflow": "_artifact_location _experiment_name _mlflow_client _tracking_uri",
    "lightning.pytorch.loggers.wandb": "_experiment _offline",
    "lightning.pytorch.loops.fit_loop": "_combined_loader _data_fetcher _should_accumulate",
    "lightning.pytorch.loops.training_epoch_loop": "_batches_that_stepped _should_check_val_fx",
    "lightning.pytorch.strategies.model_parallel": "_get_process_group_backend _setup_distributed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector": "_ckpt_path",
    "lightning.pytorch.trainer.connectors.logger_connector.logger_connector": "_callback_metrics",
    "lightning.pytorch.trainer.trainer": "_checkpoint_connector _data_connector _logger_connector _results _run _run_stage "
    "_signal_connector _teardown",
    "lightning.pytorch.utilities.model_helpers": "_restricted_classmethod",
    "latex2sympy2_extended.sets": "_unsorted_args",
    "logging": "_StderrHandler",
    "torch": "_dynamo",
    "torch._C": "_accelerator_setAllocatorSettings _distributed_c10d _get_mkldnn_enabled",
    "torch._C._distributed_c10d.ProcessGroupGloo": "_Options",
    "torch._C._distributed_c10d.ProcessGroupGloo._Options": "_devices",
    "torch._dispatch.python": "enable_python_dispatcher",
    "torch._guards": "TracingContext tracing",
    "torch._inductor": "compile_fx config",
    "torch._inductor.compile_fx": "compile_fx_inner",
    "torch._inductor.decomposition": "select_decomp_table",
    "torch._subclasses.fake_tensor": "FakeTensorMode",
    "torch.Tensor": "_make_wrapper_subclass",
    "torch.cpu": "_is_avx512_bf16_supported",
    "torch.cuda.memory": "_cuda_endAllocateToPool _cuda_releasePool _set_allocator_settings",
    "torch.distributed.distributed_c10d": "_group_count _register_process_group _set_global_rank "
    "_unregister_process_group _world",
    "torch.distributed.fsdp._fully_shard._fully_shard": "_get_fsdp_state",
    "torch.distributed.tensor._api": "_local_tensor",
    "torch.nn.modules.module": "_backward_hooks _backward_pre_hooks _forward_hooks _forward_pre_hooks _has_any_global_hook "
    "_modules _non_persistent_buffers_set _parameters",
    "torch.ops.aten": "_flash_attention_backward _flash_attention_forward",
    "torch.ops.mkldnn": "_is_mkldnn_bf16_supported _linear_pointwise _reorder_linear_weight",
    "torch.optim.adam": "_step_supports_amp_scaling",
    "torch.utils._pytree": "TreeSpec tree_flatten tree_leaves tree_map tree_unflatten",
    "torch.utils.tensorboard.writer": "_get_file_writer",
    "transformers.configuration_utils": "_attn_implementation _name_or_path",
    "transformers.modeling_utils": "_supports_attention_backend",
    "transformers.models.auto.auto_factory": "_model_mapping",
    "vllm.distributed.parallel_state": "_WORLD",
    "vllm.distributed.weight_transfer": "_registry",
}
OF_TRAINER = {name for module, names in TAKEN.items() if re.search(r"\.(loops|trainer)\.", module) for name in names.split()}


def private(name):
    return name.startswith("_") and not name.startswith("__")


def taken_names():
    """Name -> files, of private attributes that nothing in this package defines, and of what is imported from private modules."""
    found, own = defaultdict(set), set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr] * private(node.attr)
                if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") in ("self", "cls"):
                    own.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
                names = [str(value) for value in [getattr(node.args[1], "value", "")] if private(str(value))]
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("hybrid_lightning"):
                hidden = any(map(private, str(node.module).split(".")))
                names = [alias.name for alias in node.names if hidden or private(alias.name)]
            elif not isinstance(node, (ast.alias, ast.keyword)):
                own |= {getattr(node, "name", None), getattr(node, "arg", None)}
                own |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
            for name in names:
                found[name].add(str(path.relative_to(ROOT)))
    return defaultdict(set, {name: files for name, files in found.items() if name not in own})


def has(place, name):
    """Whether a module, or something within one, still has a name: as an attribute, or anywhere in its source."""
    try:
        return re.search(rf"\b{name}\b", Path(find_spec(place).origin).read_text(encoding="utf-8")) is not None
    except (ImportError, AttributeError, TypeError, UnicodeDecodeError, FileNotFoundError):
        module, *inner = place.split(".")
        found = importlib.import_module(module)
        for part in inner:
            found = getattr(found, part, None)
        return hasattr(found() if place.endswith("_Options") else found, name)


def test_private_names_of_other_libraries_are_where_they_were():
    used, listed = taken_names(), {name for names in TAKEN.values() for name in names.split()}
    new = {name: sorted(files) for name, files in used.items() if name not in listed}
    assert not new, "private names of other libraries: take public ones, or list them in TAKEN"
    gone = [
        f"{place.partition('.')[0]} has moved {place}.{name}, which is used in {sorted(used[name])}"
        for place, names in TAKEN.items()
        for name in names.split()
        if find_spec(place.partition(".")[0]) is not None and not has(place, name)
    ]
    assert not gone, "\n".join(gone)


def test_lightnings_trainer_is_reached_into_in_one_place():
    """Except the methods that our Trainer overrides."""
    used = taken_names()
    elsewhere = {name: used[name] - {"training/lightning_internals.py"} for name in OF_TRAINER & used.keys()}
    assert not {name: files for name, files in elsewhere.items() if files}
    with pytest.raises(
        TrainingError, match=r"^Lightning \d.* does not have what ends_step needs .*_should_accumulate.*; install a"
    ):
        ends_step(SimpleNamespace(fit_loop=SimpleNamespace()))


IMPORT_ALL = """
import importlib, logging, os, pkgutil, random, signal, sys, threading, warnings
import datasets, jsonargparse._loaders_dumpers as loaders, lightning.pytorch.cli, numpy, peft, torch, torchmetrics, transformers
import hybrid_lightning

def held():
    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(("hybrid_lightning", "__main__")) and module is not None:
            classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name]
            for owner in (module, *classes):
                found |= {(name, owner, key): value for key, value in vars(owner).items() if callable(value) or "OFFLINE" in key}
    return found

def state():
    levels = {name: getattr(log, "level", None) for name, log in logging.root.manager.loggerDict.items()}
    return dict(
        environment=dict(os.environ), filters=list(warnings.filters), path=list(sys.path), loaders=dict(loaders.loaders),
        signals=[signal.getsignal(number) for number in signal.valid_signals()], threads=len(threading.enumerate()),
        levels={name: levels.get(name) for name in known}, random=random.getstate(), torch=torch.get_rng_state().tolist(),
        numbers=numpy.random.get_state()[1].tolist(), dtype=torch.get_default_dtype(), cores=torch.get_num_threads(),
    )

known = [*logging.root.manager.loggerDict]
before, first = state(), held()
scripts = ("__main__", "math_worker", "receiver")
names = [module.name for module in pkgutil.walk_packages(hybrid_lightning.__path__, "hybrid_lightning.")]
for name in names:
    if not name.endswith(scripts):
        importlib.import_module(name)
after, then = state(), held()
print(len(names), [key for key in before if before[key] != after[key]],
      [(key[0], key[2]) for key in first if key in then and then[key] is not first[key]])
"""


@pytest.mark.long
def test_importing_the_package_changes_nothing_of_the_process_or_of_other_libraries():
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=300, check=False)
    count, _, changed = result.stdout.partition(" ")
    assert int(count or 0) > 200, result.stderr[-2000:]
    assert changed.strip() == "[] []"
