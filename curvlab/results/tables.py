"""Tables of records for the console, CSV, Markdown, LaTeX and JSON.

A record is a flat dictionary. JSON and CSV have all keys and all digits; the other formats have selected columns with
formatted values.
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from curvlab.results.run_directory import RunDirectory
from curvlab.text import MISSING, format_number, plus_minus, quote_formula, to_printable

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a formatted table.

    Attributes:
        key: Key of the values in the records.
        header: Header of the column.
        format: Function that formats a value; not used if ``spread`` is given.
        spread: Key of the standard deviations; the column then shows ``mean ± std``.
    """

    key: str
    header: str
    format: Callable[[Any], str] = format_number
    spread: str | None = None

    def cell(self, record: Record) -> str:
        """Return the text of a cell, one line; a dash if the record lacks the key."""
        return to_printable(self._text(record))

    def _text(self, record: Record) -> str:
        value = record.get(self.key)
        if value is not None and self.spread is not None:
            return plus_minus(value, record.get(self.spread))
        return MISSING if value is None else self.format(value)

    def is_text(self, records: Sequence[Record]) -> bool:
        """Return whether the column has texts, which are left-aligned; numbers are right-aligned."""
        return any(isinstance(record.get(self.key), str) for record in records)


def mean_column(key: str, header: str) -> Column:
    """Return a column of means with standard deviations, from the records of ``aggregate``."""
    return Column(key, header, spread=f"{key}_std")


def render(records: Sequence[Record], columns: Sequence[Column], title: str | None = None) -> Table:
    """Return the records as a table for the console."""
    # Without outer edges, the widest table fits a terminal of 80 characters.
    table = Table(title=None if title is None else Text(to_printable(title)), show_edge=False, pad_edge=False)
    for column in columns:
        header = to_printable(column.header)
        cells = [column.cell(record) for record in records]
        # A narrow terminal must wrap between words: a number cut before its exponent would be wrong.
        words = [word for text in (header, *cells) for word in text.split()]
        table.add_column(
            Text(header),
            justify="left" if column.is_text(records) else "right",
            min_width=max(map(cell_len, words), default=0),
            no_wrap=column.is_text(records),
        )
    for record in records:
        table.add_row(*(Text(column.cell(record)) for column in columns))
    return table


def write_tables(
    run: RunDirectory,
    records: Sequence[Record],
    columns: Sequence[Column] | None = None,
    summary: Sequence[Record] | None = None,
) -> None:
    """Write ``table.json``, ``table.csv``, ``table.md`` and ``table.tex``.

    Args:
        run: The run directory.
        records: Flat records; JSON and CSV have all keys. In CSV, a text that a spreadsheet would evaluate as a formula
            is preceded by an apostrophe (``'=1+1``).
        columns: Columns of Markdown and LaTeX; None for all keys.
        summary: Records of Markdown and LaTeX, such as those of ``aggregate``; None for ``records``.

    Raises:
        CurvlabError: A file cannot be written.
    """
    shown = records if summary is None else summary
    if columns is None:
        columns = [Column(key, key) for key in dict.fromkeys(key for record in shown for key in record)]
    run.write_json("table.json", records)
    run.write_text("table.csv", to_csv(records))
    run.write_text("table.md", to_markdown(shown, columns))
    run.write_text("table.tex", to_latex(shown, columns))


def to_csv(records: Sequence[Record]) -> str:
    """Return all keys of the records as CSV, with all digits; line breaks in texts are escaped."""
    # With dtype object, a column of integers with missing values keeps its integers.
    shown = [{quote_formula(key): quote_formula(value) for key, value in record.items()} for record in records]
    import pandas as pd

    return pd.DataFrame(shown, dtype=object).to_csv(index=False)


def to_markdown(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """Return a Markdown table."""
    rows = [
        [_markdown(to_printable(column.header)) for column in columns],
        [":---" if column.is_text(records) else "---:" for column in columns],
        *([_markdown(column.cell(record)) for column in columns] for record in records),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def to_latex(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """Return a LaTeX ``tabular`` that needs the package booktabs.

    Letters of other scripts are UTF-8, and need an engine and a font that support them.
    """
    rules = "".join("l" if column.is_text(records) else "r" for column in columns)
    head = _latex_row([to_printable(column.header) for column in columns])
    body = [_latex_row([column.cell(record) for column in columns]) for record in records]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{rules}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def aggregate(records: Sequence[Record], by: Sequence[str], values: Sequence[str]) -> list[dict[str, Any]]:
    """Average records over seeds.

    Args:
        records: One record per seed and group.
        by: Keys that define a group; groups are in the order of their first records.
        values: Keys of the numbers to average.

    Returns:
        One record per group with the keys ``by``, ``seeds`` (number of records) and, for each value, ``<value>`` (mean)
        and ``<value>_std`` (standard deviation with n - 1; None for a single record). Both are None if a value is
        missing or not finite in a record of the group.

    Examples:
        >>> aggregate([{"w": "a", "x": 1.0}, {"w": "a", "x": 3.0}], by=["w"], values=["x"])
        [{'w': 'a', 'seeds': 2, 'x': 2.0, 'x_std': 1.414...}]
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in by), []).append(record)
    rows = []
    for names, members in groups.items():
        row: dict[str, Any] = {**dict(zip(by, names, strict=True)), "seeds": len(members)}
        for key in values:
            numbers = [member.get(key) for member in members]
            known = [float(number) for number in numbers if number is not None and math.isfinite(number)]
            whole = len(known) == len(members)
            row[key] = statistics.fmean(known) if whole else None
            row[f"{key}_std"] = statistics.stdev(known) if whole and len(known) > 1 else None
        rows.append(row)
    return rows


def _markdown(text: str) -> str:
    # Underscores and ampersands are escaped only where they are markup, since most names contain underscores.
    return re.sub(r"[\\|`*<\[~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)", r"\\\g<0>", text)


_NUMBER = re.compile(r"\(?-?[\d,.∞]+( ± [\d,.]+)?\)?(e-?\d+)?", re.ASCII)
_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\`{}",
    "-": "-{}",  # before another hyphen, which would give a dash
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "∞": r"$\infty$",
    "→": r"$\to$",
    "²": "$^2$",
    "⁴": "$^4$",
    "λ": r"$\lambda$",
    "†": r"\dag{}",
}
_SPECIAL = re.compile(f"-(?=-)|[{re.escape(''.join(_LATEX.keys() - {'-'}))}]")


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join(map(_latex, cells))
    # After a line break, LaTeX reads "[" as its argument and "*" as its starred form.
    guard = "{}" if row.lstrip().startswith(("[", "*")) else ""
    return rf"{guard}{row} \\"


def _latex(text: str) -> str:
    if _NUMBER.fullmatch(text):
        math_text = text.replace(",", "{,}").replace("±", r"\pm").replace("∞", r"\infty")
        return "$" + re.sub(r"e(-?\d+)$", r" \\times 10^{\1}", math_text) + "$"
    return _SPECIAL.sub(lambda match: _LATEX[match[0]], text)
