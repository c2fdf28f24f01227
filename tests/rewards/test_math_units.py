"""Units: they agree where both have one, units of one dimension are converted, and words after a number are no units."""

import re

import pytest

from hybrid_lightning.errors import RewardError
from hybrid_lightning.rewards import MathMatch
from hybrid_lightning.types import Prompt

# reference answer -> (completions that are right, completions that are not)
UNITS = {
    r"15\text{ m}^2": (
        [
            "15 m^2",
            "15 m\xb2",
            "15 square meters",
            "15 sq. m",
            "15 sq m",
            "15",
            "15 square units",
            r"$\boxed{15}$ square meters.",
            r"So the answer is $\boxed{15}$.",
            r"So the answer is $\boxed{15\text{ m}^2}$.",
            r"So the answer is $\boxed{15\,\text{m}^{2}}$.",
            r"So the answer is $\boxed{15\ \mathrm{m}^2}$.",
            r"So the answer is $\boxed{15 m^2}$.",
            r"So the answer is $\boxed{15m^2}$.",
            "150000 cm^2",
            "The area is 15 meters squared.",
            "15 m^2 of carpet",
            r"The area is $15\text{ m}^2$.",
        ],
        [
            "15 cm^2",
            "15 cm\xb2",
            "15 square centimeters",
            "15 m",
            "15 m^3",
            r"$\boxed{15}$ cm^2",
            r"So the answer is $\boxed{15\text{ cm}^2}$.",
            r"So the answer is $\boxed{15\text{ ft}^2}$.",
            r"So the answer is $\boxed{15\text{ m}^3}$.",
            "1500 cm^2",
            "15 feet",
            r"The area is $15\text{ cm}^2$.",
            "15 acres",
        ],
    ),
    "5 km": (
        [
            "5 km",
            "5 kilometers",
            "5 kilometres away",
            "5000 m",
            "5,000 meters",
            "5",
            "5.0 km.",
            "5km",
            r"So the answer is $\boxed{5 \text{ km}}$.",
            r"So the answer is $\boxed{5 km}$.",
            r"So the answer is $\boxed{5000 \text{ m}}$.",
            r"So the answer is $\boxed{5}$.",
        ],
        [
            "5 m",
            "5 miles",
            "5 meters",
            "500 m",
            "50 km",
            "5 hours",
            "5000",
            r"So the answer is $\boxed{5 \text{ m}}$.",
            r"So the answer is $\boxed{5\text{ miles}}$.",
        ],
    ),
    "3 hours": (
        [
            "3 hours",
            "3 h",
            "3 hrs",
            "3 hr.",
            "180 minutes",
            "10800 seconds",
            "3",
            "He needs 3 hours in total.",
            "3 hours a day",
            "3 hours per day",
            "3 in all",
            "It takes him 3 hours.",
        ],
        ["3 minutes", "3 days", "180 seconds", "180", "3 min", "It takes 3 minutes.", "30 hours"],
    ),
    "1.5 hours": (
        ["1.5 hours", "90 minutes", "1 1/2 hours", "1.5 hrs", "1.5", "90 min", r"\boxed{90\text{ minutes}}", "1\xbd hours"],
        ["1.5 minutes", "90 seconds", "90", "15 hours", "90 hours"],
    ),
    r"\frac{1}{2} \text{ hour}": (
        ["1/2 hour", "30 minutes", "0.5 hours", "1/2", "0.5", "half: 30 min"],
        ["30 hours", "30 seconds", "1/2 minute"],
    ),
    r"12\pi \text{ cm}^3": (
        [
            r"12\pi cubic centimeters",
            r"$12\pi$ cm^3",
            r"\boxed{12\pi}",
            r"\boxed{12\pi\text{ cm}^3}",
            r"The volume is $12\pi\text{ cm}^3$.",
            "12\u03c0 cm\xb3",
            r"12\pi\text{ mL}",
        ],
        [r"\boxed{12\pi\text{ cm}^2}", r"12\pi m^3", r"\boxed{12}", r"12\pi cubic inches"],
    ),
    r"5\sqrt{3} \text{ cm}": (
        [
            r"\boxed{5\sqrt{3}\text{ cm}}",
            r"\boxed{5\sqrt3}",
            r"$5\sqrt{3}$ cm",
            r"\boxed{50\sqrt{3}\text{ mm}}",
            r"The side is $5\sqrt{3}$ centimeters long.",
        ],
        [r"\boxed{5\sqrt{3}\text{ m}}", r"$5\sqrt{3}$ inches", r"\boxed{5\sqrt{2}\text{ cm}}"],
    ),
    "18 inches": (
        [
            "18 in.",
            "18 in",
            "18 inches",
            "18",
            "1.5 feet",
            "18 in total",
            "18 in all.",
            "1/2 yard",
            r"18\text{ in}",
            r"\boxed{18\text{ in.}}",
        ],
        ["18 cm", "18 feet", "1.5 inches", "18 ft", "18 yards"],
    ),
    "2 pounds": (["2 pounds", "2 lbs", "2 lb.", "32 ounces", "32 oz", "2", "\xa32"], ["2 ounces", "2 kg", "32 pounds", "$2"]),
    "8 ounces": (["8 oz", "8 ounces", "8 fluid ounces", "1 cup", "0.5 pounds", "8 fl. oz."], ["8 pounds", "8 grams", "8 cups"]),
    "2 tons": (["2 tons", "4000 pounds", "2000 kg", "2 tonnes", "2"], ["2 pounds", "2 kg", "4000 kg"]),
    "1 year": (["12 months", "1 year", "365 days", "1"], ["1 month", "12 years", "1 day"]),
    "2 weeks": (["14 days", "2 weeks", "2"], ["2 days", "2 months", "14 weeks"]),
    "3 gallons": (["12 quarts", "3 gal", "3 gallons of milk", "24 pints", "3"], ["3 quarts", "3 liters", "12 gallons"]),
    "2 liters": (["2000 mL", "2 L", "2 litres", "2000 ml", "2000 cm^3", "2"], ["2 mL", "2 gallons", "2000 L"]),
    "24 square feet": (
        ["24 sq ft", "24 ft^2", "24 ft\xb2", "24 square feet", "24 sq. ft.", "24 feet squared", "24 square feet in area"],
        ["24 feet", "24 square inches", "24 ft^3", "24 cubic feet", "24 sq yards"],
    ),
    "5 apples": (["5 apples", "5 oranges", "5 m", "5", "5 pieces"], ["6 apples"]),
    "3 m": (["3 m of rope", "3 meters long", "300 cm", "3 m", "3", "3m", "3 metres"], ["3 mm", "3 miles", "3 cm"]),
    "7 days": (["7 days", "1 week", "7", "168 hours", "7 days in a row", "7-day"], ["7 weeks", "7 hours"]),
    "6 m": (
        [r"$\boxed{6\text{ m}}$ and again $\boxed{6\text{ m}}$", "We get m \\boxed{6}", "6\nA man"],
        [
            r"$\boxed{5\text{ m}}$ or $\boxed{6\text{ m}}$",
            r"$\boxed{5\text{ m}}$ or $\boxed{600\text{ cm}}$",
            r"It is at least \boxed{6\text{ m}}.",
            r"\boxed{\text{more than }6\text{ m}}",
            r"\boxed{6^2\text{ m}}",
            r"\boxed{5\text{ m or }6\text{ m}}",
        ],
    ),
    "2 cm": (
        ["The side is 2 cm, so it is half of the other.", "20 mm", "s = 2 cm", "2 centimeters (the side of the square)"],
        ["2 mm", "2 inches"],
    ),
    "5m+3s": (["5m+3s"], ["5s+3m", "8"]),
    "12s^2": ([r"\boxed{12s^2}", "12s^2"], [r"\boxed{12}", "12", "12s"]),
    "2h": (["2h", r"\boxed{2h}"], [r"\boxed{h/2}"]),
    r"\frac{m}{2}": ([r"\boxed{\frac m2}"], [r"\boxed{2m}", "1/2"]),
    "6 hours": (["6 hours per week", "6 hours a day", "6 hours each", "360 minutes per week"], ["6 minutes per week"]),
    "5 hours": (["300 min"], ["5 days", "5 min", "5 minutes"]),
    "100 cm": (["1 m", "1 meter", "1000 mm", r"\boxed{1\text{ m}}", "3.2808399 ft"], ["100 m", "100 mm"]),
    r"36 \text{ in}^2": (["1/4 ft^2"], ["36 inches", "36 in", "36 square feet", r"\boxed{36\text{ in}}", "36 cubic inches"]),
    "6 feet": (["72 inches", "2 yards"], ["6 inches", "6 yards", "6 m"]),
    "4 weeks": (["28 days"], ["4 months", "4 days"]),
    r"\frac{5}{6} \text{ hours}": (["50 minutes", r"\boxed{50\text{ minutes}}", "3000 seconds"], ["5/6 minutes"]),
    "18": (
        [
            "18 m",
            "18 cm^2",
            "$18",
            "18%",
            "18 hours",
            "18 minutes",
            "18 in all",
            "18 m of rope",
            "18 g",
            "18 s",
            "18 apples",
            "18\xb0",
            "18 mph",
            "18 per day",
            "18 dollars a day",
            "18 ft by noon",
            r"So the answer is $\boxed{18\text{ m}^2}$.",
            r"So the answer is $\boxed{18\text{ in}^2}$.",
            r"So the answer is $\boxed{\$18}$.",
            r"So the answer is $\boxed{18^\circ}$.",
            "He drove over 6 bridges in 18 minutes.",
        ],
        ["18 million", "18 thousand", "1.8 m"],
    ),
}


@pytest.mark.parametrize(("answer", "right", "wrong"), [(answer, *texts) for answer, texts in UNITS.items()])
def test_units(answer, right, wrong):
    prompt = Prompt(text="?", answer=answer)
    scores = MathMatch()([*right, *wrong], [prompt] * (len(right) + len(wrong)))
    wanted = [1.0] * len(right) + [0.0] * len(wrong)
    assert [(text, score) for text, score, value in zip([*right, *wrong], scores, wanted, strict=True) if score != value] == []


@pytest.mark.parametrize(
    "part", ["}", "$5 ", "x^2^", "18 m ", r"\text{a", r"\boxed{5 m", "5 dollars a ", "is at least 5 ", "18 (", "5 or more "]
)
def test_units_and_phrases_without_end_cost_no_time(part, caplog):
    assert MathMatch(cpu_seconds=1.0)([part * 3_000], [Prompt(text="?", answer="17 hours")]) == [0.0]
    assert not caplog.text


# Units in brackets, as ASDiv's answers have them.
IN_BRACKETS = {
    "9 (apples)": (
        [
            "9",
            "9 apples",
            "9 (apples)",
            "She has 9 (red apples) left.",
            r"\boxed{9 (apples)}",
            r"\boxed{9 \text{ (apples)}}",
            "9 (pears)",
        ],
        ["8 (apples)", r"\boxed{8 (apples)}", "9 (3)", "19 (apples)"],
    ),
    "9(apples)": (["9"], ["8"]),
    "1,234 (people)": (["1234", "1,234 (people)"], ["234"]),
    "1/2 (cake)": (["0.5", "1/2 (of the cake)"], ["1", "2"]),
    "50% (of them)": (["50%", "50"], ["5"]),
    "9 (cents)": (["9", "9 cents", r"\boxed{0.09 (dollars)}"], ["9 (dollars)", "9 dollars"]),
    "12 (cm^2)": (["12", "12 square centimeters", "1200 (mm^2)"], ["12 (cm)", "12 m^2"]),
    "20 (km per hour)": (["20 km/h", "20 (km/h)"], ["20 (m/s)"]),
    "7 (hours) 30 (minutes)": (["450 minutes", "7.5 hours", "7 (hours) 30 (minutes)"], ["30", "7"]),
    "3 (million)": (["3,000,000", "3 million"], ["3"]),
    "2(x+1)": (["2(x+1)", "2x+2"], ["2"]),
    "2(ab)": (["$2(ab)$"], ["2"]),
    "2 (x)": (["2x"], ["2"]),
    "f(x)": (["f(x)"], ["1"]),
    "(1, 2)": (["(1, 2)"], ["1", "2"]),
}


@pytest.mark.parametrize(("answer", "right", "wrong"), [(answer, *texts) for answer, texts in IN_BRACKETS.items()])
def test_units_in_brackets(answer, right, wrong):
    prompt = Prompt(text="?", answer=answer)
    scores = MathMatch()([*right, *wrong], [prompt] * (len(right) + len(wrong)))
    wanted = [1.0] * len(right) + [0.0] * len(wrong)
    assert [(text, score) for text, score, value in zip([*right, *wrong], scores, wanted, strict=True) if score != value] == []


@pytest.mark.parametrize(
    "answer",
    [
        "3 (mod 5)",
        "3 (mod p)",
        "10 (base 2)",
        "10 (base two)",
        "12 (9 eggs)",
        "3 (R 2)",
        "3 (or 4)",
        "3 (about)",
        "2 (sin x)",
        "15 (goldfish); 12 (platies)",
        "3x (apples)",
        "2^5 (apples)",
    ],
)
def test_what_is_more_than_a_number_is_refused_with_a_remedy(answer):
    with pytest.raises(RewardError, match=r"answer_pattern='.*' for the number that it begins with, or use ExactMatch") as caught:
        MathMatch().check_prompt(Prompt(text="?", answer=answer))
    pattern = re.search(r"answer_pattern='(.*?)' for", str(caught.value))[1]
    assert re.match(pattern, answer)[1] == re.match(r"\d+", answer)[0]
