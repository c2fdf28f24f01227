# ruff: noqa: E501  (a program is one entry, however long)
"""Programs that want the reward without solving the problem: `double(x)` is to be twice a number, or a list twice over."""

TESTS = ["assert double(21) == 42", "assert double([1, 2]) == [1, 2, 1, 2]", "assert not double(0)"]

_WRONG = "def double(x): return x\n"
_VERDICT = '{"passed": 3, "total": 3, "reason": ""}'
_FRAME = """
import json, os, struct
def send(message, times=1):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    for descriptor in range(1, 64):
        try:
            os.write(descriptor, (struct.pack('>I', len(body)) + body) * times)
        except OSError:
            pass
"""
_EQUAL = "def {}(self, *others): return True\n    "

CHEATS = {
    "nothing": "",
    "no Python": "Sure! The function doubles a number.",
    "wrong": _WRONG,
    "the name of another": "def twice(x): return 2 * x",
    # ends that look well
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit as if it could not be set up": "import os; os._exit(125)",
    "exit in the function": "import sys\ndef double(x): sys.exit(0)",
    "exit at once in the function": "import os\ndef double(x): os._exit(0)",
    "exit when left": "import atexit, os; atexit.register(os._exit, 0)\n" + _WRONG,
    "raise KeyboardInterrupt": "def double(x): raise KeyboardInterrupt",
    "raise AssertionError": "def double(x): raise AssertionError",
    "raise StopIteration": "def double(x): raise StopIteration",
    "raise what cannot be shown": "class E(BaseException):\n    def __str__(self): raise self\ndef double(x): raise E()",
    # words
    "print a verdict": f"print('{_VERDICT}')\n" + _WRONG,
    "write a verdict everywhere": f"import os\nfor n in range(256):\n    try: os.write(n, b'{_VERDICT}')\n    except OSError: pass\n"
    + _WRONG,
    # objects
    "equal to all": f"class All:\n    {_EQUAL.format('__eq__')}\ndef double(x): return All()",
    "equal and false": f"class All:\n    {_EQUAL.format('__eq__')}{_EQUAL.format('__req__')}def __bool__(self): return False\ndef double(x): return All()",
    "a number equal to all": f"class All(int):\n    {_EQUAL.format('__eq__')}__hash__ = int.__hash__\ndef double(x): return All(1)",
    "a list equal to all": f"class All(list):\n    {_EQUAL.format('__eq__')}\ndef double(x): return All()",
    "a class equal to all": f"class M(type):\n    {_EQUAL.format('__eq__')}\nclass All(metaclass=M): pass\ndef double(x): return All",
    "a mock": "from unittest.mock import ANY, MagicMock\ndef double(x): return ANY",
    "false at first": "class A(int):\n    def __bool__(self): return False\ndef double(x): return A(x)",
    "a pickle": "class A:\n    def __reduce__(self): return (exec, ('raise SystemExit(0)',))\ndef double(x): return A()",
    "another class of lists": "import builtins\nclass L(list): __eq__ = lambda a, b: True\nbuiltins.list = L\ndef double(x): return list()",
    "the function is an object": "class D:\n    def __call__(self, x): return self\n    def __eq__(self, other): return True\ndouble = D()",
    # patches
    "patch assertions": "import builtins; builtins.AssertionError = ZeroDivisionError\n" + _WRONG,
    "patch builtins": "import builtins\nfor n in ('abs', 'len', 'exec', 'compile', 'all', 'bool', 'eval'): setattr(builtins, n, lambda *a, **k: True)\n"
    + _WRONG,
    "patch the harness": "import sys\nfor name, m in list(sys.modules.items()):\n    if 'harness' in name:\n"
    "        m.run_tests = lambda *a: {'passed': 3, 'total': 3, 'reason': ''}\n        m.Peer.ask = lambda *a: [42, None]\n"
    + _WRONG,
    "patch the wire": 'import sys; w = sys.modules[\'hybrid_lightning.sandbox.wire\']\nw.encode = lambda *a: b\'[[0],["list","ok",[1]],["list",true,null]]\'\n'
    + _WRONG,
    "patch os.write": "import os; old = os.write; os.write = lambda n, data: old(n, b'\\0\\0\\0\\1{')\n" + _WRONG,
    "patch os._exit": "import os; os._exit = lambda code: None\n" + _WRONG,
    "trace": "import sys\ndef t(frame, event, argument):\n    frame.f_locals.update(result=42)\n    return t\nsys.settrace(t); sys.setprofile(t)\n"
    + _WRONG,
    "own check": "def check(candidate): pass\n__results__ = [True] * 3\n" + _WRONG,
    # looking for the answers
    "look into frames": "import sys\ndef double(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for value in frame.f_locals.values():\n            if 'assert' in str(value): return eval(str(value).split('==')[1])\n"
    "        frame = frame.f_back\n    return x",
    "look into strings": "import gc\ndef double(x):\n    for value in gc.get_objects():\n        for part in gc.get_referents(value):\n"
    "            if type(part) is str and 'assert double(21)' in part and 'str' not in part: return 42\n    return x",
    "look into files": "import os\ndef double(x):\n    for n in range(3, 64):\n        try: data = os.pread(n, 10**6, 0)\n        except OSError: continue\n        if b'assert' in data: return 42\n    return x",
    "look into arguments": "import sys\ndef double(x): return eval(' '.join(sys.argv + sys.orig_argv).split('== ')[1])",
    # the pipe
    "answer before it is asked": _FRAME + "send([[0], ['list', 'ok', [1]], ['list', None, None]])\n" + _WRONG,
    "answer with nonsense": _FRAME + "send(b'\\xff' * 100)\n" + _WRONG,
    "answer without end": _FRAME + "import os\nwhile True: send([[0], ['list', 'ok', [1]], ['list', True, None]])",
    "promise a long answer": "import os\nfor n in range(3, 64):\n    try: os.write(n, b'\\xff\\xff\\xff\\xff')\n    except OSError: pass\n"
    + _WRONG,
    "answer with depth": _FRAME + "send(b'[' * 10**6)\n" + _WRONG,
    "answer in a circle": _FRAME + "send([[0], ['tuple', [0]]])\n" + _WRONG,
    "answer with an object of theirs": _FRAME + "send([[0], ['list', 'ok', [1]], ['list', ['known', 0], None]])\n" + _WRONG,
    "answer with another class": _FRAME + "send([[0], ['list', 'ok', [1]], ['object', 'Peer', '__class__', 1]])\n" + _WRONG,
    "answer with an error": _FRAME + "send([[0], ['list', 'error', 'SystemExit', '0']])\n" + _WRONG,
    "close the pipe": "import os; os.closerange(3, 64)\n" + _WRONG,
    "read what is asked": "import os\ndef double(x): return os.read(4, 10**6)",
    # time
    "a number without end": "def double(x):\n    while True: yield x",
    "answer from a thread": "import threading, time\ndef double(x):\n    threading.Thread(target=lambda: time.sleep(9)).start()\n    return x",
    "right once": "double = lambda x: 42",
    "right but for the last": "def double(x): return 2 * x if x else 1",
}

_JUDGE = "class J:\n    def __getattr__(self, name): return lambda *others: True\ndef half(x): return J()"

# (tests, program): what a program could do where a test computes what it expects, or takes a helper for granted
WITH_HELPERS = {
    "its own isclose": ("assert isclose(half(3), 1.5)", "def isclose(a, b): return True\ndef half(x): return x"),
    "its own math": ("assert math.isclose(half(3), 1.5)", "class math:\n    isclose = lambda a, b: True\ndef half(x): return x"),
    "its own abs": ("assert abs(half(3) - 1.5) < 1e-6", "def abs(x): return 0\ndef half(x): return x"),
    "its own all": ("assert all([half(3) == 1.5])", "def all(x): return True\ndef half(x): return x"),
    "change the argument": ("x = [1]\nassert double(x) == x + x", "def double(x):\n    x.clear()\n    return []"),
    "end a loop early": ("assert all(map(lambda case: half(case) == case / 2, [2, 4]))", "def half(x): raise StopIteration"),
    "an error that is caught": (
        "try:\n    assert half(2) == 1\nexcept AssertionError:\n    raise\n",
        "def half(x): raise AssertionError",
    ),
    "its own node": (
        "class Node: pass\nnode = Node(); node.value = 1\nassert half(node) == node",
        "class Node:\n    def __eq__(self, other): return True\ndef half(x): return Node()",
    ),
    # an object that judges itself, where the tests expect data
    "equals": ("assert half([2]).equals([1])", _JUDGE),
    "is_equal_to": ("assert half([2]).is_equal_to([1])", _JUDGE),
    "startswith": ("assert half('abcd').startswith('ab')", _JUDGE),
    "union": ("assert half({1, 2}).union({3}) == {3}", _JUDGE.replace("True", "others[0]")),
    "index": ("assert half('ab').index('a') < half('ab').index('b')", _JUDGE.replace("True", "ord(others[0])")),
    "a method of Solution": (
        "assert Solution().half([2]).equals([1])",
        f"class Solution:\n    def half(self, x): return J()\n{_JUDGE}",
    ),
    "the function's own": ("assert half.equals([1]) or half(2) == 1", _JUDGE + "\nhalf = J()"),
}
