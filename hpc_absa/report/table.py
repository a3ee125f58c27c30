"""A table once, as a frozen record, and in four formats."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """A mean over repetitions, with the sample standard deviation where there are at least two."""

    mean: float
    std: float = math.nan
    n: int = 1


Cell = str | int | float | Measured | None
"""None and NaN are shown empty: nothing was measured there, or it does not apply."""


@dataclass(frozen=True)
class Column:
    """A column's heading and how its numbers are written."""

    name: str
    group: str = ""
    """Columns next to each other with the same group stand under one heading."""
    digits: int | None = None
    """Digits after the point; None leaves text and whole numbers as they are."""
    suffix: str = ""
    """Written after each number, such as `×`."""

    @property
    def heading(self) -> str:
        """Group and name in one line, for formats without grouped columns."""
        return f"{self.group} {self.name}".strip()


@dataclass(frozen=True)
class Table:
    """A table, once; `to_markdown`, `to_csv`, `to_latex` and `to_html` write it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells under {len(self.columns)} columns")

    def to_markdown(self) -> str:
        """GitHub's dialect: numbers flush right, groups folded into the headings."""
        heads = [_markdown(column.heading) for column in self.columns]
        rules = [":--" if self._is_text(i) else "--:" for i in range(len(heads))]
        body = [[_markdown(cell) for cell in row] for row in self._written()]
        lines = [f"| {' | '.join(row)} |" for row in (heads, rules, *body)]
        note = f"\n{_markdown(self.note)}\n" if self.note else ""
        return f"**{_markdown(self.title)}**\n\n" + "\n".join(lines) + "\n" + note

    def to_csv(self) -> str:
        """Full precision; a mean over repetitions is followed by its `std` and `n`."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        repeated = [self._repeated(i) for i in range(len(self.columns))]
        heads: list[str] = []
        for column, wide in zip(self.columns, repeated, strict=True):
            heads += [column.heading]
            heads += [f"{column.heading} std", f"{column.heading} n"] if wide else []
        writer.writerow(heads)
        for row in self.rows:
            values: list[str] = []
            for cell, wide in zip(row, repeated, strict=True):
                values += _csv(cell, wide)
            writer.writerow(values)
        return out.getvalue()

    def to_latex(self) -> str:
        r"""A `table` with `booktabs` rules; goes into a paper as it stands."""
        align = "".join("l" if self._is_text(i) else "r" for i in range(len(self.columns)))
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
        if any(column.group for column in self.columns):
            spans = [
                rf"\multicolumn{{{n}}}{{c}}{{{_latex(group)}}}" if group else " & ".join([""] * n)
                for group, n in self._groups()
            ]
            lines += [" & ".join(spans) + r" \\", self._cmidrules()]
        lines += [" & ".join(_latex(c.name) for c in self.columns) + r" \\", r"\midrule"]
        lines += [" & ".join(map(_latex, row)) + r" \\" for row in self._written()]
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\smallskip {_latex(self.note)}"] if self.note else []
        return "\n".join([*lines, r"\end{table}", ""])

    def to_html(self) -> str:
        """A `<figure>` with the table in it; no style of its own."""
        lines = ["<figure class='table'>", f"<figcaption>{html.escape(self.title)}</figcaption>"]
        lines += ["<div class='scroll'><table>", "<thead>"]
        if any(column.group for column in self.columns):
            cells = (
                f"<th colspan='{n}'{' scope=colgroup' if g else ''}>{html.escape(g)}</th>"
                for g, n in self._groups()
            )
            lines.append(f"<tr class='groups'>{''.join(cells)}</tr>")
        heads = (
            f"<th scope='col'{self._class(i)}>{html.escape(c.name)}</th>"
            for i, c in enumerate(self.columns)
        )
        lines += [f"<tr>{''.join(heads)}</tr>", "</thead>", "<tbody>"]
        for row in self._written():
            cells = (f"<td{self._class(i)}>{html.escape(c)}</td>" for i, c in enumerate(row))
            lines.append(f"<tr>{''.join(cells)}</tr>")
        lines += ["</tbody>", "</table></div>"]
        lines += [f"<p class='note'>{html.escape(self.note)}</p>"] if self.note else []
        return "\n".join([*lines, "</figure>"])

    def formats(self) -> Mapping[str, str]:
        """All four, by the usual file suffix."""
        return {
            "md": self.to_markdown(),
            "csv": self.to_csv(),
            "tex": self.to_latex(),
            "html": self.to_html(),
        }

    def _written(self) -> list[list[str]]:
        return [
            [_written(cell, column) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]

    def _is_text(self, index: int) -> bool:
        return any(isinstance(row[index], str) for row in self.rows)

    def _class(self, index: int) -> str:
        return "" if self._is_text(index) else " class='n'"

    def _repeated(self, index: int) -> bool:
        return any(isinstance(row[index], Measured) for row in self.rows)

    def _groups(self) -> list[tuple[str, int]]:
        groups: list[tuple[str, int]] = []
        for column in self.columns:
            if groups and groups[-1][0] == column.group:
                groups[-1] = (column.group, groups[-1][1] + 1)
            else:
                groups.append((column.group, 1))
        return groups

    def _cmidrules(self) -> str:
        rules, first = [], 1
        for group, n in self._groups():
            if group:
                rules.append(rf"\cmidrule(lr){{{first}-{first + n - 1}}}")
            first += n
        return "".join(rules)


def _written(cell: Cell, column: Column) -> str:
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Measured):
        spread = ""
        if cell.n > 1 and (cell.std > 0 or column.digits != 0):
            spread = f" ± {_digits(cell.std, column)}"
        return f"{_digits(cell.mean, column)}{spread}{column.suffix}"
    return f"{_digits(cell, column)}{column.suffix}"


def _digits(value: float, column: Column) -> str:
    if column.digits is None:
        return str(value)
    return f"{value:.{column.digits}f}"


def _csv(cell: Cell, wide: bool) -> list[str]:
    if isinstance(cell, Measured):
        values: list[Cell] = [cell.mean, cell.std, cell.n]
    else:
        values = [cell, None, None] if wide else [cell]
    return ["" if v is None or v != v else str(v) for v in values]


def _markdown(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
    return escaped.replace("<", "&lt;").replace(">", "&gt;")


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "λ": r"$\lambda$",
        "–": "--",
        "\u202f": r"\,",
        "\n": " ",
    }
)


def _latex(value: str) -> str:
    return value.translate(_LATEX)
