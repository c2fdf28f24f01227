"""What the words around a number make of it: bounds, remarks in brackets, and several equations."""

import pytest

from hybrid_lightning.rewards import MathMatch
from hybrid_lightning.types import Prompt

# reference answer -> (completions that are right, completions that are not)
BOUNDS = {
    "18": (
        [
            "She needs at least 18 eggs.",
            "He must sell at least 18 boxes",
            "Tom has 18 more than Ann.",
            "18 more apples than Tom",
            "There must be at least 18 people.",
            "At least 18 eggs are needed.",
            "He cannot buy more than 18.",
            "He can't buy more than 18 apples.",
            "She can buy at most 18 apples.",
            "He can buy up to 18 apples.",
            "She has 18 fewer than Tom.",
            "The first is 18 and smaller than the second.",
            "Tom is 18 years older than Ann.",
            "It is more than 17, so it is 18.",
            "17 < 18, so more than 17 means 18",
            r"Since $n$ is at least 17.5, $n=\boxed{18}$.",
            r"The minimum is $\boxed{18}$.",
            "There are at least 2 ways, and the answer is 18.",
            "18, which is all of them",
            "The answer is 18, no more and no less.",
            "She needs 18 or more points.",
            r"We need more than 17, so $\boxed{18}$",
            "9+9 = 18",
            "a+b=18",
            "The minimum is 18.",
            "The least number is 18.",
            "The maximum of f is 18.",
            "at least 12 and then 18",
            "The smallest integer greater than 17 is 18.",
            "He is over the limit by 18.",
            "x = 18 + 0",
        ],
        [
            "The answer is at least 18",
            "The answer is at least 18.",
            "The answer: at least 18",
            r"\boxed{\text{at least }18}",
            r"\boxed{\text{at least 18}}",
            r"\boxed{\text{at most } 18}",
            r"\boxed{\text{more than }18}",
            r"\boxed{18 \text{ or more}}",
            r"\boxed{18+}",
            "x is more than 18",
            "x is less than 18",
            "fewer than 18",
            "x is greater than 18",
            "It is over 18",
            "18 or more",
            "18 or less",
            "18 or fewer",
            "no more than 18",
            "at most 18",
            "up to 18",
            "18+",
            "The answer is 18 or more.",
            "The answer is 18+.",
            "The total is at most 18 dollars.",
            "He needs more than 18 dollars.",
            "The answer is more than $18$.",
            r"The answer is at least $\boxed{18}$.",
            "**At least 18**",
            "Answer: at most 18",
            "x = at most 18",
            "The answer is at least 18 since all are full.",
            "There are more than 18 apples.",
            "18 at least",
            "at least 18 eggs",
            "The answer is $18 or more.",
            "The number is 18 or greater.",
            "It is just over 18.",
            "It is slightly more than 18.",
            "It's under 18",
            r"The area is at most $18\text{ cm}^2$.",
            r"\boxed{\geq 18}",
            r"\boxed{\text{less than } 18\text{ cm}^2}",
            "The value is no less than 18.",
            "The cost is not more than 18.",
        ],
    ),
    "12": (
        [],
        [
            "It is 12+.",
            "The answer is up to 12.",
            "Answer: 12 or more",
            "**Answer: at least 12 apples**",
            "The result is more than 12 km.",
            "It's at most 12.",
            "12 or fewer apples",
            "12 and above",
            "12+ apples",
            r"\boxed{12\text{ or fewer}}",
            r"\boxed{12 \text{ at most}}",
            "The number of apples is more than 12 but nobody knows.",
        ],
    ),
    r"\frac{1}{2}": (
        [r"The probability is $\frac{1}{2}$.", r"It needs at least $\frac{1}{2}$ cup."],
        [r"The probability is at least $\frac{1}{2}$.", r"\boxed{\text{at most }\frac{1}{2}}"],
    ),
}
REMARKS = {
    "18": (
        [
            "The answer is 18 dollars (9 eggs at $2).",
            "18 dollars (9 eggs at $2)",
            "18 (9 times 2)",
            "**18 dollars** (9 eggs at $2 each).",
            "She has 9 eggs (which makes $18)",
            "$18 (9 eggs at $2)",
            "The answer is $18 (since 9 * 2 = 18).",
            "The answer is 18 (see step 3).",
            "18 (9*2)",
            "17.6 (about 18)",
            "18 (not 19)",
            "The answer is: **18** (20 - 2)",
            "18 apples (12 red, 6 green)",
            "Therefore the answer is 18 (mod 100).",
        ],
        [
            "9 eggs (18 of them were sold at $2)",
            "The answer is 9 eggs ($18 in all, 2 each)",
            "18 (or 19)",
            "17 dollars (9 eggs at 18)",
            "2 dollars (18 in total for 9)",
            "The answer is 19 dollars (not 18).",
        ],
    ),
    "12": ([], ["12 (or 13)"]),
    "0.5": (["0.5 (50%)", "1/2 (that is 0.5)", "1/2 (0.5)"], []),
    "20 dollars": (
        ["The answer is 20 dollars (4 tickets at $5).", "$20 (4 x $5)", "**$20** (4 tickets at $5 each)"],
        ["The answer is 4 tickets (each $5, $20 in all)"],
    ),
    "70000": (["$70,000 (200,000 - 130,000)"], []),
}
JOINED = {
    "(2,3)": (
        [
            "x = 2 and y = 3",
            "y = 3 and x = 2",
            r"\boxed{x = 2, y = 3}",
            r"\boxed{y=3, x=2}",
            "$x = 2$ and $y = 3$",
            "The answer is x = 2, y = 3.",
            r"\boxed{x=2\text{ and }y=3}",
            "(x, y) = (2, 3)",
        ],
        ["x = 3 and y = 2", "y = 2 and x = 3", r"\boxed{y=2,x=3}", "x = 2", "x = 2 and y = 4"],
    ),
    "(3,2)": (["x=3 and y=2", "y = 2 and x = 3"], ["y=3 and x=2"]),
    "3": (
        ["So $x = 2$ and $y = 3$.", "$2x = 6$ and $x = 3$."],
        [
            "So $x = 3$ and $y = 2$.",
            "$x=2$ or $x=3$",
            "So $x = 2$ or $y = 3$.",
            "$x_1 = 2$ and $x_2 = 3$",
            r"\boxed{x=2\text{ or }3}",
            "The solutions are 2 and 3.",
            "The roots are $2$ and $3$.",
            r"\boxed{2 \text{ and } 3}",
            "2 and 3",
        ],
    ),
    "2,3": (
        [
            "The solutions are 2 and 3.",
            "The roots are 3 and 2.",
            "x = 2 or x = 3",
            r"\boxed{2,3}",
            r"\boxed{x=2\text{ or }x=3}",
            "2 and 3",
            "The solutions are $2$ and $3$.",
        ],
        ["The solutions are 2 and 4.", "The solutions are 2 and 3 and 4.", "3", "2"],
    ),
    "(1,2,3)": (["x=1, y=2, z=3", "z=3, y=2, x=1", "x = 1, y = 2 and z = 3"], ["x=3, y=2, z=1"]),
    "x+1": (["$f(x) = x^2$ and $g(x) = x+1$"], ["$g(x) = x+1$ and $f(x) = x^2$"]),
    "(1,2)": (["y = 2, x = 1"], ["y=1 and x=2"]),
    "7": (["$a = 5$ and $b = 7$", "Thus $x+y = 10$ and $x = 7$."], []),
}
NUMBERS = {
    "1234": (["$x = 1,234$", "x=1,234"], []),
    "1250": (
        ["He earned $1,250.", "$1250.00", "Total: $1,250", "1,250 dollars per month", "1.25 thousand"],
        ["$1,250,000", "$12.50", "1.250"],
    ),
}


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [(answer, *texts) for table in (BOUNDS, REMARKS, JOINED, NUMBERS) for answer, texts in table.items()],
)
def test_phrases(answer, right, wrong):
    prompt = Prompt(text="?", answer=answer)
    scores = MathMatch()([*right, *wrong], [prompt] * (len(right) + len(wrong)))
    wanted = [1.0] * len(right) + [0.0] * len(wrong)
    assert [(text, score) for text, score, value in zip([*right, *wrong], scores, wanted, strict=True) if score != value] == []
