import json
import os
import random
import re
import subprocess
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_lightning.environments.tools import DocumentSearch, PythonSession, calculator
from hybrid_lightning.errors import ConfigError

_NUMBERS = st.integers(0, 10**6).map(str) | st.decimals(0, 10**4, places=2).map(str)


def _joined(parts):
    return st.tuples(parts, st.sampled_from(["+", "-", " * ", "/"]), parts).map(lambda three: f"({''.join(three)})")


@given(st.recursive(_NUMBERS, _joined, max_leaves=12))
def test_the_calculator_agrees_with_exact_fractions(expression):
    """Python's own evaluation of the same text, with each number as a fraction."""
    try:
        expected = eval(re.sub(r"[\d.]+", lambda number: f"Fraction('{number[0]}')", expression), {"Fraction": Fraction})
    except ZeroDivisionError:
        assert calculator(expression) == "error: division by zero"
        return
    answer = calculator(expression)
    if expected.denominator == 1:
        assert answer == str(expected)
    else:
        assert float(answer) == pytest.approx(float(expected), rel=1e-14)


def test_the_calculator_answers_whatever_it_is_asked():
    values = {"0.1+0.2": "0.3", "-2**2": "-4", "-7//2": "-4", "-7 % 3": "2", "2**-3": "0.125", "9**0.5": "3", " 1\n+ 2": "3"}
    values |= {"1,234,567 + 1": "1234568", "123456789012345/5": "24691357802469"}
    refused = {
        "error: a root of a negative number is no real number": ["(-8)**0.5"],
        "error: this is no expression": ["", "1 +", "()", "1,2", "3(4)", "07", "1.2.3", "(" * 300, "1" * 400 + ".5"],
        "error: the number is too large": ["9**9**9", "2**-99999", "10**300*10**300", "10**9 ** 0.5 ** -6"],
        "is not understood": ["__import__('os')", "1e5", "2^3", "\u0663+1", "x"],
        "error: the expression is longer than 1000 characters": ["1+" * 500 + "1"],
    }
    started = time.process_time()
    assert {text: calculator(text) for text in values} == values
    for message, texts in refused.items():
        for text in texts:
            assert message in calculator(text), text
    assert time.process_time() - started < 1


@pytest.fixture
def python():
    return PythonSession(cpu_seconds=2, wall_seconds=20)


def test_names_last_and_what_was_printed_before_is_not_shown_again(python):
    """Also through an error, and what a cell did before it."""
    assert python("import math\nprint('once')\nx = math.floor(41.5)") == "once"
    assert python("y = x + 1\n1/0\ny = 0") == "ZeroDivisionError: division by zero (line 2)"
    assert python("def f(:") == "SyntaxError: invalid syntax (line 1)"
    assert python("print(x, end=' ')\ny") == "41 42"
    assert python("None") == "(no output)"
    assert python("import sys\nsys.stdout.close()\nsys.stdout = None") == "(no output)" and python("y") == "42"
    python.start(1)
    assert python("x") == "NameError: name 'x' is not defined (line 1)"


def test_sessions_are_apart_and_repeat_themselves_by_their_seed(python):
    """`random` draws the same each time a cell runs again."""
    other = PythonSession()
    drawn = python("import random\nx = random.random()\nx")
    assert python("x") == drawn == other("import random\nrandom.random()") and "NameError" in other("x")
    other.start(5)
    assert other("import random\nrandom.random()") == str(random.Random(5).random()) != drawn


def sandboxes():
    """Processes that this one has started in a sandbox."""
    return set(subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "sandbox"], capture_output=True, text=True).stdout.split())


def test_code_that_does_not_end_as_code_should_costs_its_own_call_alone():
    """Names are as before, and no process is left; each call has its own time, however much the earlier ones took."""
    python, before = PythonSession(cpu_seconds=1), sandboxes()
    busy = "import time\nwhile time.process_time() < {}: pass\n{}"
    for code, said in (
        ("import os\nos._exit(0)", "it ended Python"),
        ("import os\nos.abort()", "ended by signal"),
        ("import os\nos.close(1)", "ended with an error"),
        ("import os\ndel os.ftruncate", "ended with an error"),
        (busy.format(0.4, "x = 1"), None),
        ("while True: pass", "out of CPU time"),
    ):
        answer = python(code if said is None else f"y = 3\n{code}")
        expected = "(no output)" if said is None else f"error: {said}"
        assert answer.startswith(expected) and answer.endswith("; names are as before this call") == (said is not None), code
        assert sandboxes() <= before, "other tests may have some"
    assert python(busy.format(1.1, "x, 'y' in globals()")) == "(1, False)"


def test_code_that_waits_is_stopped_in_time():
    """A thread that waits does not hold the answer up either."""
    python = PythonSession(wall_seconds=1.0)
    assert python("import time\ntime.sleep(60)").startswith("error: not done after 1 s")
    python = PythonSession()
    assert python("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n5") == "5"


def test_too_much_of_anything_is_an_error_in_the_session(python):
    assert python("x = 1\n'a' * 10**10") == "MemoryError (line 2)"
    assert len(python("print('a' * 10**7)")) <= 4 * 2**20
    assert "PermissionError" in python("import os\nos.fork()")
    assert python("x") == "1"


@pytest.fixture
def documents(tmp_path):
    pytest.importorskip("bm25s", reason="needs bm25s: pip install 'hybrid-lightning[search]'")
    (tmp_path / "below").mkdir()
    (tmp_path / "tea.md").write_text("Green tea: 80 degrees.\n\nBlack tea wants boiling water.\n \n\nWhite tea: 75 degrees.")
    rows = [{"title": "Coffee", "text": "Beans are roasted."}, {"text": "Cocoa is a bean, too."}]
    (tmp_path / "below/more.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "code.py").write_text("tea = 'green'")
    return tmp_path


def test_the_search_finds_passages_by_their_words_and_names_them(documents, tmp_path, monkeypatch):
    """Paragraphs are joined up to a length; lines of a table are passages with names of their own."""
    search = DocumentSearch(str(documents), passages=2, passage_words=4)
    assert search("BLACK, tea!").splitlines()[0] == "[tea.md 2] Black tea wants boiling water."
    assert search("roasted") == "[Coffee] Beans are roasted."
    assert search("cocoa coffee").split("\n\n") == ["[Coffee] Beans are roasted.", "[below/more.jsonl 2] Cocoa is a bean, too."]
    assert [search(nothing) for nothing in ("zebra", "", "?!")] == ["nothing found; try other words"] * 3
    whole = DocumentSearch(str(documents / "tea.md"))
    assert whole("white").startswith("[tea.md 1] Green tea") and whole("white").endswith("75 degrees.")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", None)
        assert "Green" in DocumentSearch(str(documents / "tea.md"))("green"), "an index is made once"
    # Equally good fits keep their order; the order of sets, different in each process, does not matter.
    for number in range(20):
        (tmp_path / f"below/{number:02d}.txt").write_text(f"same words {number % 2}")
    said = DocumentSearch(str(tmp_path / "below"), 9)("same 1 words").split()
    assert [line[1:7] for line in said if ".txt" in line] == [f"{n:02d}.txt" for n in range(1, 19, 2)]


def test_what_is_wrong_with_documents_is_said(tmp_path, monkeypatch):
    pytest.importorskip("bm25s")
    for path, reason in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no text")):
        with pytest.raises(ConfigError, match=f"{reason}; give a folder or file of .txt, .md or .jsonl"):
            DocumentSearch(str(path))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ConfigError, match='line 2 is not an object with "text"'):
        DocumentSearch(str(tmp_path))
    monkeypatch.setattr("hybrid_lightning.environments.tools.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package bm25s; pip install 'hybrid-lightning\[search\]'"):
        DocumentSearch(str(tmp_path))
