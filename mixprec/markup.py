"""How a table is written: numbers as text, text as Markdown (terminal, README files) and as LaTeX.

A document is a list of lines and tables in reading order: headings (`# `, `## `, `### `), notes (`- `),
other text, and tables of text. `**x**` is bold and `` `x` `` is code in both.
"""

from __future__ import annotations

import re

import pandas as pd

from mixprec.audit import WIDTH, wrapped
from mixprec.statistics import Interval

DASH = "—"
Document = list[str | pd.DataFrame]


# --- numbers ------------------------------------------------------------------------------------


def number(value: float | None, digits: int, sign: str = "") -> str:
    """`sign`: "+" to show it always. Never -0.0000."""
    return DASH if absent(value) else f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def plus_minus(value: float | None, error: float | None, digits: int, sign: str = "") -> str:
    """As `0.4123 ± 0.0110`; without the error where there is none."""
    text = number(value, digits, sign)
    return text if absent(value) or absent(error) else f"{text} ± {error:.{digits}f}"


def percent(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """As `97.9 %, 95–101`: the ends with a digit where they lie within 4 points."""
    if absent(value):
        return DASH
    if absent(low) or absent(high):
        return f"{value:.1f} %"
    return f"{value:.1f} %, {ends(low, high, 1 if high - low < 4 else 0)}"


def ends(low: float, high: float, digits: int, sign: str = "") -> str:
    """An interval: `95–101`, or `-1.2 to +0.3` where ends have signs."""
    between = " to " if sign else "–"
    return f"{number(low, digits, sign)}{between}{number(high, digits, sign)}"


def interval(
    value: float, low: float | None, high: float | None, digits: int, of_ends: int, sign: str = ""
) -> str:
    """As `0.4890 (0.435–0.561)` or `+3.76 (+1.42 to +6.10)`; the value alone where there are no ends."""
    text = number(value, digits, sign)
    return text if absent(low) or absent(high) else f"{text} ({ends(low, high, of_ends, sign)})"


def points(difference: Interval) -> str:
    """A difference of accuracy in percentage points, with its interval."""
    parts = (difference.value, difference.low, difference.high)
    scaled = [None if part is None else 100 * part for part in parts]
    return interval(*scaled, digits=2, of_ends=2, sign="+")


def p_value(p: float | None) -> str:
    if absent(p):
        return DASH
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def marked(text: str, *, best: bool, differs: bool) -> str:
    return (f"**{text}**" if best else text) + " *" * differs


def absent(value: float | None) -> bool:
    return value is None or pd.isna(value)


# --- Markdown -----------------------------------------------------------------------------------


def markdown(document: Document) -> str:
    lines = []
    for item in document:
        lines += grid(item) if isinstance(item, pd.DataFrame) else [item, ""]
    # notes stand together
    kept = [
        line
        for line, before, after in zip(lines, ["", *lines], [*lines[1:], ""], strict=False)
        if line or not (before.startswith("- ") and after.startswith("- "))
    ]
    return wrapped(kept)


def grid(table: pd.DataFrame) -> list[str]:
    """Markdown of a table of strings, broken into several where it is wider than WIDTH."""

    def width(header: str, texts) -> int:
        # tabulate makes a column two wider than its header, and adds "| " and " ".
        return max([len(header) + 2, *map(len, texts)]) + 3

    first = width("", table.index) + 1
    pieces, room = [[]], WIDTH - first
    for column in table.columns:
        needed = width(column, table[column])
        if pieces[-1] and needed > room:
            pieces.append([])
            room = WIDTH - first
        pieces[-1].append(column)
        room -= needed
    lines = []
    for piece in pieces:
        text = table[piece].to_markdown(stralign="left", disable_numparse=True)
        lines += [*text.splitlines(), ""]
    return lines


# --- LaTeX --------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "±": r"$\pm$", "−": "$-$", "≤": r"$\leq$", "—": "---", "–": "--",
    "·": r"\quad", "…": r"\dots{}", "×": r"$\times$",
}  # fmt: skip


def latex(document: Document, name: str) -> str:
    """Each table of `document` as a `table` with booktabs' rules, headings as its caption.

    Text follows the table that it stands after, and what stands before the first goes to that one.
    """
    heads: dict[int, str] = {}
    floats: list[tuple[str, pd.DataFrame, list[str]]] = []
    early: list[str] = []
    for item in document:
        if isinstance(item, pd.DataFrame):
            floats.append((": ".join(heads.values()), item, early))
            early = []
        elif head := re.match(r"(#+) (.*)", item):
            depth = len(head[1])
            heads = {level: text for level, text in heads.items() if level < depth}
            heads[depth] = head[2]
        elif item:
            (floats[-1][2] if floats else early).append(item.removeprefix("- "))
    lines = ["% needs \\usepackage{booktabs}"]
    for place, (caption, table, notes) in enumerate(floats, 1):
        inner = table.set_axis([in_latex(text) for text in table.index]).map(in_latex)
        inner.columns = [in_latex(text) for text in table.columns]
        text = inner.style.to_latex(
            hrules=True, column_format="l" * (1 + len(table.columns)), position="htbp",
            position_float="centering", caption=in_latex(caption), label=f"tab:{name}-{place}",
        )  # fmt: skip
        below = "".join(f"\\par\\smallskip\n{in_latex(note)}\n" for note in notes)
        lines.append(text.replace("\\end{table}", f"{below}\\end{{table}}"))
    return "\n".join(lines)


def in_latex(text: str) -> str:
    """`text` escaped, its ±, dashes and minus signs as LaTeX has them, `**x**` and code as such."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    escaped = re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped)
    escaped = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", escaped)
    return re.sub(r"`(.+?)`", r"\\texttt{\1}", escaped)
