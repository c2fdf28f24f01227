"""What comparisons with TRL need of it: statements of its methods run alone, and a process that is the only one."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


class Accelerator:
    num_processes, sync_gradients, device, parallelism_config = 1, True, "cpu", None
    reduce = gather = gather_for_metrics = pad_across_processes = staticmethod(lambda value, *_, **__: value)
    unwrap_model = staticmethod(lambda model: model)


def run_statements(method: Callable[..., Any], wanted: Callable[[ast.AST], bool], **names: Any) -> dict[str, Any]:
    """Run the wanted statements of a method with some names; returns all names after them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    exec(compile(ast.Module([node for node in ast.walk(tree) if wanted(node)], []), "trl", "exec"), names)
    return names
