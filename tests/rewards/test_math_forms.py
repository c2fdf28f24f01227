"""Right and subtly wrong answers by the form that they are written in; `test_math_answers.py` has them by data set."""

import pickle

import pytest

from hybrid_lightning.rewards import MathMatch, MultipleChoice
from hybrid_lightning.types import Completion, Prompt


def boxed(*answers):
    return [rf"So the answer is $\boxed{{{answer}}}$." for answer in answers]


# What is tried -> reference answer -> (completions that are right, completions that are not)
FORMS = {
    "macros around a number": {
        "116": (
            boxed(
                r"\underline{116}",
                r"\color{red}{116}",
                r"116\\",
                r"\text{116}",
                r"\textbf{(116)}",
                r"{{116}}",
                r"\displaystyle 116",
                r"\,116\,",
                r"\approx 116",
                r"m+n=115+1=116",
                r"\text{\$}116",
                r"116\%",
                r"\{116\}",
            ),
            boxed(r"\underline{117}", r"\textbf{(117)}", r"\pm116", "116!", "116x", "11.6", r"116 \text{ or } 117", "1 16"),
        ),
    },
    "units in words": {
        "18": (
            [
                *boxed(r"18~\text{dollars}", r"\text{18 dollars}", r"18\text{ km/h}", r"18\ \mathrm{cm}^2"),
                "18 cm\u00b2",
                "18cm",
                "18m",
            ],
            boxed(r"\text{19 dollars}", r"\text{18 or 19}", r"\text{at least 18}", r"\text{not 18}"),
        ),
        "12.5": ([*boxed(r"12.5\%"), "12.5%", "12.5 percent", "12.5 per cent"], boxed(r"125\%", r"1.25\%")),
        r"12.5\%": ([*boxed("12.5", r"\frac18"), "12.5 per cent"], boxed("125", r"1.25\%")),
        r"6:00 \text{ a.m.}": (boxed(r"6:00 \text{ a.m.}", "6:00"), boxed(r"6:00 \text{ p.m.}", r"6:01 \text{ a.m.}")),
    },
    "relations": {
        "5": (
            [*boxed("x=5"), "x = 5", "5 > 4, so it is 5"],
            [
                *boxed(r"\ge 5", "> 5", r"x\ne5", r"\neq 5", r"\leq 5"),
                "x > 5",
                "x \u2265 5",
                "x<5",
                "x != 5",
                "x \u2260 5",
                "It is not 5.",
            ],
        ),
        "18": (["less 2 makes 18"], ["between 17 and 18", "It is between $17 and $18."]),
        "-3": (["It is -3."], ["between -4 and -3"]),
        r"x \ge 5": ([*boxed(r"x\geq5", r"[5,\infty)", r"5\le x"), "x \u2265 5"], boxed("x>5", r"(5,\infty)", r"x\le5")),
    },
    "formulas without delimiters": {
        "18": (["18", "18."], ["18x", "The answer is 18x."]),
        "2x": (["2x", "The answer is 2x."], ["2", "3x"]),
        "x^2-4": (["x^2-4", "The answer is: (x-2)(x+2)."], ["x^2+4", "y^2-4"]),
        r"\sqrt{2}": (["sqrt(2)", "\u221a2", "The answer is \u221a2."], ["2", "\u221a3", "-\u221a2"]),
        r"2+\sqrt{3}": (["2 + \u221a3", r"2+\sqrt{3}"], ["2 - \u221a3", "5"]),
        r"\frac{\pi}{2}": (["\u03c0/2", "pi/2", r"\frac{\pi}{2}"], ["2\u03c0", "2/pi", "90"]),
        r"\{1,2,3\}": (["{1, 2, 3}", "1, 2, 3", "1, 2 and 3"], ["1, 2", "{1, 2, 4}", "123"]),
        r"\pm 3": (["\u00b13", "3, -3"], ["3", "-3"]),
        r"\infty": (["\u221e", r"\infty"], ["-\u221e"]),
        "3+4i": (["3 + 4i", "4i + 3"], ["3 - 4i", "4 + 3i", "3"]),
        "5/2": (["2\\frac{1}{2}", "2\u00bd", "2 1/2", r"$2\frac12$"], ["2 3/2", "21/2", r"2\frac{1}{3}", "2-1/2"]),
    },
    "one number or two": {
        "3": ([], boxed("1 2", "1, 2")),
        "25": ([], boxed("12 13")),
        "12000": (boxed("12 000", "12,000", r"12\,000"), boxed("12 00", "12 0000")),
        r"\frac \pi4 + 2 - \sqrt2": (
            boxed(r"\frac{\pi}{4}+2-\sqrt{2}", r"2-\sqrt2+\frac\pi4"),
            boxed(r"\frac \pi4 + 2 + \sqrt2", r"\frac \pi4 + 2 - \sqrt3", r"\frac4 + 2 - \sqrt2", r"\frac{\pi}{4}"),
        ),
        r"\frac{\pi}{4}": (
            boxed(r"\frac\pi{4}", r"\frac{\pi}4", r"\dfrac\pi4", r"\frac{2\pi}8"),
            boxed(r"\frac4\pi", r"\frac{\pi}{5}", r"\frac\pi{40}"),
        ),
        r"\frac{x}{y}": (boxed(r"\frac xy", r"\frac x{y}"), boxed(r"\frac yx", "xy")),
        r"\frac{\sqrt3}{2}": (
            boxed(r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}", r"\sqrt{\frac34}"),
            boxed(r"\frac32", r"\frac{\sqrt2}{3}"),
        ),
        r"\frac{3}{4}": (boxed(r"\frac 3 4", r"\frac34", r"\frac{3}4"), boxed("3 4", r"\frac 4 3")),
    },
    "digits": {
        "18": (["\uff11\uff18", "\u200b18", "\u7b54\u6848\uff1a18\u3002"], ["\uff11\uff19"]),
        "1000": (["10\u00b3", "1 x 10^3", "1 \u00d7 10\u00b3"], ["10\u00b2", "103"]),
        "1/2": (["\u00bd"], ["\u00bc", "\u00be"]),
        "1/3": (["0.333...", "0.(3)", "0.3333\u2026", r"33\frac13\%"], ["0.33", "0.3", "0.(4)"]),
        "1/6": (["0.1666...", "0.1(6)"], ["0.166", "0.(16)"]),
        "-7": (["negative 7", "minus 7", "\u22127", *boxed(r"\text{-}7")], ["7", "9 minus 2 is 7"]),
        r"1.6\times10^{-19}": ([*boxed(r"1.6\cdot10^{-19}"), "1.6e-19"], boxed(r"9.1\times10^{-31}", "0", r"1.6\times10^{-18}")),
        "0.0000001": (boxed("0.0000001", "10^{-7}"), boxed("0.0000002", "0")),
    },
    "words": {
        r"\text{east}": (
            ["east", "The answer is east.", "**East**", *boxed("east", r"\text{East}")],
            ["west", "not east", "The answer is north east."],
        ),
    },
    "points": {
        "(1,2)": (boxed(r"\langle 1,2\rangle", "(x,y)=(1,2)"), boxed(r"\langle 2,1\rangle", r"\{1,2\}")),
        r"\emptyset": (boxed(r"\varnothing", r"\emptyset"), boxed("0", r"\{0\}")),
    },
    "several boxes": {
        "116": (
            [r"$\boxed{115}$? No, $\boxed{116}$.", r"$\boxed{116}$, as said: $\boxed{116}$", r"\boxed{116} 117"],
            [r"$\boxed{116}$? No, $\boxed{115}$.", r"$\boxed{115}$ or $\boxed{116}$", r"\boxed{117} 116"],
        ),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    reward = MathMatch()
    wrongly = []
    for answer, completions in FORMS[form].items():
        for wanted, texts in zip((1.0, 0.0), completions, strict=True):
            scores = reward(texts, [Prompt(text="?", answer=answer)] * len(texts))
            wrongly += [(answer, text, score) for text, score in zip(texts, scores, strict=True) if score != wanted]
    assert wrongly == []


@pytest.mark.parametrize("end", [" " * 20_000, "\t" * 20_000, "\n" * 20_000, "\u00a0" * 20_000, " \n" * 10_000])
def test_space_without_end_costs_no_time(end):
    assert MathMatch(cpu_seconds=1.0)(["12" + end, r"\boxed{12}" + end], [Prompt(text="?", answer="12")] * 2) == [1.0, 1.0]


def test_what_stands_far_before_the_end_or_the_last_box_is_not_looked_at():
    prompt = Prompt(text="?", answer="12")
    texts = [
        "3 and 9 make\n" * 3_000 + "12",
        r"\boxed{12}" + " 7 of them" * 3_000,
        "7 \\boxed{8} " * 3_000 + "\n" + r"\boxed{12}",
    ]
    assert MathMatch(cpu_seconds=2.0)(texts, [prompt] * 3) == [1.0, 1.0, 1.0]


def test_reasoning_that_the_prompt_began_and_that_has_no_end_is_no_answer():
    for reward, answer in ((MathMatch(), "12"), (MultipleChoice(), "C")):
        prompt = Prompt(text="?", answer=answer)
        texts = [f"It is {answer}, or so", f"It is 5</think>{answer}", f"It is {answer}</think>5"]
        cut = [Completion(text, num_tokens=9, finished=False, thinking=True) for text in texts]
        assert reward(cut, [prompt] * 3) == [0.0, 1.0, 0.0]
        assert reward(pickle.loads(pickle.dumps(cut)), [prompt] * 3) == [0.0, 1.0, 0.0]
        assert reward.extract_answer(cut[0], prompt) is None
        assert reward([Completion(texts[0], num_tokens=9, finished=True)], [prompt]) == [1.0]
