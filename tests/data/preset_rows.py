"""A row of each data set, in the layout that it has on the hub."""

from hybrid_lightning.data import AIME24, AIME25, AMC23, GSM8K, MATH, MATH500, DAPOMath17k, LeetCode, MMLUPro
from hybrid_lightning.rewards import CodeTests, MathMatch, MultipleChoice

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
DAPO_PROBLEM = "In triangle $ABC$, $\\sin A = \\frac{4}{5}$.\n\nFind $m+n$."
SOLUTION = "class Solution:\n    def addOne(self, x: int) -> int:\n        return x + 1\n"
QUERY = (
    "Add one.\nPlease complete the following python code precisely:\n"
    "```python\nclass Solution:\n    def addOne(self, x: int) -> int:\n```"
)
# Preset, a row in the layout of the hub, the question, the reference answer, a right completion and a wrong one, the reward.
ROWS = {
    "gsm8k": (
        GSM8K,
        {
            "question": "Natalia sold 48 clips, and half as many in May. How many?",
            "answer": "48/2 = <<48/2=24>>24\n48+1,152\n#### 1,200",
        },
        "Natalia sold 48 clips, and half as many in May. How many?",
        "1,200",
        ("She sold 1200 clips.", "She sold 120 clips."),
        MathMatch,
    ),
    "math": (
        MATH,
        {
            "problem": "Compute $\\dbinom{8}{4}/140$.",
            "level": "Level 1",
            "type": "Counting & Probability",
            "solution": "$\\boxed{70}$ halves: it is $\\boxed{\\frac{1}{2}}$.",
        },
        "Compute $\\dbinom{8}{4}/140$.",
        "\\frac{1}{2}",
        ("\\boxed{0.5}", "\\boxed{70}"),
        MathMatch,
    ),
    "math500": (
        MATH500,
        {
            "problem": "Convert the point $(0,3)$ to polar coordinates.",
            "solution": "\\[\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.\\]",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        "Convert the point $(0,3)$ to polar coordinates.",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        ("\\boxed{(3, \\pi/2)}", "\\boxed{(\\pi/2, 3)}"),
        MathMatch,
    ),
    "dapo": (
        DAPOMath17k,
        {
            "prompt": DAPO_PROBLEM,
            "solution": "34",
            "data_source": "math_dapo",
            "source_prompt": [{"content": DAPO.format(DAPO_PROBLEM), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        },
        DAPO_PROBLEM,
        "34",
        ("Answer: 34", "Answer: 43"),
        MathMatch,
    ),
    "dapo original": (
        DAPOMath17k,
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO.format(DAPO_PROBLEM), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        },
        DAPO_PROBLEM,
        "34",
        ("\\boxed{34}", "\\boxed{35}"),
        MathMatch,
    ),
    "aime24": (
        AIME24,
        {
            "id": 60,
            "problem": "Find $m+n$.",
            "solution": "so \\boxed{073}.",
            "answer": "073",
            "url": "https://a.b",
            "year": "2024",
        },
        "Find $m+n$.",
        "073",
        ("\\boxed{73}", "\\boxed{37}"),
        MathMatch,
    ),
    "aime24 Maxwell-Jia": (
        AIME24,
        {"ID": "2024-II-4", "Problem": "Find $m+n$.", "Solution": "so 33", "Answer": 33},
        "Find $m+n$.",
        "33",
        ("33", "3.3"),
        MathMatch,
    ),
    "aime24 math-ai": (
        AIME24,
        {"id": 60, "problem": "Find $m+n$.", "solution": "\\boxed{204}", "url": "https://a.b"},
        "Find $m+n$.",
        "204",
        ("\\boxed{204}", "\\boxed{402}"),
        MathMatch,
    ),
    "aime25": (
        AIME25,
        {"problem": "Sum of all bases $b>9$?", "answer": "70", "id": "0"},
        "Sum of all bases $b>9$?",
        "70",
        ("\\boxed{70}", "\\boxed{7}"),
        MathMatch,
    ),
    "aime25 opencompass": (
        AIME25,
        {"question": "Sum of all bases?", "answer": "588"},
        "Sum of all bases?",
        "588",
        ("588", "589"),
        MathMatch,
    ),
    "amc23": (
        AMC23,
        {"id": 0, "answer": "27.0", "url": "https://a.b/2023_AMC_12A_Problems/Problem_1", "question": "How many miles?"},
        "How many miles?",
        "27.0",
        ("\\boxed{\\textbf{(E) } 27}", "\\boxed{\\textbf{(E) } 28}"),
        MathMatch,
    ),
    "amc23 numbers": (AMC23, {"id": 0, "problem": "How many?", "answer": 9.0}, "How many?", "9", ("9", "6"), MathMatch),
    "amc23 letters": (AMC23, {"question": "(A) 1 (B) 2", "answer": "B"}, "(A) 1 (B) 2", "B", ("(B)", "(A)"), MathMatch),
    "mmlu_pro": (
        MMLUPro,
        {
            "question_id": 70,
            "question": "Typical advertising bodies warn of ...",
            "options": ["Safe practices", "Unsafe practices", "Fear", "Jealousy", "Distress", "Joy", "Trivial", "a", "b", "c"],
            "answer": "I",
            "answer_index": 8,
            "cot_content": "",
            "category": "business",
            "src": "ori_mmlu-business_ethics",
        },
        "Typical advertising bodies warn of ...\n\nA. Safe practices\nB. Unsafe practices\nC. Fear\nD. Jealousy\nE. Distress\n"
        "F. Joy\nG. Trivial\nH. a\nI. b\nJ. c",
        "I",
        ("The answer is (I).", "I think it is (B)"),
        MultipleChoice,
    ),
    "leetcode": (
        LeetCode,
        {
            "task_id": "add-one",
            "question_id": 1,
            "difficulty": "Easy",
            "tags": ["Math"],
            "problem_description": "Add one.",
            "starter_code": "class Solution:\n    def addOne(self, x: int) -> int:\n        ",
            "estimated_date": "2015-08-07",
            "prompt": "import math\nfrom typing import *\n",
            "completion": SOLUTION,
            "entry_point": "Solution().addOne",
            "test": "def check(candidate):\n    assert candidate(x = 1) == 2\n    assert candidate(x = -1) == 0\n",
            "input_output": [{"input": "x = 1", "output": "2"}],
            "query": QUERY,
            "response": f"```python\n{SOLUTION}```",
        },
        QUERY,
        SOLUTION.strip(),
        (f"```python\n{SOLUTION}```", f"```python\n{SOLUTION.replace('+ 1', '+ 2')}```"),
        CodeTests,
    ),
}
