"""Compares what every loss and advantage gives on average with the true gradient, exactly: `python -m benchmarks.oracle`.

Writes `oracle.csv` (every estimator in every situation), `oracle.png`, and `oracle.md`, the page in `results/` with new tables.
A loss of your own is put under it by `--loss FILE.py:FUNCTION`, and only its lines are printed:
docs/how-to/prove-an-estimator.md.
"""

import argparse
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from benchmarks.commands import CORES, ROOT, UsageError, check_at_least, command, entry, tell
from benchmarks.oracle.estimators import LossFunction
from benchmarks.oracle.page import any_lines, as_csv, draw, filled, tables
from benchmarks.oracle.sweep import TRL_TYPES, everything, of_file
from hybrid_lightning.losses import PolicyLoss

PAGE = ROOT / "results/oracle.md"


def build_parser() -> argparse.ArgumentParser:
    parser = command("oracle", __doc__, out=Path("runs/oracle"))
    parser.add_argument("--processes", type=int, default=CORES, help="side by side, of one thread each (default: %(default)s)")
    parser.add_argument(
        "--loss", metavar="FILE.py:FUNCTION", help="a function of a Step, or a PolicyLoss: only this one, on the screen"
    )
    parser.add_argument("--samples", type=int, default=3, help="completions of a prompt, with --loss (default: %(default)s)")
    return parser


def load(place: str) -> LossFunction | PolicyLoss:
    """The function that `FILE.py:FUNCTION` names, or an instance of its class."""
    file, _, name = place.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UsageError(f"--loss {place}: there is no such file; give FILE.py:FUNCTION")
    spec = spec_from_file_location("loss", file)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        defined = ", ".join(key for key, value in vars(module).items() if getattr(value, "__module__", "") == "loss") or "nothing"
        raise UsageError(f"--loss {place}: {file} has no function {name}; it defines {defined}")
    if isinstance(found, type) and issubclass(found, PolicyLoss):
        return found()
    function: LossFunction = found
    return function


def run(arguments: argparse.Namespace) -> None:
    check_at_least(arguments, 1, "processes")
    check_at_least(arguments, 2, "samples")
    if arguments.loss:
        lines = list(of_file(load(arguments.loss), arguments.loss.rpartition(":")[2], arguments.samples))
        print(any_lines(lines))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    trl = find_spec("trl") is not None
    if not trl:
        tell(
            f"TRL is not installed, so its {len(TRL_TYPES)} loss types are left out; install it with: pip install 'trl>=1.16,<2'"
        )
    lines = everything(arguments.processes, trl, tell)
    (arguments.out / "oracle.csv").write_text(as_csv(lines))
    draw(lines, arguments.out / "oracle.png")
    (arguments.out / "oracle.md").write_text(filled(PAGE.read_text(), tables(lines)))
    tell(f"{len(lines)} estimators: {arguments.out / 'oracle.md'}")


main = entry(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
