"""Imports point one way, and losses, advantages and scores need only torch."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import hybrid_lightning

ROOT = Path(hybrid_lightning.__file__).parent
PACKAGE = "hybrid_lightning"
GROUND = {"types", "errors", "shared"}
LEAVES = {
    *(
        "agents",
        "data",
        "environments",
        "rollout",
        "rewards",
        "advantages",
        "losses",
        "adapters",
        "metrics",
        "assets",
        "sharding",
    ),
    *("sandbox", "runner"),
}
POLICY = {"model", "episodes", "training"}
# Top-level name within the package -> names that it may import; itself is always allowed.
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set() for name in GROUND},
    "types": {"errors", "shared"},
    "shared": {"errors", "types"},
    **{name: GROUND for name in LEAVES},
    "runner": GROUND,
    "rollout": GROUND | {"runner"},
    "adapters": GROUND | {"runner"},
    "rewards": GROUND | {"sandbox"},
    "environments": GROUND | {"sandbox"},
    "agents": GROUND | {"environments"},
    "model": GROUND | LEAVES,
    "episodes": GROUND | LEAVES | {"model"},
    "training": GROUND | LEAVES | {"model", "episodes", "process"},
    "export": GROUND | LEAVES | POLICY,
    "memory": GROUND | LEAVES | POLICY | {"process"},
    "reports": GROUND | LEAVES | POLICY,
    "callbacks": GROUND | LEAVES | POLICY | {"export", "reports"},
    "trainer": GROUND | LEAVES | POLICY | {"export", "memory", "reports", "callbacks"},
    "cli": GROUND | LEAVES | POLICY | {"export", "memory", "callbacks", "trainer"},
    "process": set(),
    "__main__": {"cli", "process", "sharding", "shared"},
    "__init__": {"shared"},
}
WORDS = {"LightningModule", "Trainer"}
HEAVY = {"lightning", "transformers", "peft", "datasets", "torchmetrics", "matplotlib", "rich"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


# callbacks is a link to a folder, which rglob does not always follow
FILES = {module_name(path): path for path in sorted({*ROOT.rglob("*.py"), *(ROOT / "callbacks").glob("*.py")})}


@cache
def imports_of(name: str) -> set[str]:
    """Full names of all modules that a module imports, anywhere in it and for types too; of `from x import y` also x.y."""
    found: set[str] = set()
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {base, *(full for alias in node.names if (full := f"{base}.{alias.name}") in FILES)}
    return found


def part_of(name: str) -> str:
    """The top-level name within the package that a module belongs to."""
    within = name.removeprefix(f"{PACKAGE}.")
    return "__init__" if name == PACKAGE else within if within in MAY_IMPORT else within.split(".")[0]


def test_every_module_is_looked_at():
    parts = {part_of(name) for name in FILES}
    assert parts | {"__init__"} == set(MAY_IMPORT), "a part without a place in the design: give it one here"
    assert f"{PACKAGE}.callbacks.display" in FILES


def test_no_arrow_points_the_wrong_way():
    wrong = [
        f"{name} must not import {imported}"
        for name in FILES
        for imported in sorted(imports_of(name))
        if imported.startswith(f"{PACKAGE}.") and part_of(imported) not in MAY_IMPORT[part_of(name)] | {part_of(name)}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_model_runner_is_used_by_its_public_names():
    """Its files may be cut anew without a change elsewhere."""
    inside = [
        f"{name} reaches into {imported}: import from {PACKAGE}.runner what it needs"
        for name in FILES
        if part_of(name) != "runner"
        for imported in sorted(imports_of(name))
        if imported.startswith(f"{PACKAGE}.runner.")
    ]
    assert not inside, "\n".join(inside)


def test_callbacks_have_one_name():
    """`callbacks` is a link: by another name every class would exist twice."""
    assert not [name for name in FILES if any(imported.split(".")[0] == "callbacks" for imported in imports_of(name))]


def test_what_needs_only_torch_works_without_the_rest():
    """In a process of its own, where the other libraries cannot be imported."""
    code = f"""
import sys
for name in {sorted(HEAVY)}: sys.modules[name] = None
import torch
from hybrid_lightning.advantages import GroupAdvantage
from hybrid_lightning.adapters.scorers import TailEnergy
from hybrid_lightning.adapters.scoring import Scoring
from hybrid_lightning.adapters.sketch import SketchedGradients
from hybrid_lightning.losses import GSPOLoss
from hybrid_lightning.types import LossInputs
model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
x = torch.randn(4, 6)
print(len(Scoring(model, dict(model.named_children()), [model(x).square().mean()], TailEnergy(), 2).run()))
advantages = GroupAdvantage()(torch.tensor([[1.0, 0.0]])).flatten()
print(GSPOLoss()(LossInputs(torch.randn(2, 3), advantages, torch.ones(2, 3, dtype=torch.bool))).loss.shape)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split("\n")[:2] == ["2", "torch.Size([])"], result.stderr[-2000:]


def test_every_package_is_in_the_wheel():
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    packages = {module_name(path) for path in ROOT.rglob("__init__.py")} | {f"{PACKAGE}.callbacks", f"{PACKAGE}.configs"}
    assert set(settings["tool"]["setuptools"]["packages"]) == packages


def test_only_the_modules_hooks_take_a_lightning_module_or_a_trainer():
    rooms, hooks = {"model", "episodes", "rollout", "training"}, {f"{PACKAGE}.training.{n}" for n in ("module", "lightning_run")}
    found = [
        f"{name} names {word}"
        for name, path in FILES.items()
        if part_of(name) in rooms and name not in hooks
        for word in sorted(
            WORDS & {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
        )
    ]
    assert not found, "\n".join(found)


def test_no_imports_go_in_a_circle():
    """Not even within functions or for types, so that no import runs up inside a room either."""
    arrows = {
        name: {imported for imported in imports_of(name) & FILES.keys() if FILES[imported].name != "__init__.py"}
        for name in FILES
    }
    TopologicalSorter(arrows).prepare()  # the error names the circle


def test_futures_are_made_by_what_works_elsewhere():
    """By the loader's queue and by engines; a server is asked in a thread. Others only pass on what an engine has begun."""
    found = {name.removeprefix(f"{PACKAGE}.") for name in FILES if f"{PACKAGE}.rollout.future" in imports_of(name)}
    servers = {"rollout.vllm.dispatch", "rollout.vllm.servers", "rollout.vllm.transfer", "training.server_teacher"}
    assert found == {"rollout.interface", "rollout.loader", "rollout.playing", "rollout.rollout_engine"} | servers
