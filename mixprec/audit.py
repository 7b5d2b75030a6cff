"""The printed tables, checked against themselves. `python -m mixprec.audit [FOLDER]`

Four things are computed, and nothing about any number is written down here:

- percent:  100 × accuracy / BF16 accuracy, both as printed, rounded to one digit, is the printed percent
- same row: a cell that stands in two tables has the same accuracy and percent in both
- average:  options of a and b bits average between a and b
- layout:   every row has every model of its table, once
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from itertools import combinations
from pathlib import Path

from mixprec import published
from mixprec.cell import ConfigError
from mixprec.published import Number, Printed

WIDTH = 120  # columns of a terminal that everything fits into
_STEP = Decimal("0.1")  # percentages are printed with one digit
_HALF = Decimal("0.00005")  # accuracies are printed with four


@dataclass(frozen=True)
class Finding:
    """Something printed that cannot be: where (row and model empty: the table's header), and why."""

    table: str
    row: str
    model: str
    kind: str  # percent, accuracy, average or layout
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.table, self.row, self.model) if part)
        return f"{where}: {'; '.join(self.reasons)}"


def findings(tables: dict[str, Printed]) -> list[Finding]:
    """Everything in `tables` that contradicts itself; a cell that does so twice is one finding."""
    reasons: dict[tuple, list[str]] = defaultdict(list)
    kinds: dict[tuple, str] = {}

    def add(kind: str, reason: str, table: str, row: str = "", model: str = "") -> None:
        reasons[table, row, model].append(reason)
        kinds.setdefault((table, row, model), kind)

    for table in tables.values():
        _layout(table, add)
        _averages(table, add)
        for number in table.numbers:
            reason = _percent(number, table, tables)
            if reason:
                add("percent", reason, table.name, number.row, number.model)
    wrong = set(reasons)
    for (first, a), (second, b) in _same_cells(tables):
        # The one that is wrong by itself is the one to name; else the later of the two.
        if (first, a.row, a.model) in wrong and (second, b.row, b.model) not in wrong:
            (first, a), (second, b) = (second, b), (first, a)
        where = {"table": second, "row": b.row, "model": b.model}
        there = f"{first}, {a.row}, prints"
        if a.accuracy != b.accuracy:
            add("accuracy", f"accuracy {b.accuracy}, but {there} {a.accuracy}", **where)
        if a.percent is not None and b.percent is not None and a.percent != b.percent:
            add("percent", f"{there} {a.percent}% for the same cell", **where)
    return [Finding(*where, kinds[where], tuple(why)) for where, why in reasons.items()]


def _layout(table: Printed, add) -> None:
    """Every row × model is there once, and nothing else is."""
    if not table.numbers:
        return
    printed = [(number.row, number.model) for number in table.numbers]
    expected = [(row.name, model) for row in table.rows for model in table.models]
    for cell in expected:
        if printed.count(cell) != 1:
            add("layout", f"{printed.count(cell)} numbers where one belongs", table.name, *cell)
    for cell in dict.fromkeys(printed):
        if cell not in expected:
            add("layout", "not a row and model of this table", table.name, *cell)


def _averages(table: Printed, add) -> None:
    """Printed averages that the table's options cannot have."""
    if not table.numbers:
        return
    lowest, highest = table.bits[0], table.bits[-1]
    ranges = {"low": (lowest, lowest), "high": (highest, highest)}
    printed = [("", table.average_bits, (lowest, highest))]
    printed += [
        (row.name, row.average_bits, ranges.get(row.baseline, (lowest, highest)))
        for row in table.rows
        if row.average_bits != table.average_bits  # else the header's
    ]
    for row, average, (least, most) in printed:
        if average is not None and not least <= average <= most:
            can = f"only {least}" if least == most else f"{least} to {most}"
            bits = " and ".join(map(str, table.bits))
            add(
                "average",
                f"printed at {average:g} average bits; options of {bits} bits can average {can}",
                table.name,
                row,
            )


def _percent(number: Number, table: Printed, tables: dict[str, Printed]) -> str:
    """Why the printed percent does not follow from the printed accuracies; empty if it does.

    Accuracies before rounding lie within half a unit of their last digit. They are not used to
    excuse a percent, which would be a different rule for one cell, but what they allow is said.
    """
    if number.percent is None:
        return ""
    rows = [row.name for row in tables[table.bf16].rows if row.baseline == "bf16"]
    whole = tables[table.bf16].number(rows[0], number.model) if rows else None
    if whole is None:
        return f"{number.percent}% of a BF16 accuracy that {table.bf16} does not print"
    ratio = 100 * number.accuracy / whole.accuracy
    rounded = ratio.quantize(_STEP, ROUND_HALF_UP)
    if rounded == number.percent:
        return ""
    least = 100 * (number.accuracy - _HALF) / (whole.accuracy + _HALF)
    most = 100 * (number.accuracy + _HALF) / (whole.accuracy - _HALF)
    within = least.quantize(_STEP, ROUND_HALF_UP) <= number.percent <= most.quantize(
        _STEP, ROUND_HALF_UP
    )  # fmt: skip
    return (
        f"{number.percent}% printed, but {number.accuracy} / {whole.accuracy} = {ratio:.2f}%, "
        f"so {rounded}% (before the accuracies were rounded {least:.3f} to {most:.3f}: "
        f"{'just possible' if within else 'impossible'})"
    )


def _same_cells(tables: dict[str, Printed]):
    """Pairs of (table name, number) of one model, options, baseline and printed average."""
    places = defaultdict(list)
    for table in tables.values():
        for row in table.rows:
            if row.baseline == "bf16":
                key = ("none", "bf16", None)
            else:
                key = (table.options[0], row.baseline, row.average_bits)
            for number in table.numbers:
                if number.row == row.name:
                    places[(*key, number.model)].append((table.name, number))
    for numbers in places.values():
        yield from combinations(numbers, 2)


def markdown(tables: dict[str, Printed]) -> str:
    """What was checked and what was found, in lines of at most 120 columns."""
    found = findings(tables)
    numbers = [number for table in tables.values() for number in table.numbers]
    averages = sum(
        (table.average_bits is not None)
        + sum(row.average_bits not in (None, table.average_bits) for row in table.rows)
        for table in tables.values()
        if table.numbers
    )
    lines = [
        "# Audit of the printed tables",
        "",
        f"Checked: {len(numbers)} accuracies, {sum(n.percent is not None for n in numbers)} percentages "
        f"against them, {len(list(_same_cells(tables)))} pairs of cells that stand in two tables, {averages} "
        "printed averages against their options. A percentage is right if the printed accuracies give it when "
        "their quotient is rounded to one digit.",
        "",
        f"{len(found)} findings{':' if found else '.'}",
        "",
        *(f"- {finding}" for finding in found),
    ]
    return wrapped(lines)


def wrapped(lines: list[str]) -> str:
    """`lines` as text of at most WIDTH columns; tables stay as they are."""
    done = []
    for line in lines:
        indent = "  " if line.startswith("- ") else ""
        keep = line.startswith(("|", "#"))
        done += [line] if keep else textwrap.wrap(
            line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]  # fmt: skip
    return "\n".join(done).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.audit", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, nargs="?", default=published.EXPERIMENTS,
                        help="folders with table.yaml and published.csv (default: experiments)")  # fmt: skip
    try:
        print(markdown(published.read(parser.parse_args(arguments).folder)), end="")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
