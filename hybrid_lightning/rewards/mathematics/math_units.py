"""Units of answers: finds the unit, such as cm^2 in 15 cm^2, and converts between units of the same dimension.

A word that is not in the table, such as apples, is not a unit. sympy.physics.units and pint would lengthen the worker's start by
half or more, and read neither LaTeX nor "square centimeters". The functions expect texts that `plain_units` has rewritten.
Like `math_text.py`, this file must not import anything else of this project.
"""

import re
from collections import defaultdict
from itertools import product
from math import isclose
from typing import NamedTuple

Kind = tuple[tuple[str, int], ...]  # a dimension, as powers of base dimensions: a speed is (("length", 1), ("time", -1))
# Meanings of a word: dimensions with factors to their base units. An ounce has two dimensions, and a ton has two factors.
Readings = set[tuple[Kind, float]]
PREFIXES = "k kilo 1e3, M mega 1e6, d deci 1e-1, c centi 1e-2, m milli 1e-3, u micro 1e-6, \u03bc micro 1e-6, n nano 1e-9"
# A line for each dimension with its powers: names and the factor to the base unit. Signs, and names of one letter or with a
# capital, are symbols, which are case-sensitive; other names are words, which may end in s. Names after + also have prefixes.
# Months differ in days and are a separate dimension; amperes do not have the symbol A, since sentences begin with it.
TABLE = """\
length: +m +meter +metre 1, in inch inches 0.0254, ft foot feet 0.3048, yd yard 0.9144, mi mile 1609.344
length 2: ha hectare 1e4, acre 4046.8564224
length 3: +L +l +liter +litre 1e-3, cc 1e-6, gal gallon 3.785411784e-3, qt quart 9.46352946e-4, pt pint 4.73176473e-4
length 3: cup 2.365882365e-4, oz ounce 2.95735295625e-5, tbsp tablespoon 1.478676478125e-5, tsp teaspoon 4.92892159375e-6
mass: +g +gram +gramme 1e-3, kilo 1, lb pound 0.45359237, oz ounce 0.028349523125, ton 907.18474, ton tonne 1e3
time: +s sec +second 1, min minute 60, h hr hour 3600, day 86400, wk week 604800, yr year 31536000
month: month 1, yr year 12
dollar: $ dollar usd buck 1, \u00a2 cent 0.01
euro: \u20ac euro eur 1, cent 0.01
sterling: \u00a3 pound gbp 1
yen: \u00a5 yen jpy 1
percent: % percent percentage 1
angle: \u00b0 deg degree 1, rad radian 57.29577951308232
celsius: \u00b0 C degree celsius 1
fahrenheit: \u00b0 F degree fahrenheit 1
kelvin: K kelvin 1
ampere: amp ampere 1
mole: mol mole 1
time -1: +Hz +hertz 1
length 1 mass 1 time -2: +N +newton 1
length -1 mass 1 time -2: +Pa +pascal 1
length 2 mass 1 time -2: +J +joule 1, kwh 3.6e6
length 2 mass 1 time -3: +W +watt 1
ampere -1 length 2 mass 1 time -3: +V +volt 1"""


def _names_of_units() -> tuple[dict[str, Readings], dict[str, Readings]]:
    """The table as two dictionaries, of symbols and of words, with all prefixes."""
    symbols, words = defaultdict[str, Readings](set), defaultdict[str, Readings](set)
    prefixes = [["", "", "1"], *map(str.split, PREFIXES.split(", "))]
    for dimension, units in (line.split(": ") for line in TABLE.splitlines()):
        kind = tuple((name, int(power or 1)) for name, power in re.findall(r"([a-z]+)(?: (-?\d))?", dimension))
        for *names, factor in map(str.split, units.split(", ")):
            for short, long, scale in prefixes:
                reading = kind, float(factor) * float(scale)
                for name in (name.removeprefix("+") for name in names if not short or name.startswith("+")):
                    if len(name) > 1 and name.islower():
                        words[long + name].add(reading)
                        words[f"{long}{name}s"].add(reading)
                    else:
                        symbols[short + name].add(reading)
                        if short and short in "kcdm":
                            words[(short + name).lower()].add(reading)  # people write KM and Kg
    return dict(symbols), dict(words)


SYMBOLS, WORDS = _names_of_units()
MONEY = SYMBOLS["$"] | SYMBOLS["\u20ac"] | SYMBOLS["\u00a3"] | SYMBOLS["\u00a5"] | SYMBOLS["\u00a2"]

WRAPPED = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname|rm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
PLAIN: list[tuple[str | re.Pattern[str], str]] = [
    *[(WRAPPED, r" \1")] * 2,
    (r"\\(?:[ ,;:!]|q?quad(?![A-Za-z]))|~", " "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\(?:degree|circ)(?![A-Za-z])", "\u00b0"),
    (r"\\%", "%"),
    (r"(?i)\u00b0\s*(?=[CF]\b)|\bdegrees?\s+(?=(?:[CF]|celsius|fahrenheit)\b)", " "),
    (r"(?i)\bmph\b", "miles/hour"),
    (r"(?i)\bkm?ph\b|\bkmh\b", "km/h"),
    (r"(?i)\b(?:square|sq)\b\.?\s*([a-z]+)|\b([a-z]+)\s+squared\b", r"\1\2^2"),
    (r"(?i)\b(?:cubic|cu)\b\.?\s*([a-z]+)|\b([a-z]+)\s+cubed\b", r"\1\2^3"),
    ("\u00b2", "^2"),
    ("\u00b3", "^3"),
]
ANOTHER = (  # not a remark, but another answer: "(or 13)", "(about 18)", "(= 18)"
    r"\W*(?:or|and|maybe|perhaps|possibly|i\.?\s?e|that\s+is|which|approx\w*|about|around|rounded|roughly|equals)\b|\s*[=\u2248~]"
)
REMARK = re.compile(  # "18 dollars (9 eggs at $2)", as the whole text or after "the answer is": no unit, and not the number again
    r"(?P<stated>(?:\A|\banswer\s*(?:is\b|:))[\s:*_]*[$\u20ac\u00a3]?-?\d[\d,./]*%?(?:\s+[A-Za-z]+){0,3})[*_]*"
    rf"\s+\((?!{ANOTHER})(?=[^()]*[A-Za-z%]|[^()]*\d[^\d()]+\d)[^()]*\)[\s.!*_]*\Z",
    re.IGNORECASE,
)
SHORT = "|".join(sorted(name for name in SYMBOLS.keys() | WORDS.keys() if name.isalpha() and len(name) < 3))
IN_BRACKETS = re.compile(  # 9 (apples), 20 (km/h), 5 (cm^2); but 3 (mod 5) is a different number, and 2 (x) a product
    rf"(?<=[\d%}}])(?:\s*\(\s*(?!(?i:{ANOTHER}|b?mod|modulo|base|(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b|r\b))"
    rf"(?=[^()]*[A-Za-z]{{3}}|[$%\u00b0])|\s+\(\s*(?=(?:{SHORT})[/^\s)]))"
    r"(?P<words>[A-Za-z$%\u00b0][A-Za-z$%\u00b0 ./'-]*(?:\^\{?[23]\}?)?)\s*\)"
)


def plain_units(text: str) -> str:
    r"""Write units without LaTeX: `5\ \text{m/s}` becomes 5 m/s. Only for finding units, since it damages formulas."""
    for pattern, replacement in PLAIN:
        text = re.sub(pattern, replacement, text)
    return text


BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")
QUANTITY = re.compile(  # a number, or the end of a formula, with a currency sign before it if there is one
    r"(?P<money>(?:\\?\$|[\u20ac\u00a3\u00a5])\s*)?-?(?:(?:\d[\d,]*)?\.?\d+|(?<=[})])|(?<=\\pi))"
    r"(?:\s*(?:thousand|million|billion|trillion)\b)?(?![\d{])"
)
FACTOR = re.compile(
    r"(?:[\s\u00b7$]|\\\))*+-?\s*(?P<name>[A-Za-z\u03bc]+|[\u00b0%\u20ac\u00a3\u00a5\u00a2]|\\\$)(?:\s*\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?"
)
PER = re.compile(r" */ *| +(?:per|an?|each|every) +")
STRICT = re.compile(r" */ *(?![a-z]{3})")  # m/s must not be shortened to m, but dollars/hour may be to dollars
PRODUCT = re.compile(r"\s+[CFJKLNVWghlms](?![\w'])|\s*\u00b7")  # another symbol after the first: 5 N m


class Unit(NamedTuple):
    """A unit, or a rate of two units."""

    whole: Readings  # its meanings: "ounces" is a mass and a volume
    above: Readings  # meanings of a rate's numerator; for other units the same object as `whole`
    loose: bool  # whether an answer may leave out the denominator: 5 dollars for "He earns 5 dollars per hour"


def conversion_factors(wanted: Unit | None, found: Unit | None) -> set[float]:
    """Factors that may convert a number to the unit of the reference answer.

    {1.0} if one of the two has no unit, empty if the units cannot be converted.
    """
    if wanted is None or found is None:
        return {1.0}
    one, other = found.whole, wanted.whole
    if (one is found.above) != (other is wanted.above) and (wanted.loose or found.loose):
        one, other = found.above, wanted.above
    ratios = {a / b for (kind, a), (same, b) in product(one, other) if kind == same}  # in each dimension that both may have
    return {1.0} if any(isclose(ratio, 1.0) for ratio in ratios) else ratios


def find_unit(text: str) -> tuple[Unit | None, str | None]:
    """The unit of a text's answer, and the text without it if that is only a quantity or its only box is one.

    The unit is in or after the last box, or after the last number. None without a known unit.
    """
    boxes = list(BOXED.finditer(text))
    whole = boxes[-1][1] if boxes else text
    found, start, end = _last_unit(whole)
    if found is None and boxes:
        money = re.search(r"(?:\\\$|[\u20ac\u00a3\u00a5])?\s*\Z", text[: boxes[-1].start()])
        after = re.sub(r"\A(?:[ $]|\\[)\]])+", " ", text[boxes[-1].end() :])
        return _unit_at(after, 0, money[0].strip()[-1:] if money else "")[0], None
    if found is None or len(boxes) > 1 or start == end or whole[end:].strip(" .$") or found.above == SYMBOLS["%"]:
        return found, None
    number = whole[:start].strip(" $")
    if boxes and "\u00b0" not in number:
        return found, rf"\boxed{{{number}}}"
    formula = re.match(r"[A-Za-z](?![A-Za-z])", whole[start:])  # 12s^2 may well be a formula
    is_number = not formula and re.fullmatch(r"(?:\\[a-z]+|\d[eE](?=[-\d])|[^A-Za-z\u00b0])+", number)
    return found, number if is_number else None


def _last_unit(text: str) -> tuple[Unit | None, int, int]:
    """The unit after the last number or formula, and where it begins and ends in the text."""
    for match in reversed(list(QUANTITY.finditer(text))):
        money = (match["money"] or "").strip()
        if money == "$" and "$" in text[match.end() :]:
            money = ""  # the dollar sign begins a formula
        found, end = _unit_at(text, match.end(), money.removeprefix("\\"))
        if found is not None:
            return (None if re.search(r"\d", text[end:]) else found), match.end(), end
        if re.search(r"\d", match[0]) and not re.search(r"\^\s*\{?\s*-?\Z", text[max(0, match.start() - 5) : match.start()]):
            break  # the last number has no unit
    return None, 0, 0


def _unit_at(text: str, at: int, money: str) -> tuple[Unit | None, int]:
    """The unit at a position in a text, and where it ends. `money` is the currency sign before the number, or empty."""
    above, at = (SYMBOLS[money], at) if money else _factor(text, at)
    if not above or PRODUCT.match(text, at):
        return None, at
    whole, loose = above, bool(above & MONEY)
    while (per := PER.match(text, at)) and (below := _factor(text, per.end()))[0]:
        loose = loose or not STRICT.match(text, at)
        whole, at = _times(whole, below[0], -1), below[1]
    return Unit(whole, above, loose), at


def _factor(text: str, at: int) -> tuple[Readings, int]:
    """The meanings of a unit with its power, such as cm^{2}, and where it ends; empty if it is not a unit."""
    match = FACTOR.match(text, at)
    name = match["name"].removeprefix("\\") if match else ""
    readings = SYMBOLS.get(name) or WORDS.get(name.casefold())
    if not match or not readings:
        return set(), at
    if name.casefold() == "in" and not match["power"] and re.match(r"\.?\s*[^\W\d_]", text[match.end() :]):
        return set(), at  # the "in" of "18 in all" is not an inch
    return _times({((), 1.0)}, readings, int(match["power"] or 1)), match.end()


def _times(one: Readings, other: Readings, power: int) -> Readings:
    """The product of a unit and a power of another unit."""
    result: Readings = set()
    for (kind, factor), (more, scale) in product(one, other):
        powers = dict(kind)
        for name, exponent in more:
            powers[name] = powers.get(name, 0) + exponent * power
        result.add((tuple(sorted((name, n) for name, n in powers.items() if n)), factor * scale**power))
    return result
