"""A row of each data set, in the layout that it has on the hub and in those of copies."""

import hub_contents as hub

from hybrid_lightning.data import AIME24, AIME25, AMC23, GSM8K, MATH, MATH500, DAPOMath17k, LeetCode, MMLUPro
from hybrid_lightning.rewards import CodeTests, MultipleChoice

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
DAPO_PROBLEM = hub.DAPO[33]["prompt"]
MMLU = hub.MMLU_PRO[6]  # of ten options
SOLUTION = hub.LEETCODE[1]["completion"]
AIME_BY_ID = {"ID": "2024-II-4", "Problem": "Find $m+n$.", "Solution": "so 33", "Answer": 33}
AIME_BY_URL = {"id": 60, "problem": "Find $m+n$.", "solution": "\\boxed{204}", "url": "https://a.b"}
TURNS = [{"content": DAPO.format(DAPO_PROBLEM), "role": "user"}]
OPTIONS = "A. Safe\nB. Unsafe\nC. Fear\nD. Jealousy\nE. Distress\nF. Joy\nG. Trivial\nH. N/A\nI. N/A\nJ. N/A"
# Preset, and a row in the layout of the hub or of a copy.
ROWS = {
    "gsm8k": (GSM8K, hub.GSM8K[60]),
    "math": (MATH, {**hub.MATH[0], "solution": "$\\boxed{70}$ halves: it is $\\boxed{\\frac{1}{2}}$."}),
    "math500": (MATH500, hub.MATH500[1]),
    "dapo": (DAPOMath17k, hub.DAPO[33]),
    "dapo original": (DAPOMath17k, {"prompt": TURNS, "reward_model": hub.DAPO[33]["reward_model"]}),
    "aime24": (AIME24, hub.AIME24[5]),
    "aime24 Maxwell-Jia": (AIME24, AIME_BY_ID),
    "aime24 math-ai": (AIME24, AIME_BY_URL),
    "aime25": (AIME25, hub.AIME25[0]),
    "aime25 opencompass": (AIME25, {"question": "Sum of all bases?", "answer": "588"}),
    "amc23": (AMC23, {**hub.AMC23[0], "answer": "27.0"}),
    "amc23 numbers": (AMC23, {"id": 0, "problem": "How many?", "answer": 9.0}),
    "amc23 letters": (AMC23, {"question": "(A) 1 (B) 2", "answer": "B"}),
    "mmlu_pro": (MMLUPro, MMLU),
    "leetcode": (LeetCode, hub.LEETCODE[1]),
}
REWARDS = {MMLUPro: MultipleChoice, LeetCode: CodeTests}  # of others, MathMatch
TOM, WALK = "Tom has 1000 pens and gets 1,002 more. How many pens in total?", "Every morning Aya goes for a $5$-kilometer walk."
POLAR = "Convert the point $(0,3)$ to polar coordinates."
WRONG = SOLUTION.replace("+ 1", "+ 2")
# The question, the reference answer, a right completion and a wrong one.
ANSWERS = {
    "gsm8k": (TOM, "2,002", "He has 2002 pens.", "He has 202 pens."),
    "math": ("Compute $0+\\frac{1}{2}$.", "\\frac{1}{2}", "\\boxed{0.5}", "\\boxed{70}"),
    "math500": (POLAR, "\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", "\\boxed{(\\pi/2, 3)}"),
    "dapo": (DAPO_PROBLEM, "34", "Answer: 34", "Answer: 43"),
    "dapo original": (DAPO_PROBLEM, "34", "\\boxed{34}", "\\boxed{35}"),
    "aime24": (WALK, "035", "\\boxed{35}", "\\boxed{53}"),
    "aime24 Maxwell-Jia": ("Find $m+n$.", "33", "33", "3.3"),
    "aime24 math-ai": ("Find $m+n$.", "204", "\\boxed{204}", "\\boxed{402}"),
    "aime25": ("Sum of all bases $b>0$?", "70", "\\boxed{70}", "\\boxed{7}"),
    "aime25 opencompass": ("Sum of all bases?", "588", "588", "589"),
    "amc23": ("How many miles, 0?", "27.0", "\\boxed{\\textbf{(E) } 27}", "\\boxed{\\textbf{(E) } 28}"),
    "amc23 numbers": ("How many?", "9", "9", "6"),
    "amc23 letters": ("(A) 1 (B) 2", "B", "(B)", "(A)"),
    "mmlu_pro": (f"{MMLU['question']}\n\n{OPTIONS}", "C", "The answer is (C).", "I think it is (B)"),
    "leetcode": (hub.LEETCODE[1]["query"], SOLUTION.strip(), f"```python\n{SOLUTION}```", f"```python\n{WRONG}```"),
}
