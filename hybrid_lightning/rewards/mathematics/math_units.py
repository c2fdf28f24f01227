"""Units of answers: find the unit, such as cm^2 in 15 cm^2, and convert between units of the same dimension.

The units are in a table here, because sympy.physics.units and pint make the start of the worker half as long again or more, and
read neither LaTeX nor "square centimeters". A word that is not in the table, such as apples, is not a unit. Texts are those that
`plain_units` has rewritten. Like `math_text.py`, this file must not import anything else of this project.
"""

import re
from dataclasses import dataclass
from math import isclose, pi

Kind = tuple[tuple[str, int], ...]  # a dimension, as powers of base dimensions: a speed is (("length", 1), ("time", -1))
# What a word may mean: dimension -> factors to its base unit. An ounce has two dimensions, and a ton has two factors.
Readings = dict[Kind, set[float]]
PREFIXES = {
    **{"k": ("kilo", 1e3), "M": ("mega", 1e6), "d": ("deci", 1e-1), "c": ("centi", 1e-2), "m": ("milli", 1e-3)},
    **{"u": ("micro", 1e-6), "\u03bc": ("micro", 1e-6), "n": ("nano", 1e-9)},
}
GALLON, POUND = 3.785411784e-3, 0.45359237
# Dimension with its powers -> names -> factor to the base unit. Signs, and names of one letter or with a capital, are symbols,
# whose case counts; other names are words, which may end in s. Names after + also have prefixes.
TABLE: dict[str, dict[str, float]] = {
    "length": {"+m +meter +metre": 1, "in inch inches": 0.0254, "ft foot feet": 0.3048, "yd yard": 0.9144, "mi mile": 1609.344},
    "length 2": {"ha hectare": 1e4, "acre": 4046.8564224},
    "length 3": {
        "+L +l +liter +litre": 1e-3,
        "cc": 1e-6,
        "gal gallon": GALLON,
        "qt quart": GALLON / 4,
        "pt pint": GALLON / 8,
        "cup": GALLON / 16,
        "oz ounce": GALLON / 128,
        "tbsp tablespoon": GALLON / 256,
        "tsp teaspoon": GALLON / 768,
    },
    "mass": {"+g +gram +gramme": 1e-3, "kilo": 1, "lb pound": POUND, "oz ounce": POUND / 16, "ton": 907.18474, "ton tonne": 1e3},
    "time": {"+s sec +second": 1, "min minute": 60, "h hr hour": 3600, "day": 86400, "wk week": 604800, "yr year": 365 * 86400},
    "month": {"month": 1, "yr year": 12},  # a dimension of its own, since months differ in days
    "dollar": {"$ dollar usd buck": 1, "\u00a2 cent": 0.01},
    "euro": {"\u20ac euro eur": 1, "cent": 0.01},
    "sterling": {"\u00a3 pound gbp": 1},
    "yen": {"\u00a5 yen jpy": 1},
    "percent": {"% percent percentage": 1},
    "angle": {"\u00b0 deg degree": 1, "rad radian": 180 / pi},
    "celsius": {"\u00b0 C degree celsius": 1},
    "fahrenheit": {"\u00b0 F degree fahrenheit": 1},
    "kelvin": {"K kelvin": 1},
    "ampere": {"amp ampere": 1},  # without the symbol A, with which sentences begin
    "mole": {"mol mole": 1},
    "time -1": {"+Hz +hertz": 1},
    "length 1 mass 1 time -2": {"+N +newton": 1},
    "length -1 mass 1 time -2": {"+Pa +pascal": 1},
    "length 2 mass 1 time -2": {"+J +joule": 1, "kwh": 3.6e6},
    "length 2 mass 1 time -3": {"+W +watt": 1},
    "ampere -1 length 2 mass 1 time -3": {"+V +volt": 1},
}
MONEY = {"dollar", "euro", "sterling", "yen"}


def _names_of_units() -> tuple[dict[str, Readings], dict[str, Readings]]:
    """The table as two dictionaries, of symbols and of words, with all prefixes."""
    symbols: dict[str, Readings] = {}
    words: dict[str, Readings] = {}
    for dimension, units in TABLE.items():
        parts = [*dimension.split(), "1"]
        kind = tuple((parts[i], int(parts[i + 1])) for i in range(0, len(parts) - 1, 2))
        for entry, factor in ((entry, factor) for names, factor in units.items() for entry in names.split()):
            name = entry.removeprefix("+")
            is_word = len(name) > 1 and name.islower()
            for short, (long, scale) in {"": ("", 1.0), **(PREFIXES if entry != name else {})}.items():
                spelled = [(words, long + name), (words, long + name + "s")] if is_word else [(symbols, short + name)]
                if not is_word and short in tuple("kcdm"):
                    spelled.append((words, (short + name).lower()))  # people write KM and Kg
                for table, each in spelled:
                    table.setdefault(each, {}).setdefault(kind, set()).add(factor * scale)
    return symbols, words


SYMBOLS, WORDS = _names_of_units()
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")
QUANTITY = re.compile(  # a number, or the end of a formula, with a currency sign before it if there is one
    r"(?P<money>(?:\\?\$|[\u20ac\u00a3\u00a5])\s*)?-?(?:(?:\d[\d,]*)?\.?\d+|(?<=[})])|(?<=\\pi))"
    r"(?:\s*(?:thousand|million|billion|trillion)\b)?(?![\d{])"
)
FACTOR = re.compile(
    r"(?:(?P<before>square|sq|cubic|cu)\b\.?)?\s*(?P<name>[A-Za-z\u03bc]+|[\u00b0%\u20ac\u00a3\u00a5\u00a2]|\\\$)"
    r"(?:\s*(?P<power>\^\s*\{?\s*-?\d\s*\}?|squared\b|cubed\b))?",
    re.IGNORECASE,
)
PER = re.compile(r" */ *| +(?:per|an?|each|every) +")
STRICT = re.compile(r" */ *(?![a-z]{3})")  # m/s must not be shortened to m, but dollars/hour may be to dollars
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
# Two quantities that are one: 1 hour and 30 minutes.
GAP = r"(?:[\s~]|\\[ ,;])*+"  # possessive, since a policy may write gaps without end
OF_UNIT = rf"{GAP}-?(?:\\(?:text|mathrm|mbox)\s*\{{)?{GAP}"
JOINED = re.compile(
    rf"(?<![\w.,/^-])(?<!\^\{{)(?P<number>\d[\d,]*(?:\.\d+)?)(?P<large>{OF_UNIT}(?P<first>[A-Za-z]+))"
    rf"\.?{GAP}\}}?,?{GAP}(?:\\text\s*\{{\s*)?(?:and\b|&)?{GAP}\}}?{GAP}"
    rf"(?P<count>\d+(?:\.\d+)?)(?P<small>{OF_UNIT}(?P<second>[A-Za-z]+))"
)


@dataclass(frozen=True)
class Unit:
    """A unit, or a rate of two units."""

    whole: Readings  # what it may mean: "ounces" is a mass and a volume
    above: Readings  # what the numerator of a rate may mean; for other units the same object as `whole`
    loose: bool  # whether an answer may leave out the denominator: 5 dollars for "He earns 5 dollars per hour"


def conversion_factors(gold: str, text: str) -> set[float]:
    """Factors by which the number in a text may have to be multiplied to have the unit of the reference answer.

    Returns:
        The possible factors, {1.0} if one of the two has no unit; empty if the units cannot be converted.

    Example:
        >>> [conversion_factors("15 m", text) for text in ("15 cm", "15 square feet", "15 apples")]
        [{0.01}, set(), {1.0}]
    """
    wanted, found = find_unit(gold), find_unit(text)
    if wanted is None or found is None:
        return {1.0}
    one, other = found.whole, wanted.whole
    if (one is found.above) != (other is wanted.above) and (wanted.loose or found.loose):
        one, other = found.above, wanted.above
    ratios = _ratios(one, other)
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
    """Whether words are exactly a unit of the table, or a rate of two."""
    found, _, end = _last_unit(f"1 {words}")
    return found is not None and not f"1 {words}"[end:].strip(" .")


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


def in_one_unit(text: str) -> tuple[str, str]:
    r"""Write each quantity in several units as one number: once in the smallest of its units, and once in the largest.

    A part that is as large as the unit before it, as in "1 hour, 60 minutes", is an answer of its own and stays unchanged.

    Example:
        >>> in_one_unit("It takes 1 hour, 30 minutes and 36 seconds.")
        ('It takes 5436 seconds.', 'It takes 1.51 hour.')
    """
    small = large = text
    while (merged := JOINED.sub(lambda match: _merged(match, "small"), small)) != small:
        small, large = merged, JOINED.sub(lambda match: _merged(match, "large"), large)
    return small, large


def _merged(match: re.Match[str], unit: str) -> str:
    """Two quantities as one, if the second has a smaller unit of the same dimension."""
    ratios = {round(ratio, 9) for ratio in _ratios(_readings(match["first"]), _readings(match["second"]))}
    ratio = ratios.pop() if len(ratios) == 1 else 0.0
    count = float(match["count"])
    if not ratio.is_integer() or not 1 < ratio > count:
        return match[0]
    total = float(match["number"].replace(",", "")) * ratio + count
    return f"{total / (ratio if unit == 'large' else 1):.9f}".rstrip("0").rstrip(".") + match[unit]


def _readings(name: str) -> Readings:
    """What a sign or a word may mean, empty if it is no unit."""
    return SYMBOLS.get(name) or WORDS.get(name.casefold()) or {}


def _ratios(one: Readings, other: Readings) -> set[float]:
    """How many of the second unit are one of the first, for each dimension that both may have."""
    return {a / b for kind in one.keys() & other.keys() for a in one[kind] for b in other[kind]}


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
    if above is None:
        return None, at
    following = re.compile(r"\s+([A-Za-z])(?![\w'])|\s*\u00b7").match(text, at)
    if following and (not following[1] or following[1] in SYMBOLS):
        return None, at  # "5 N m"
    whole, loose = above, any(name in MONEY for kind in above for name, _ in kind)
    while (per := PER.match(text, at)) and (factor := _unit_with_power(text, per.end()))[0]:
        loose = loose or not STRICT.match(text, at)
        whole, at = _product(whole, factor[0], -1), factor[1]
    return Unit(whole, above, loose), at


def _unit_with_power(text: str, at: int) -> tuple[Readings | None, int]:
    """One unit with its power, such as "square feet" or cm^{2}."""
    match = FACTOR.match(text, at)
    if not match:
        return None, at
    name = match["name"].removeprefix("\\")
    readings = _readings(name)
    if not readings or (name.casefold() == "in" and not match["power"] and re.match(r"\.?\s*[^\W\d_]", text[match.end() :])):
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
