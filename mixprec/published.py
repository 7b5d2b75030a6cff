"""What the report printed: `experiments/<table>/table.yaml` (its layout) and `published.csv` (its numbers).

table.yaml says how a printed table maps to cells of this project:

    title         of the table
    options       this project's option sets that reproduce it, the report's own first
    average_bits  as printed over the table; a row that prints its own has it in the row
    budget        what is run instead, where the printed average is impossible
    models        the columns, in printed order; none where the report has no such table
    bf16          the table that prints the BF16 accuracies, where this one does not
    rows          printed name -> {baseline, average_bits}, in printed order
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Optional

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixprec.cell import ConfigError
from mixprec.schemes import SCHEMES

_ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = _ROOT / "experiments"
_COLUMNS = ["row", "model", "accuracy", "percent_of_bf16"]


@dataclass
class _RowFile:
    baseline: str = MISSING
    average_bits: Optional[float] = None


@dataclass
class _TableFile:
    title: str = MISSING
    options: list[str] = MISSING
    average_bits: Optional[float] = None
    budget: Optional[float] = None
    models: list[str] = field(default_factory=list)
    bf16: Optional[str] = None
    rows: dict[str, _RowFile] = MISSING


@dataclass(frozen=True)
class PrintedRow:
    """One row: its printed name and average bits, and the baseline and budget that reproduce it."""

    name: str
    baseline: str
    average_bits: float | None
    budget: float | None  # None where the baseline needs none

    @property
    def folder(self) -> str:
        """The last part of its cells' paths in results/."""
        return self.baseline + ("" if self.budget is None else f"-{self.budget:.10g}")


@dataclass(frozen=True)
class Number:
    """One printed cell. Decimals, because the last printed digit is what is judged."""

    row: str
    model: str
    accuracy: Decimal
    percent: Decimal | None


@dataclass(frozen=True)
class Printed:
    """One table. `numbers` is empty where the report has no such table."""

    name: str
    title: str
    options: list[str]
    average_bits: float | None
    budget: float | None
    models: list[str]
    bf16: str
    rows: list[PrintedRow]
    numbers: list[Number]

    @property
    def bits(self) -> list[int]:
        """Bits of the report's options, lowest first."""
        return sorted(SCHEMES[name].bits for name in self.options[0].split("_"))

    def number(self, row: str, model: str) -> Number | None:
        return next((n for n in self.numbers if (n.row, n.model) == (row, model)), None)


def read(folder: Path = EXPERIMENTS) -> dict[str, Printed]:
    """name -> table, for every folder with a table.yaml. Raises ConfigError in one line."""
    files = sorted(folder.glob("*/table.yaml"))
    tables = {file.parent.name: _table(file) for file in files}
    for table in tables.values():
        if table.bf16 not in tables:
            raise ConfigError(
                f"{table.name}/table.yaml: bf16={table.bf16}: accepted: {', '.join(tables)}"
            )
    return tables


def _table(file: Path) -> Printed:
    where = f"{file.parent.name}/table.yaml"
    try:
        merged = OmegaConf.merge(OmegaConf.structured(_TableFile), OmegaConf.load(file))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{where}: {missing[0]}: no value")
        table = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        keys = ", ".join(_TableFile.__dataclass_fields__)
        raise ConfigError(
            f"{where}: {' '.join(str(error).split())[:160]}; accepted keys: {keys}"
        ) from None
    unknown = [n for options in table.options for n in options.split("_") if n not in SCHEMES]
    if unknown or not table.options:
        raise ConfigError(
            f"{where}: options={', '.join(table.options) or 'none'}: accepted: schemes joined by _, "
            f"of {', '.join(SCHEMES)}"
        )
    rows = [_row(where, name, row, table) for name, row in table.rows.items()]
    numbers_file = file.with_name("published.csv")
    return Printed(
        name=file.parent.name,
        title=table.title,
        options=table.options,
        average_bits=table.average_bits,
        budget=table.budget,
        models=table.models,
        bf16=table.bf16 or file.parent.name,
        rows=rows,
        numbers=_numbers(numbers_file) if numbers_file.is_file() else [],
    )


def _row(where: str, name: str, row: _RowFile, table: _TableFile) -> PrintedRow:
    baselines = {file.stem: file for file in sorted((_ROOT / "conf/baseline").glob("*.yaml"))}
    if row.baseline not in baselines:
        raise ConfigError(
            f"{where}: {name}: baseline={row.baseline}: accepted: {', '.join(baselines)}"
        )
    needs = yaml.safe_load(baselines[row.baseline].read_text()).get("needs") or []
    if "budget" not in needs:
        return PrintedRow(name, row.baseline, row.average_bits, None)
    average = table.average_bits if row.average_bits is None else row.average_bits
    budget = average if table.budget is None else table.budget
    if budget is None:
        raise ConfigError(f"{where}: {name}: no average_bits; accepted: in the row or in the table")
    return PrintedRow(name, row.baseline, average, budget)


def _numbers(file: Path) -> list[Number]:
    where = f"{file.parent.name}/{file.name}"
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != _COLUMNS:
            raise ConfigError(f"{where}: accepted: the columns {', '.join(_COLUMNS)}")
        return [
            Number(
                row=line["row"],
                model=line["model"],
                accuracy=_decimal(
                    f"{where}, line {reader.line_num}: accuracy", line["accuracy"], 1
                ),
                percent=_decimal(
                    f"{where}, line {reader.line_num}: percent_of_bf16",
                    line["percent_of_bf16"],
                    1000,
                )
                if line["percent_of_bf16"]
                else None,
            )
            for line in reader
        ]


def _decimal(key: str, text: str, most: int) -> Decimal:
    try:
        value = Decimal(text)
        if value.is_finite() and 0 < value <= most:
            return value
    except (InvalidOperation, TypeError):
        pass
    raise ConfigError(f"{key}={text}: accepted: a number above 0, up to {most}")
