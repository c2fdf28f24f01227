"""Rates, money, angles and the units of physics, which agree or are converted as lengths and times in `test_math_units.py`."""

import pytest

from hybrid_lightning.rewards import MathMatch
from hybrid_lightning.types import Prompt

# reference answer -> (completions that are right, completions that are not)
RATES = {
    r"40 \text{ dollars}": (
        [
            "$40",
            "40 dollars",
            "$40.00",
            "4000 cents",
            "40 bucks",
            "40 USD",
            "US$40",
            r"\$40",
            r"So the answer is $\boxed{\$40}$.",
            r"So the answer is $\boxed{40}$.",
            r"So the answer is $\boxed{40\text{ dollars}}$.",
            "$40 in total",
            "$40 per hour",
            "He makes $40 a day.",
        ],
        ["40 cents", "$4", "$400", "\u20ac40", "40 euros", "40\xa2", r"So the answer is $\boxed{40\text{ cents}}$.", "\xa340"],
    ),
    "$18": (
        ["$18", "18 dollars", "18", "1800 cents", "$18 per ticket", "18.00", "She makes $18 every day at the farmers' market."],
        ["18 cents", "18\xa2", "-$18", "$18.5", "18 euros"],
    ),
    r"40 \text{ cents}": (
        ["40 cents", "$0.40", "$.40", "0.40 dollars", "40", "40\xa2", "The difference is 40 cents."],
        ["$40", "40 dollars", "4 cents", "$0.04", "0.40"],
    ),
    r"90^\circ": (
        [
            "90",
            "90 degrees",
            "90\xb0",
            r"90^{\circ}",
            r"It is $90^\circ$.",
            r"So the answer is $\boxed{90^\circ}$.",
            r"So the answer is $\boxed{90}$.",
            r"So the answer is $\boxed{90\text{ degrees}}$.",
            r"So the answer is $\boxed{\frac{\pi}{2}\text{ radians}}$.",
            "90\xb0F",
            "90 degrees Celsius",
        ],
        ["90 radians", "9\xb0", "180\xb0", r"\boxed{90\text{ radians}}", "90 cm"],
    ),
    r"10\%": (["10%", "10 percent", "10 per cent", "0.1", "10", r"\boxed{10\%}"], ["1%", "10 dollars", "$10", "10 cm", "100%"]),
    "60 miles per hour": (
        [
            "60 mph",
            "60 miles per hour",
            "60",
            "60 miles an hour",
            "60 miles/hour",
            "60 mi/h",
            "60 miles",
            "1 mile per minute",
            "60 MPH",
        ],
        ["60 km/h", "60 miles per minute", "60 kph", "6 mph", "60 m/s", "60 feet per second"],
    ),
    r"5 \text{ m/s}": (
        [
            "5 m/s",
            "5",
            "18 km/h",
            "5 meters per second",
            r"\boxed{5\ \frac{\text{m}}{\text{s}}}",
            r"\boxed{5\,\mathrm{m\,s^{-1}}}",
            "5 m s^{-1}",
        ],
        ["5 km/h", "5 m/s^2", "5 cm/s", "5 m", "5 s", r"\boxed{5\text{ km/h}}"],
    ),
    r"9.8 \text{ m/s}^2": (
        ["9.8 m/s^2", "9.8 m/s\xb2", r"\boxed{9.8\text{ m/s}^2}", "9.8", "9.8 meters per second squared", "980 cm/s^2"],
        ["9.8 m/s", "9.8 km/s^2", "98 m/s^2"],
    ),
    "98.6 degrees Fahrenheit": (
        ["98.6\xb0F", "98.6", "98.6 degrees", r"98.6^\circ F", r"$98.6^\circ\text{F}$"],
        ["98.6\xb0C", "98.6 degrees Celsius"],
    ),
    "100 N": (["100 N", "100 newtons", "0.1 kN", r"100 \text{ kg}\cdot\text{m/s}^2", "100"], ["100 kN", "100 J", "100 kg"]),
    "$2.5 million": (
        ["$2.5 million", "2.5 million dollars", "$2,500,000", "2500000"],
        ["2.5 million euros", "$2.5 billion", "$2.5"],
    ),
    r"3.0\times10^8 \text{ m/s}": (
        [r"\boxed{3\times10^8\text{ m/s}}", "3e8 m/s", "300000 km/s", "3e8"],
        [r"\boxed{3\times10^8\text{ km/s}}", "3e7 m/s", "3e8 m"],
    ),
    "20 minutes": (
        [r"\frac13 hour", "1/3 hour", "20 min", "1200 s", "20", "He needs 20 more minutes."],
        ["20 hours", "1/3 minute", "1/3"],
    ),
    "$5 per hour": (["$5/hour", "$5 an hour", "$5", "5 dollars per hour", "5"], ["$5 per day", "$5 a week", "5 cents per hour"]),
    r"\$12": (["12 dollars (3 at $4)"], ["12%", "12 cents", "12 euros", "\u20ac12", r"\boxed{12\text{ cents}}"]),
    "30 minutes": (["0.5 hours", "1/2 hour", "1800 sec"], ["30 hours", "30 s", "30 degrees"]),
    "1 mile": (["5280 feet", "1760 yards", "1.609344 km"], ["1 km"]),
    r"45^\circ": (
        [r"\frac{\pi}{4} radians", r"$\frac{\pi}{4}$ rad", "\\boxed{45\xb0}", r"\boxed{45\degree}"],
        ["45 rad", "45%", r"\boxed{45\text{ radians}}", "45 minutes"],
    ),
    r"25\%": ([], ["25 cents", "$25", "25 degrees"]),
    "50 mph": ([], ["50 kmh", "50 km/h", "50 miles per minute", "50 feet per hour"]),
    "15 dollars per hour": (["0.25 dollars per minute"], ["$15 per day", "15 cents per hour", "$15/min"]),
    r"1.2\times10^{-3} \text{ kg}": (["1.2 g", "1200 mg", "1.2 grams"], ["1.2e-3 g", "0.0012 g"]),
    "4.2 J": (["0.0042 kJ"], ["4.2 W", "4.2 kJ", "4.2 N"]),
    r"10 \text{ Hz}": (["10 s^{-1}"], ["10 kHz", "10 s"]),
    r"300 \text{ K}": ([], ["300 C", "300\xb0C", "300\xb0F"]),
    r"2\pi \text{ rad/s}": ([r"2\pi rad/s"], []),
    "2 m/s": (["2 m/s", "2 meters per second", "2 meters a second", "7.2 km/h", "200 cm/s", "120 m/min", "2"], []),
    "8 g/cm^3": (
        [
            "8 g/cm^3",
            "8 g/cm\xb3",
            "8 grams per cubic centimeter",
            "8000 kg/m^3",
            r"\boxed{8\text{ g/cm}^3}",
            r"\boxed{8\ \frac{\text{g}}{\text{cm}^3}}",
            "8",
        ],
        [],
    ),
    "3 liters per minute": (["180 liters per hour", "0.05 L/s"], ["3 gallons per minute", "3 L/h", "3 mL per minute"]),
    "6000 yen": ([], ["$6000", "6000 cents"]),
    "\xa320": ([], ["$20", "20 cents", "\u20ac20", "20 ounces"]),
    "-5 degrees": ([], ["-5 cm"]),
    "1000000 dollars": ([], ["1 million cents"]),
}


@pytest.mark.parametrize(("answer", "right", "wrong"), [(answer, *texts) for answer, texts in RATES.items()])
def test_rates(answer, right, wrong):
    prompt = Prompt(text="?", answer=answer)
    scores = MathMatch()([*right, *wrong], [prompt] * (len(right) + len(wrong)))
    wanted = [1.0] * len(right) + [0.0] * len(wrong)
    assert [(text, score) for text, score, value in zip([*right, *wrong], scores, wanted, strict=True) if score != value] == []
