"""A table's cells as Markdown, CSV and LaTeX, pure. The first row is its head."""

import csv
import io
import re
from collections.abc import Iterator, Sequence

Cells = Sequence[Sequence[str]]

LATEX = {
    **{letter: f"\\{letter}" for letter in "_%&#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    **{letter: f"${letter}$" for letter in "<>|"},
}


def number(value: float | None, digits: int = 3) -> str:
    """`1,234.500`, or `-` for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def aligned(cells: Cells, left: int = 0) -> str:
    """A Markdown table whose columns are even; the first `left` ones begin at their left."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [*cells[:1], ["-" * width for width in widths], *cells[1:]]
    return "\n".join(f"| {' | '.join(_padded(row, widths, left))} |" for row in rows)


def _padded(row: Sequence[str], widths: Sequence[int], left: int) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if i < left else cell.rjust(width)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))
    return underscored(text)


def underscored(text: str) -> str:
    """Markdown whose underscores at the ends of words stay what they are."""
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def as_csv(cells: Cells) -> str:
    """Comma-separated values; what is None was an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(cells)
    return file.getvalue()


def latex(cells: Cells, left: int = 1) -> str:
    """A `tabular` that needs no package."""
    columns = "l" * left + "r" * (len(cells[0]) - left)
    rows = [" & ".join(map(_latex, row)) + r" \\" for row in cells]
    body = [r"\hline", rows[0], r"\hline", *rows[1:], r"\hline"]
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]) + "\n"


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)
