"""A row of each data set, in the layout of the hub and in the layouts of copies."""

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
DAPO_ORIGINAL = {"prompt": TURNS, "reward_model": hub.DAPO[33]["reward_model"]}
OPTIONS = "A. Safe\nB. Unsafe\nC. Fear\nD. Jealousy\nE. Distress\nF. Joy\nG. Trivial\nH. N/A\nI. N/A\nJ. N/A"
HALF = {**hub.MATH[0], "solution": "$\\boxed{70}$ halves: it is $\\boxed{\\frac{1}{2}}$."}
MILES = {**hub.AMC23[0], "answer": "27.0"}
TOM, WALK = "Tom has 1000 pens and gets 1,002 more. How many pens in total?", "Every morning Aya goes for a $5$-kilometer walk."
POLAR = "Convert the point $(0,3)$ to polar coordinates."
RIGHT, WRONG = (f"```python\n{SOLUTION.replace('+ 1', f'+ {number}')}```" for number in (1, 2))
REWARDS = {MMLUPro: MultipleChoice, LeetCode: CodeTests}  # of others, MathMatch
# Preset, a row in the layout of the hub or of a copy, its question and reference answer, a right completion and a wrong one.
CASES = {
    "gsm8k": (GSM8K, hub.GSM8K[60], TOM, "2,002", "He has 2002 pens.", "He has 202 pens."),
    "math": (MATH, HALF, "Compute $0+\\frac{1}{2}$.", "\\frac{1}{2}", "\\boxed{0.5}", "\\boxed{70}"),
    "math500": (MATH500, hub.MATH500[1], POLAR, "\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", "(\\pi/2, 3)"),
    "dapo": (DAPOMath17k, hub.DAPO[33], DAPO_PROBLEM, "34", "Answer: 34", "Answer: 43"),
    "dapo original": (DAPOMath17k, DAPO_ORIGINAL, DAPO_PROBLEM, "34", "\\boxed{34}", "\\boxed{35}"),
    "aime24": (AIME24, hub.AIME24[5], WALK, "035", "\\boxed{35}", "\\boxed{53}"),
    "aime24 Maxwell-Jia": (AIME24, AIME_BY_ID, "Find $m+n$.", "33", "33", "3.3"),
    "aime24 math-ai": (AIME24, AIME_BY_URL, "Find $m+n$.", "204", "\\boxed{204}", "\\boxed{402}"),
    "aime25": (AIME25, hub.AIME25[0], "Sum of all bases $b>0$?", "70", "\\boxed{70}", "\\boxed{7}"),
    "aime25 opencompass": (AIME25, {"question": "Sum of bases?", "answer": "588"}, "Sum of bases?", "588", "588", "589"),
    "amc23": (AMC23, MILES, "How many miles, 0?", "27.0", "\\boxed{\\textbf{(E) } 27}", "\\boxed{\\textbf{(E) } 28}"),
    "amc23 numbers": (AMC23, {"id": 0, "problem": "How many?", "answer": 9.0}, "How many?", "9", "9", "6"),
    "amc23 letters": (AMC23, {"question": "(A) 1 (B) 2", "answer": "B"}, "(A) 1 (B) 2", "B", "(B)", "(A)"),
    "mmlu_pro": (MMLUPro, MMLU, f"{MMLU['question']}\n\n{OPTIONS}", "C", "The answer is (C).", "I think it is (B)"),
    "leetcode": (LeetCode, hub.LEETCODE[1], hub.LEETCODE[1]["query"], SOLUTION.strip(), RIGHT, WRONG),
}
