"""Units of answers: find the unit, such as cm^2 in 15 cm^2, and convert between units of the same dimension.

    conversion_factors   by which factors an answer may have to be multiplied to have the unit of the reference answer
    find_unit            the unit of a text's answer
    without_unit         a quantity without its unit
    in_one_unit          quantities in several units: 1 hour and 30 minutes are 90 minutes, or 1.5 hours

The units are in a table of this file, because sympy.physics.units and pint make the start of the worker half as long again or
more, and read neither LaTeX nor "square centimeters". A word that is not in the table, such as apples, is not a unit here. The
first three functions expect texts that `plain_units` of `math_text.py` has rewritten.

`math_worker.py` imports this file as a script, outside of the package: it must not import anything else of this project.
"""

import re
from dataclasses import dataclass
from math import isclose, pi

Kind = tuple[tuple[str, int], ...]  # a dimension, as powers of base dimensions: a speed is (("length", 1), ("time", -1))
# What a word may mean: dimension -> factors to its base unit. An ounce has two dimensions, and a ton has two factors.
Readings = dict[Kind, set[float]]
PREFIXES = {
    "k": ("kilo", 1e3),
    "M": ("mega", 1e6),
    "d": ("deci", 1e-1),
    "c": ("centi", 1e-2),
    "m": ("milli", 1e-3),
    "u": ("micro", 1e-6),
    "\u00b5": ("micro", 1e-6),
    "\u03bc": ("micro", 1e-6),
    "n": ("nano", 1e-9),
}
# Dimension and its power, factor to the base unit, symbols (case-sensitive), words (case-insensitive, also with an s), prefixes.
TABLE: list[tuple[str, float, str, str, str]] = [
    ("length", 1.0, "m", "meter metre", "kdcmu\u00b5\u03bcn"),
    ("length", 0.0254, "in", "inch inches", ""),
    ("length", 0.3048, "", "ft foot feet", ""),
    ("length", 0.9144, "", "yd yard", ""),
    ("length", 1609.344, "mi", "mile", ""),
    ("length 2", 1e4, "ha", "hectare", ""),
    ("length 2", 4046.8564224, "", "acre", ""),
    ("length 3", 1e-3, "L l", "liter litre", "m"),
    ("length 3", 1e-6, "cc", "", ""),
    ("length 3", 3.785411784e-3, "", "gal gallon", ""),
    ("length 3", 3.785411784e-3 / 4, "qt", "quart", ""),
    ("length 3", 3.785411784e-3 / 8, "pt", "pint", ""),
    ("length 3", 3.785411784e-3 / 16, "", "cup", ""),
    ("length 3", 3.785411784e-3 / 128, "oz", "ounce floz", ""),
    ("length 3", 3.785411784e-3 / 256, "", "tbsp tablespoon", ""),
    ("length 3", 3.785411784e-3 / 768, "", "tsp teaspoon", ""),
    ("mass", 1e-3, "g", "gram gramme", "kmu\u00b5\u03bc"),
    ("mass", 1.0, "", "kilo", ""),
    ("mass", 0.45359237, "", "lb pound", ""),
    ("mass", 0.45359237 / 16, "oz", "ounce", ""),
    ("mass", 0.45359237 * 2000, "", "ton", ""),
    ("mass", 1e3, "", "ton tonne", ""),
    ("time", 1.0, "s", "sec second", "mu\u00b5\u03bcn"),
    ("time", 60.0, "", "min minute", ""),
    ("time", 3600.0, "h", "hr hour", ""),
    ("time", 86400.0, "", "day", ""),
    ("time", 604800.0, "", "wk week", ""),
    ("time", 365 * 86400.0, "", "yr year", ""),
    ("month", 12.0, "", "yr year", ""),  # a dimension of its own, since months differ in days
    ("month", 1.0, "", "month", ""),
    ("dollar", 1.0, "$", "dollar usd buck", ""),
    ("dollar", 0.01, "\u00a2", "cent", ""),
    ("euro", 1.0, "\u20ac", "euro eur", ""),
    ("euro", 0.01, "", "cent", ""),
    ("sterling", 1.0, "\u00a3", "pound gbp", ""),
    ("yen", 1.0, "\u00a5", "yen jpy", ""),
    ("percent", 1.0, "%", "percent percentage", ""),
    ("angle", 1.0, "\u00b0", "deg degree", ""),
    ("angle", 180 / pi, "rad", "radian", ""),
    ("celsius", 1.0, "\u00b0 C", "degree celsius", ""),
    ("fahrenheit", 1.0, "\u00b0 F", "degree fahrenheit", ""),
    ("kelvin", 1.0, "K", "kelvin", ""),
    ("ampere", 1.0, "", "amp ampere", ""),  # without the symbol A, with which sentences begin
    ("mole", 1.0, "mol", "mole", ""),
    ("time -1", 1.0, "Hz", "hertz", "kM"),
    ("length 1 mass 1 time -2", 1.0, "N", "newton", "k"),
    ("length -1 mass 1 time -2", 1.0, "Pa", "pascal", "k"),
    ("length 2 mass 1 time -2", 1.0, "J", "joule", "kM"),
    ("length 2 mass 1 time -2", 3.6e6, "", "kwh", ""),
    ("length 2 mass 1 time -3", 1.0, "W", "watt", "kM"),
    ("ampere -1 length 2 mass 1 time -3", 1.0, "V", "volt", ""),
]
MONEY = {"dollar", "euro", "sterling", "yen"}


def _names_of_units() -> tuple[dict[str, Readings], dict[str, Readings]]:
    """The table as two dictionaries, of symbols and of words, with all prefixes."""
    symbols: dict[str, Readings] = {}
    words: dict[str, Readings] = {}
    for dimension, factor, cased, caseless, prefixes in TABLE:
        parts = [*dimension.split(), "1"]
        kind = tuple((parts[i], int(parts[i + 1])) for i in range(0, len(parts) - 1, 2))
        for short, (long, scale) in [("", ("", 1.0)), *((prefix, PREFIXES[prefix]) for prefix in prefixes)]:
            for symbol in cased.split():
                symbols.setdefault(short + symbol, {}).setdefault(kind, set()).add(factor * scale)
                if short in tuple("kcdm"):  # people write KM and Kg
                    words.setdefault((short + symbol).lower(), {}).setdefault(kind, set()).add(factor * scale)
            for word in caseless.split():
                for name in (long + word, long + word + "s"):
                    words.setdefault(name, {}).setdefault(kind, set()).add(factor * scale)
    return symbols, words


SYMBOLS, WORDS = _names_of_units()
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")
QUANTITY = re.compile(  # a number, or the end of a formula, with a currency sign before it if there is one
    r"(?P<money>(?:\\?\$|[\u20ac\u00a3\u00a5])\s*)?-?(?:(?:\d[\d,]*)?\.?\d+|(?<=[})])|(?<=\\pi))"
    r"(?:\s*(?:thousand|million|billion|trillion)\b)?(?![\d{])"
)
FACTOR = re.compile(
    r"(?:(?P<before>square|sq|cubic|cu)\b\.?)?\s*(?P<name>[A-Za-z\u00b5\u03bc]+|[\u00b0%\u20ac\u00a3\u00a5\u00a2]|\\\$)"
    r"(?:\.(?=\s?[\^\u00b2\u00b3]))?(?:\s*(?P<power>\^\s*\{?\s*-?\d\s*\}?|\u00b2|\u00b3|squared\b|cubed\b))?",
    re.IGNORECASE,
)
PER = re.compile(r" */ *| +(?:per|an?|each|every) +")
STRICT = re.compile(r" */ *(?![a-z]{3})")  # m/s must not be shortened to m, but dollars/hour may be to dollars
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3, "\u00b2": 2, "\u00b3": 3}


@dataclass(frozen=True)
class Unit:
    """A unit, or a rate of two units.

    Args:
        above: What the unit, or the numerator of a rate, may mean: "ounces" is a mass and a volume.
        below: The denominator of a rate, such as the hour in "dollars per hour"; None if it is not a rate.
        loose: Whether an answer may leave out the denominator: 5 dollars for "He earns 5 dollars per hour".
    """

    above: Readings
    below: Readings | None = None
    loose: bool = False


def conversion_factors(gold: str, text: str) -> set[float]:
    """Factors that may convert the number in a text to the unit of the reference answer.

    Args:
        gold: The reference answer.
        text: The text whose answer is compared with it.

    Returns:
        The possible factors, {1.0} if one of the two has no unit; empty if the units cannot be converted.

    Example:
        >>> [conversion_factors("15 m", text) for text in ("15 cm", "15 square feet", "15 apples")]
        [{0.01}, set(), {1.0}]
    """
    wanted, found = find_unit(gold), find_unit(text)
    if wanted is None or found is None:
        return {1.0}
    if (wanted.below is None) != (found.below is None) and (wanted if found.below is None else found).loose:
        wanted, found = Unit(wanted.above), Unit(found.above)
    one, other = (each.above if each.below is None else _product(each.above, each.below, -1) for each in (wanted, found))
    ratios = {own / base for kind in one.keys() & other.keys() for base in one[kind] for own in other[kind]}
    return {1.0} if any(isclose(ratio, 1.0) for ratio in ratios) else ratios


def find_unit(text: str) -> Unit | None:
    """The unit of a text's answer, in or after its last box, or after its last number; None if there is no known unit."""
    boxes = list(BOXED.finditer(text))
    if not boxes:
        return _last_unit(text)[0]
    box = boxes[-1]
    if inside := _last_unit(box[1])[0]:
        return inside
    before = text[: box.start()].rstrip()
    money = before[-1:] if before.endswith((r"\$", "\u20ac", "\u00a3", "\u00a5")) else ""
    return _unit_at(re.sub(r"\A(?:[ $]|\\[)\]])+", " ", text[box.end() :]), 0, money)[0]


def is_unit(words: str) -> bool:
    """Whether words are exactly a unit of the table, or a rate of two.

    Example:
        >>> is_unit("square feet"), is_unit("km/h"), is_unit("apples"), is_unit("feet of rope")
        (True, True, False, False)
    """
    text = f"1 {words}"
    found, _, end = _last_unit(text)
    return found is not None and not text[end:].strip(" .")


def without_unit(text: str) -> str | None:
    r"""Remove the unit from a text that is only a quantity, or whose only box is one; None if that does not apply.

    Example:
        >>> without_unit("5 km/h"), without_unit(r"It is \boxed{5m^2}."), without_unit("5 km from here")
        ('5', '\\boxed{5}', None)
    """
    boxes = BOXED.findall(text)
    whole = boxes[-1] if boxes else text
    found, start, end = _last_unit(whole)
    if len(boxes) > 1 or found is None or start == end or whole[end:].strip(" .$") or (("percent", 1),) in found.above:
        return None
    number = whole[:start].strip(" $")
    if boxes:
        return rf"\boxed{{{number}}}"
    formula = re.match(r"[A-Za-z](?![A-Za-z])", whole[start:])  # 12s^2 may well be one
    return number if not formula and re.fullmatch(r"(?:\\[a-z]+|\d[eE](?=[-\d])|[^A-Za-z])+", number) else None


def unit_ratio(large: str, small: str) -> float | None:
    """How many small units make one large unit; None unless that is exactly one number, and a whole one above 1.

    Example:
        >>> unit_ratio("hour", "minutes"), unit_ratio("minute", "hours"), unit_ratio("hour", "feet")
        (60.0, None, None)
    """
    one, other = (SYMBOLS.get(name) or WORDS.get(name.casefold()) or {} for name in (large, small))
    found = {round(a / b, 9) for kind in one.keys() & other.keys() for a in one[kind] for b in other[kind]}
    return number if len(found) == 1 and (number := found.pop()) > 1 and number.is_integer() else None


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
    above: Readings | None = SYMBOLS.get(money)
    if not money:
        gap = re.compile(r"(?:[ \u00b7$]|\\\))*-?").match(text, at)
        above, at = _unit_with_power(text, gap.end() if gap else at)
        while above is not None and (product := re.compile(r" *\u00b7 *| +(?=[A-Za-z]+ *\^ *\{? *-)").match(text, at)):
            factor, end = _unit_with_power(text, product.end())
            if factor is None:
                return None, at
            above, at = _product(above, factor, 1), end
    if above is None:
        return None, at
    following = re.compile(r"\s+([A-Za-z])(?![\w'])").match(text, at)
    if following and following[1] in SYMBOLS:
        return None, at  # "5 N m"
    below: Readings | None = None
    loose = any(name in MONEY for kind in above for name, _ in kind)
    while per := PER.match(text, at):
        factor, end = _unit_with_power(text, per.end())
        if factor is None:
            break
        loose = loose or not STRICT.match(text, at)
        below, at = factor if below is None else _product(below, factor, 1), end
    return Unit(above, below, loose), at


def _unit_with_power(text: str, at: int) -> tuple[Readings | None, int]:
    """One unit with its power, such as "square feet" or cm^{2}."""
    match = FACTOR.match(text, at)
    if not match:
        return None, at
    name = match["name"].removeprefix("\\")
    readings = SYMBOLS.get(name) or WORDS.get(name.casefold())
    if readings is None or (name == "in" and not match["power"] and re.match(r"\.?\s*[^\W\d_]", text[match.end() :])):
        return None, at  # the "in" of "18 in all" is not an inch
    given = match["power"] or match["before"] or "1"
    power = POWERS.get(given.casefold().strip(".")) or int(re.sub(r"[\^{}\s]", "", given))
    return _product({(): {1.0}}, readings, power), match.end()


def _product(one: Readings, other: Readings, power: int) -> Readings:
    """The product of a unit and a power of another unit."""
    product: Readings = {}
    for kind, factors in one.items():
        for more, scales in other.items():
            powers = dict(kind)
            for name, exponent in more:
                powers[name] = powers.get(name, 0) + exponent * power
            key = tuple(sorted((name, exponent) for name, exponent in powers.items() if exponent))
            product.setdefault(key, set()).update(factor * scale**power for factor in factors for scale in scales)
    return product


GAP = r"[\s~]*(?:\\[ ,;])?[\s~]*"
UNIT = GAP + r"-?(?:\\(?:text|mathrm|mbox)\s*\{)?[\s~]*(?P<unit>[A-Za-z]+)"
FIRST = re.compile(r"(?<![\w.,/^-])(?<!\^\{)(?P<number>\d[\d,]*)" + UNIT)
NEXT = re.compile(
    r"\.?[\s~]*\}?,?" + GAP + r"(?:\\text\s*\{\s*)?(?:and\b|&)?[\s~]*\}?" + GAP + r"(?P<number>\d+(?:\.\d+)?)" + UNIT
)


def in_one_unit(text: str) -> tuple[str, str]:
    r"""Write each quantity in several units as one number: once in the smallest of its units, and once in the largest.

    A part that is as large as the unit before it, as in "1 hour, 60 minutes", is an answer of its own and stays unchanged.

    Args:
        text: A text with or without LaTeX.

    Returns:
        The text with the smallest units, and the text with the largest.

    Example:
        >>> in_one_unit("It takes 1 hour, 30 minutes and 36 seconds.")
        ('It takes 5436 seconds.', 'It takes 1.51 hour.')
    """
    small, large, written = "", "", 0
    for first in FIRST.finditer(text):
        if first.start() < written:
            continue
        total, product, last = float(first["number"].replace(",", "")), 1.0, first
        while following := NEXT.match(text, last.end()):
            parts = unit_ratio(last["unit"], following["unit"])
            if parts is None or float(following["number"]) >= parts:
                break
            total, product, last = total * parts + float(following["number"]), product * parts, following
        if last is not first:
            before = text[written : first.start()]
            small += before + _in_digits(total) + text[last.end("number") : last.end()]
            large += before + _in_digits(total / product) + text[first.end("number") : first.end()]
            written = last.end()
    return small + text[written:], large + text[written:]


def _in_digits(number: float) -> str:
    return f"{number:.9f}".rstrip("0").rstrip(".")
