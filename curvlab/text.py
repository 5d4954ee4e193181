"""Text for readers: formatted numbers, and names made safe for terminals and spreadsheets."""

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

MISSING = "–"

_FORMULA_STARTS = tuple("=+-@＝＋－＠")  # first characters of a text that spreadsheets evaluate as a formula


def to_printable(text: str) -> str:
    r"""Return a text as one line without control characters, which could move the cursor or colour the terminal.

    Line ends, tabs and other white space become spaces; other characters that cannot be printed are escaped.

    Examples:
        >>> to_printable("fc\t1.\x1b[31mweight\n")
        'fc 1.\\x1b[31mweight '
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def quote_formula(value: Any) -> Any:
    """Return a text that spreadsheets do not evaluate as a formula; other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    text = to_printable(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA_STARTS) else text


def format_number(value: Any, digits: int = 4) -> str:
    """Format a number with significant digits; a missing value (None, NaN) is a dash.

    Integers are exact, with thousands separators. Numbers from 0.0001 to below a million have no exponent, others do.

    Examples:
        >>> [format_number(x) for x in (0.5, 1234.5678, 3.14159e-9, 23520, None)]
        ['0.5000', '1,235', '3.142e-9', '23,520', '–']
    """
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    if isinstance(value, Integral):
        return f"{int(value):,}"
    number = float(value)
    if math.isinf(number):
        return "∞" if number > 0 else "-∞"
    if number == 0:
        return "0"
    # The exponent after rounding: 999.96 is 1000 in four digits.
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    if -4 <= int(exponent) < 6:
        return f"{number:,.{max(digits - 1 - int(exponent), 0)}f}"
    return f"{mantissa}e{int(exponent)}"


def write_count(number: int, noun: str) -> str:
    """Return a number of things, the noun with an ``s`` unless it is one.

    Examples:
        >>> write_count(1, "step"), write_count(2000, "step"), write_count(0, "seed")
        ('1 step', '2,000 steps', '0 seeds')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def enumerate_names(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names, and how many more there are.

    Examples:
        >>> enumerate_names(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a suggestion for the end of an error message: the most similar name, or an empty string.

    Examples:
        >>> did_you_mean("digit", ["digits", "mnist"]), did_you_mean("x", ["digits", "mnist"])
        ("; did you mean 'digits'?", '')
    """
    known = {one.lower(): one for one in names}
    similar = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {known[similar[0]]!r}?" if similar else ""


def plus_minus(mean: float | None, deviation: float | None) -> str:
    """Format a mean and its standard deviation to the same decimal; the deviation has two significant digits.

    Examples:
        >>> plus_minus(0.123456, 0.0042), plus_minus(3.14159e-9, 2e-11), plus_minus(-1e-9, 0.1), plus_minus(0.5, None)
        ('0.1235 ± 0.0042', '(3.142 ± 0.020)e-9', '0.00 ± 0.10', '0.5000')
    """
    if mean is None or deviation is None or not math.isfinite(mean) or not math.isfinite(deviation):
        return format_number(mean)
    if deviation == 0:
        return f"{format_number(mean)} ± 0"
    top = _exponent(max(abs(mean), deviation))
    if -4 <= top < 6:
        decimals = max(1 - _exponent(deviation), 0)
        return f"{mean:z,.{decimals}f} ± {deviation:,.{decimals}f}"
    decimals = max(1 - (_exponent(deviation) - top), 0)
    return f"({mean / 10.0**top:.{decimals}f} ± {deviation / 10.0**top:.{decimals}f})e{top}"


def _exponent(number: float) -> int:
    return int(f"{number:.1e}".split("e")[1])


def format_seconds(seconds: float) -> str:
    """Return seconds with their unit; a dash for NaN."""
    if math.isnan(seconds):
        return "-"
    return f"{three_digits(1e3 * seconds)} ms" if seconds < 1 else f"{three_digits(seconds)} s"


def format_bytes(size: float) -> str:
    """Return bytes with their unit; a dash for NaN."""
    if math.isnan(size):
        return "-"
    unit, name = next((u for u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u[0]), (1, "B"))
    return f"{three_digits(size / unit)} {name}"


def three_digits(number: float) -> str:
    """Return a positive number with three significant digits, or as a whole number."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
