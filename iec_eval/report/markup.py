"""Text in the forms that others set: Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]], *, words: int) -> str:
    """Cells, the first line as head, as aligned Markdown; ``words`` columns hold no numbers."""
    escaped = [[markdown_text(cell) for cell in line] for line in lines]
    columns = [
        padded(column, left=place < words)
        for place, column in enumerate(zip(*escaped, strict=True))
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def padded(column: Sequence[str], *, left: bool) -> list[str]:
    """The cells of a column, its head first, set to one width, with the rule below the head."""
    width = max(3, *map(len, column))
    rule = "-" * width if left else "-" * (width - 1) + ":"
    cells = [cell.ljust(width) if left else cell.rjust(width) for cell in column]
    return [cells[0], rule, *cells[1:]]


def markdown_text(text: str) -> str:
    """Text on one line, with what Markdown reads as marks escaped."""
    # a "<" begins a tag only before these; "N<1000" stays as it is
    return re.sub(r"([\\|*`]|<(?=[A-Za-z/!?]))", r"\\\1", " ".join(text.split()))


def latex_text(text: str) -> str:
    """Text on one line, with what LaTeX reads as commands escaped."""
    return " ".join(text.split()).translate(_LATEX)


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "[": "{[}",  # after a line's end it would be read as an optional length
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
    }
)
