# ruff: noqa: E501  (a form is one entry, however long)
r"""Where `MathMatch` and plain math-verify disagree: on reference answers as people write them, and on a model's completions.

    python -m benchmarks.answers DATA before=before/predictions.jsonl after=after/predictions.jsonl

DATA is a folder with `gsm8k/test.jsonl`, `svamp/test.jsonl`, `mawps/singleop.jsonl` and `aime24/test.jsonl`. The files of completions
are those of `python -m hybrid_lightning predict`. Both sides search the same part of a text and have the same CPU time. Each
disagreement on a completion goes to standard error, to be judged by reading it.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from math_verify import parse, verify

from benchmarks.commands import command
from benchmarks.tables import table
from hybrid_lightning.rewards import MathMatch
from hybrid_lightning.rewards.mathematics.math_text import answer_window
from hybrid_lightning.types import Prompt

CPU_SECONDS = 3
EACH = 12  # reference answers of each set, or some more
ANSWERS: dict[str, Callable[[dict[str, str]], str]] = {
    "gsm8k/test.jsonl": lambda row: re.split(r"####\s*", row["answer"])[1],
    "svamp/test.jsonl": lambda row: f"{float(row['Answer']):g}",
    "mawps/singleop.jsonl": lambda row: f"{float(row['target']):g}",
    "aime24/test.jsonl": lambda row: row["answer"],
}
# What people write for a number n -> reference answer -> (right answers, wrong answers). m is n + 1, c has commas between thousands.
FORMS: dict[str, dict[str, tuple[str, str]]] = {
    "itself": {"{n}": ("{n} | It is {n}. | The answer is {n}. | #### {n} | **{n}** | \\boxed{{{n}}} | $x = {n}$", "{n}1 | -{n} | {m}")},
    "commas": {"{c}": ("{n} | {c} | The total is {c}. | \\boxed{{{c}}}", "{c}1"), "{n}": ("{c} | ${c}", "{c},1")},
    "dollars": {
        "{n}": ("${n} | \\${n} | \\boxed{{\\${n}}} | {n} dollars | She makes ${n} every day. | ${n}.00", "${m} | ${n}.50"),
        "{n} dollars": ("${n} | {n} | \\boxed{{\\${n}}} | {n}00 cents", "{n} cents | {n} euros | \\boxed{{{n}\\text{{ cents}}}}"),
    },
    "percent": {
        "{n}%": ("{n}% | {n} percent | {n} | \\boxed{{{n}\\%}}", "{m}% | {n} cents"),
        "{n}.5": ("{n}.5% | {n}.5 percent | \\boxed{{{n}.5\\%}}", "{m}.5%"),
    },
    "decimals": {"{n}": ("{n}.0 | {n}.00 | \\boxed{{{n}.0}}", "{n}.5 | {n}.001")},
    "fractions": {"{n}/3": ("\\frac{{{n}}}{{3}} | \\boxed{{\\frac{{{n}}}{{3}}}} | \\boxed{{{n}/3}}", "\\boxed{{\\frac{{{m}}}{{3}}}} | {n}")},
    "mixed numbers": {"{n}.5": ("{n} 1/2 | \\boxed{{{n}\\frac{{1}}{{2}}}}", "{n} 1/3")},
    "points": {"({n},{m})": ("({n}, {m}) | \\boxed{{({n}, {m})}} | x = {n} and y = {m}", "({m}, {n}) | {n}")},
    "intervals": {"[{n},{m})": ("\\boxed{{[{n},{m})}} | \\boxed{{{n} \\le x < {m}}}", "\\boxed{{[{n},{m}]}} | \\boxed{{{n}}}")},
    "sets": {"\\{{{n},{m}\\}}": ("\\boxed{{\\{{{m},{n}\\}}}} | {n} and {m}", "\\boxed{{({n},{m})}} | {n} | {m}")},
    "units": {
        "{n}": ("{n} eggs | {n} km | \\boxed{{{n}\\text{{ cm}}^2}} | {n} miles per hour | \\boxed{{{n}}} hours", "{m} eggs"),
        "{n} km": ("{n} km | {n}000 m | {n} kilometers away", "{n} m | {n} miles | {n}000 | \\boxed{{{n}\\text{{ m}}}}"),
        "{n} cm^2": ("{n} square centimeters | \\boxed{{{n}\\text{{ cm}}^2}}", "{n} cm | {n} m^2 | {n} cm^3"),
        "{n}.5 hours": ("{n}.5 hours | {n}.5", "{n}.5 minutes | 30 minutes"),
    },
    "bounds": {
        "{n}": (
            "She needs at least {n} eggs. | The minimum is {n}. | He can buy at most {n} pens.",
            "The answer is at least {n}. | {n} or more | \\boxed{{\\text{{more than }} {n}}} | x > {n} | It is over {n} | \\boxed{{\\ge {n}}}",
        )
    },
    "several": {"{n}": ("{m}? No: {n} | 2 and 5, so {n}", "{n} or {m} | {n}, {m} | between {n} and {m} | \\boxed{{{n}}} or \\boxed{{{m}}}")},
    "remarks": {"{n}": ("{n} dollars (9 eggs at $2) | {n} (since 2 + 2 = 4)", "{n} (or {m}) | {m} dollars (not {n})")},
}  # fmt: skip


def plain(gold: str, text: str) -> bool:
    """The verdict of math-verify without rules of ours."""
    try:
        found = parse(answer_window(text), parsing_timeout=CPU_SECONDS)
        return any(
            bool(verify(parse(wanted, parsing_timeout=CPU_SECONDS), found, timeout_seconds=CPU_SECONDS))
            for wanted in ([gold] if re.fullmatch(r"[\d.,/% a-z]+", gold) else [f"${gold}$"])
        )
    except Exception:
        return False


def rewritten(folder: Path) -> Iterator[tuple[str, str, str, bool]]:
    """(form, reference answer, answer, whether it is right) for each form of each number."""
    for name, read in ANSWERS.items():
        golds = list(dict.fromkeys(read(json.loads(line)) for line in (folder / name).open(encoding="utf-8")))
        numbers = [int(gold.replace(",", "")) for gold in golds if re.fullmatch(r"[1-9][\d,]*", gold)]
        for n in numbers[:: max(1, len(numbers) // EACH)]:
            values = {"n": n, "m": n + 1, "c": f"{n:,}"}
            for form, of_gold in FORMS.items():
                for gold, texts in of_gold.items():
                    for right, given in zip((True, False), texts, strict=True):
                        for text in given.split(" | "):
                            yield form, gold.format(**values), text.format(**values), right


def main() -> None:
    """Print the tables of results/answers.md."""
    parser = command("answers", __doc__)
    parser.add_argument("data", type=Path, help="folder of reference answers")
    parser.add_argument("completions", nargs="*", metavar="NAME=FILE", help="predictions of a model")
    given = parser.parse_args()
    reward, counts = MathMatch(cpu_seconds=CPU_SECONDS), Counter[tuple[str, str]]()
    for form, gold, text, right in rewritten(given.data):
        counts[form, "all"] += 1
        for side, paid in (("ours", bool(reward([text], [Prompt(text="?", answer=gold)])[0])), ("plain", plain(gold, text))):
            counts[form, f"{side} {'missed' if right else 'wrongly paid'}"] += paid != right
    columns = ["all", *(f"{side} {what}" for what in ("missed", "wrongly paid") for side in ("ours", "plain"))]
    print(table(["form", *columns], [[form, *(str(counts[form, column]) for column in columns)] for form in FORMS]) + "\n")
    lines = []
    for name, path in (entry.split("=", 1) for entry in given.completions):
        verdicts = Counter[tuple[bool, bool]]()
        for row in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()):
            for text in row["completions"]:
                pair = bool(reward([text], [Prompt(text="?", answer=row["answer"])])[0]), plain(row["answer"], text)
                verdicts[pair] += 1
                if pair[0] != pair[1]:
                    told = {"file": name, "ours": pair[0], "gold": row["answer"], "text": text[-200:]}
                    print(json.dumps(told), file=sys.stderr)
        lines.append([name, *(str(verdicts[pair]) for pair in ((True, True), (False, False), (True, False), (False, True)))])
    print(table(["completions", "both right", "both wrong", "ours alone right", "plain alone right"], lines))


if __name__ == "__main__":
    main()
