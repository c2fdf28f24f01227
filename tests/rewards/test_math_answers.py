"""Right answers and subtly wrong ones, in the styles of GSM8K, MATH, AIME and AMC."""

import pytest

from hybrid_lightning.rewards import MathMatch
from hybrid_lightning.types import Prompt

# reference answer -> (completions that are right, completions that are not)
GSM8K = {
    "72": (
        [
            "48+24 = 72 clips.\n#### 72",
            "#### 72 clips",
            "The answer is $72.00.",
            "**72**",
            "72 clips altogether in April and May",
        ],
        ["72 million", "72,5", "72:30", "72 + 1", "#### 27", "#### 72.5", "#### -72", "#### 720", "72 or 73", "seventy-two"],
    ),
    "1,200": (["#### 1200", "$1,200.00", r"\$1{,}200", "1,200 dollars"], ["12000", "1.200", "1,2000", "120"]),
    "1500000": (["1.5 million", r"1{,}500{,}000", "1,500 thousand"], ["1.5", "15 million", "1.5 billion"]),
    "3.5": (["3.50", "3 1/2", r"\boxed{3\frac{1}{2}}", "7/2"], ["31/2", "3 2/1", "35"]),
}
MATH = {
    r"\frac{1}{2}": (
        [r"\boxed{\frac12}", r"\boxed{\dfrac{1}{2}}", r"\boxed{.5}", r"\boxed{x = \frac{1}{2}}", r"\boxed{50\%}"],
        [r"\boxed{\frac{2}{1}}", r"\boxed{-\frac12}", r"\boxed{\frac12} or \boxed{\frac13}", r"\boxed{5\%}", r"\boxed{12}"],
    ),
    r"\frac{3}{4}": ([r"\boxed{\frac{\frac{3}{2}}{2}}", "0.75"], [r"\boxed{\frac{4}{3}}", "0.749"]),
    r"2\sqrt{3}": ([r"\boxed{\sqrt{12}}"], [r"\boxed{3\sqrt{2}}", r"\boxed{2\sqrt[3]{3}}", r"\boxed{3.46}"]),
    r"\left( 3, \frac{\pi}{2} \right)": ([r"\boxed{(3, \pi/2)}"], [r"\boxed{(\frac{\pi}{2},3)}", r"\boxed{3}"]),
    "(5,-2)": (["The point is (5, -2).", r"\boxed{(5,-2)}"], ["The point is (-2, 5).", r"\boxed{(-2,5)}", "5"]),
    "[0,1)": ([r"\boxed{[0,1)}", r"\boxed{0 \le x < 1}", "[0, 1)"], [r"\boxed{[0,1]}", r"\boxed{0 < x \le 1}", "(0, 1)"]),
    r"(-\infty,-1)\cup(1,\infty)": (
        [r"\boxed{(1,\infty)\cup(-\infty,-1)}", r"\boxed{x \in (-\infty, -1) \cup (1, +\infty)}"],
        [r"\boxed{(-\infty,-1)\cup[1,\infty)}", r"\boxed{(-\infty,-1)}"],
    ),
    r"(-2,1)\cup(3,\infty)": (
        [r"\boxed{(-2, 1) \cup (3, +\infty)}", r"\boxed{x \in (3,\infty) \cup (-2,1)}"],
        [r"\boxed{(-2,1]\cup(3,\infty)}", r"\boxed{(-2,1)}", r"\boxed{(-2,1)\cap(3,\infty)}"],
    ),
    r"\{1,2\}": ([r"\boxed{\{2,1\}}", r"\boxed{1 \text{ and } 2}"], [r"\boxed{(1,2)}", r"\boxed{[1,2]}", r"\boxed{\{1,2,3\}}"]),
    "1,-2": ([r"\boxed{x=1 \text{ or } x=-2}", r"\boxed{-2, 1}"], [r"\boxed{1}", r"\boxed{1, 2}"]),
    r"3 \pm 2 \sqrt{2}": ([r"\boxed{3+2\sqrt2, 3-2\sqrt2}"], [r"\boxed{3+2\sqrt{2}}"]),
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": (
        [r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"],
        [r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}"],
    ),
    "x^2+2x+1": ([r"\boxed{(x+1)^2}"], [r"\boxed{(x-1)^2}", r"\boxed{x^2+2x-1}"]),
    "6 - 5i": ([r"\boxed{-5i+6}"], [r"\boxed{6+5i}"]),
    r"90^\circ": ([r"\boxed{90}", r"\boxed{90 \text{ degrees}}"], [r"\boxed{80^\circ}"]),
    r"5 \text{ cm}^2": ([r"\boxed{5\text{ cm}^2}", r"\boxed{5}", r"\boxed{5 cm^2}"], [r"\boxed{25}"]),
    "5": (
        [
            r"\boxed{5\ \frac{\text{m}}{\text{s}}}",
            r"\boxed{5~\text{m/s}}",
            r"\boxed{5 m/s}",
            r"\boxed{\boxed{5}}",
            r"\fbox{5}",
            r"\boxed 5",
        ],
        [r"\boxed{\pm 5}", r"\boxed{5, 6}", r"\boxed{5^2}", r"\boxed{5x}", r"\boxed{(5,0)}"],
    ),
    r"10\%": ([r"\boxed{10\%}", r"\boxed{0.1}", r"\boxed{10}"], [r"\boxed{1}"]),
    r"11,\! 111,\! 111,\! 100": ([r"\boxed{11111111100}"], [r"\boxed{1111111100}"]),
    "10000": ([r"\boxed{10{,}000}", r"\boxed{10^4}"], [r"\boxed{1,000}", r"\boxed{10.000}"]),
    "2516_8": ([r"\boxed{2516_8}", r"\boxed{2516_{8}}", r"\boxed{2516}"], [r"\boxed{2517_8}", r"\boxed{2516_9}"]),
    r"0.\overline{3}": ([r"\boxed{\frac13}", r"\boxed{0.\overline{3}}"], [r"\boxed{0.3}", r"\boxed{0.0\overline{3}}"]),
    r"\text{June 20}": (
        [r"\boxed{\text{June 20}}", r"\boxed{June 20}", r"\boxed{\text{June } 20}"],
        [r"\boxed{June 21}", r"\boxed{20}"],
    ),
    r"\text{Evelyn}": ([r"\boxed{\text{Evelyn}}"], [r"\boxed{\text{Briana}}"]),
    r"\text{(C)}": ([r"\boxed{C}", r"\boxed{\text{(C)}}", "The answer is (C)."], [r"\boxed{B}", "The answer is C or D"]),
}
AIME = {
    "073": (["73", r"\boxed{073}", r"\boxed{73}", "so $m+n=70+3=73$"], ["730", "7.3", r"\boxed{37}"]),
    "204": (
        [
            r"$\boxed{204}$ minutes.",
            r"$m+n=100+104=\boxed{204}$",
            r"\boxed{204.}",
            r"\boxed{\textbf{204}}",
            r"\boxed{\mathbf{204}}",
            "204°",
        ],
        [r"\boxed{240}", r"\boxed{2.04}", r"\boxed{-204}", r"\boxed{203.9999}", "Answer: 204 or 205", r"\boxed{204i}"],
    ),
    "21": ([r"\boxed{21 \pmod{1000}}"], [r"\boxed{21^2}"]),
    "0": (["000", r"\boxed{0}"], [r"\boxed{}", r"\boxed{\emptyset}"]),
}
AMC = {
    "27.0": (
        [
            r"\boxed{27}",
            r"\boxed{\textbf{(B)}\ 27}",
            r"\boxed{\text{(B)} 27}",
            "(B) 27",
            r"\boxed{(B) 27}",
            r"\boxed{\mathrm{(B)}~27}",
        ],
        ["(27) B) 28", r"\boxed{\textbf{(B)}\ 72}", r"\boxed{B}", r"\boxed{27.1}"],
    ),
    "B": (
        [r"\boxed{\textbf{(B)}\ 27}", r"\boxed{\text{B}}", "The answer is B.", "(B)", r"\boxed{(B)}"],
        [r"\boxed{\textbf{(C)}\ 27}", "The answer is C.", r"\boxed{27}"],
    ),
    "E": ([r"\boxed{\textbf{(E)}\ 7}"], [r"\boxed{2.718281828}"]),
}
THINKING = {
    "14": (
        [r"<think>\boxed{12}?</think>It is \boxed{14}", "<think>Or 15?</think>\n14"],
        [r"<think>\boxed{14}?</think>It is \boxed{12}", "<think>it is 14", "<think>14</think>I do not know"],
    ),
}
ROWS = [
    pytest.param(answer, completion, value, id=f"{answer} | {completion}")
    for table in (GSM8K, MATH, AIME, AMC, THINKING)
    for answer, (right, wrong) in table.items()
    for value, completions in ((1.0, right), (0.0, wrong))
    for completion in completions
]


@pytest.mark.parametrize(("answer", "completion", "value"), ROWS)
def test_answers(answer, completion, value):
    assert MathMatch()([completion], [Prompt(text="?", answer=answer)]) == [value]


def test_long_text_takes_no_longer_than_it_may():
    prompt = Prompt(text="?", answer="17")
    working = "Let us see $x^2+3=12$, giving 3. " * 200
    texts = [working + r"\boxed{17}", "(" * 5_000, r"\boxed{" * 1_000, "$" * 5_000, "A or " * 1_000]
    assert MathMatch(cpu_seconds=2.0)(texts, [prompt] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_letters_vote_as_letters_and_reasoning_has_no_vote():
    prompt = Prompt(text="?", answer="B")
    assert [MathMatch().extract_answer(text, prompt) for text in ("(B) 5", "<think>A</think>so B", "<think>A")] == [
        "B",
        "B",
        None,
    ]
