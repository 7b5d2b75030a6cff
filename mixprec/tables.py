"""pandas: results on disk -> the report's tables. Reads `results/` and `experiments/`, nothing else.

`python -m mixprec.tables` renders the report's tables next to what was published, every other experiment that was
ever planned, one table of all cells, and the audit of the printed tables: as Markdown, LaTeX and CSV in
results/tables/ and on the terminal. With `--readme` it also puts them between the markers in README files.

Which rule is best is marked, and which cells can be told from `ours` of the same options and budget, after
Holm's correction over all such comparisons of one evaluation in one table.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd

from mixprec import audit, markup, paired, published, statistics, store
from mixprec.cell import ConfigError
from mixprec.markup import DASH, Document
from mixprec.paired import Answers
from mixprec.published import Printed, PrintedRow
from mixprec.statistics import ALPHA, Interval
from mixprec.store import one_line, write

ORDER = [
    "bf16", "low", "tail4", "head4", "tail8", "head8", "random",
    "weight_error", "output_error", "modelopt", "ours", "fisher", "measured_kl", "high",
]  # fmt: skip

_CAPTION = "Accuracy ± one standard error (percent of BF16, its 95 % interval)."
ABOUT_PACKAGED_MODEL = (
    "smollm2_135m is SmolLM2-135M-Instruct de-quantized from a Q4_1 GGUF; what is called BF16 is "
    "that, not the published checkpoint."
)
ABOUT_PACKAGED_DOCUMENTS = (
    "lambada_openai is the variant of the packaged documents, whose text has no line breaks; its "
    "number is not comparable with the original's."
)
ABOUT_ENDS = (
    "head: the layers near lm_head (the end of the network); tail: those near the embedding (the "
    "start). This is the report's usage."
)


@dataclass(frozen=True)
class Row:
    """One cell of an experiment: its configuration, and its result or the reason why there is none."""

    path: str
    config: dict
    result: dict | None
    reason: str = ""
    answers: Answers | None = None

    @property
    def label(self) -> str:
        """The row's name: baseline and budget, or the width where there is only one."""
        name, budget, options = (self.config[key] for key in ("baseline", "budget", "options"))
        if name["name"] == "bf16":
            return "BF16"
        how = ", fused" if "fused" in self.config else ""
        how += f", tuned {self.config['tuning']['iters']}" if "tuning" in self.config else ""
        if "target" in self.config:
            return f"{name['name']}, predicted KL ≤ {self.config['target']['kl']:.10g}{how}"
        if budget is None:
            scheme = options["schemes"][0 if name["name"] == "low" else -1]
            return f"{name['name']} ({scheme}){how}"
        seed = f" (seed {self.config['seed']})" if self.config["seed"] else ""
        return f"{name['name']} {budget:.10g}-bit{seed}{how}"

    @property
    def group(self) -> tuple[str, str]:
        """Rows of one table: the same evaluation and options."""
        options = self.config["options"]
        return self.path.split("/")[0], options["name"] if options else "none"

    @property
    def model(self) -> str:
        return self.config["model"]["name"]


def read(root: Path) -> tuple[dict[str, Row], dict[str, list[Row]]]:
    """(all stored cells by path, the rows of every planned experiment)."""
    stored: dict[str, Row] = {}
    for file in sorted(root.glob("*/*/*/*/result.json")):
        path = file.parent.relative_to(root).as_posix()
        try:
            result = store.read(file.parent)
            answers = paired.read(file.parent, result)
            stored[path] = Row(path, result["config"], result, answers=answers)
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = one_line(error).removeprefix("Damaged: ")
            if not why.startswith("result.json"):
                why = f"result.json cannot be read: {why}"
            print(f"{path}: {why}", file=sys.stderr)
    plans = {}
    for file in sorted((root / "plans").glob("*.json")):
        plan = json.loads(file.read_text(encoding="utf-8"))
        plans[plan["experiment"]] = [_planned(root, cell, stored) for cell in plan["cells"]]
    return stored, plans


def _planned(root: Path, cell: dict, stored: dict[str, Row]) -> Row:
    row = stored.get(cell["path"])
    if row is not None and row.result["hash"] == cell["hash"]:
        return row
    if row is not None:
        reason = "stored with another configuration; force=true reruns it"
    elif (root / cell["path"] / "result.json").exists():
        reason = "its result is damaged; `python -m mixprec.verify` says how"
    else:
        state, why = store.unfinished(root / cell["path"])
        reason = {
            "missing": "not run",
            "running": f"not finished: computed by {why}",
            "stale": f"not finished: {why}",
            "preempted": "not finished: preempted",
        }.get(state, f"{state}: {why}")
    return Row(cell["path"], cell["config"], None, reason)


def frame(rows: list[Row], stored: dict[str, Row]) -> pd.DataFrame:
    """One line a cell, numbers as numbers: what the CSV holds and the printed tables are made of."""
    lines = []
    for row in rows:
        line = {
            "row": row.label,
            "model": row.model,
            "eval": row.group[0],
            "options": row.group[1],
            "baseline": row.config["baseline"]["name"],
            "budget": row.config["budget"],
            "target_kl": row.config.get("target", {}).get("kl", math.nan),
            "path": row.path,
            "reason": row.reason,
        }
        lines.append(line | _numbers(row, stored))
    table = pd.DataFrame(lines)
    order = {name: place for place, name in enumerate(ORDER)}
    table["_order"] = table.baseline.map(lambda name: order.get(name, len(order)))
    table = table.sort_values(["eval", "model", "_order", "budget", "target_kl"], ignore_index=True)
    return _compared(table.drop(columns="_order"), stored)


def printed_frame(
    table: Printed, stored: dict[str, Row], planned: list[Row], evaluation: str | None = None
) -> pd.DataFrame:
    """The cells of one of the report's tables, found by its rows, options and budget; as `frame`.

    Published numbers and the difference to them stand in columns of their own. Models of the report
    that were not run are lines without numbers. `evaluation`: this one only, run or not.
    """
    plan = {row.path: row for row in planned}
    rows = table.rows
    if not any(row.baseline == "bf16" for row in rows):
        rows = [PrintedRow("BF16", "bf16", None, None), *rows]
    run: dict[tuple[str, str], str] = {}  # (evaluation, model) -> options
    for path in [*stored, *plan]:
        of, model, options, cell = path.split("/")
        if options in table.options and cell in {row.folder for row in rows}:
            known = run.get((of, model), options)
            run[of, model] = min(known, options, key=table.options.index)
    lines = []
    for of in [evaluation] if evaluation else sorted({of for of, _ in run}) or [""]:
        others = sorted({model for where, model in run if where == of} - set(table.models))
        for model in [*table.models, *others]:
            options = run.get((of, model), table.options[0])
            for row in rows:
                folder = "none" if row.baseline == "bf16" else options
                path = f"{of}/{model}/{folder}/{row.folder}"
                cell = plan.get(path) or stored.get(path) or Row(path, {}, None, "not run")
                line = {
                    "row": row.name,
                    "model": model,
                    "eval": of,
                    "options": folder,
                    "baseline": row.baseline,
                    "budget": row.budget,
                    "path": path,
                    "reason": cell.reason,
                }
                line |= _numbers(cell, stored)
                lines.append(line | _published(table, line))
    return _compared(pd.DataFrame(lines), stored)


def _published(table: Printed, line: dict) -> dict:
    """What was printed for a line, and the difference to it with its standard error, in accuracy."""
    number = table.number(line["row"], line["model"])
    if number is None:
        return {}
    printed = {"published_acc": float(number.accuracy)}
    if number.percent is not None:
        printed["published_percent"] = float(number.percent)
    if line.get("stderr") is not None:
        printed["difference"] = line["acc"] - float(number.accuracy)
        printed["difference_stderr"] = line["stderr"]
    return printed


def _numbers(row: Row, stored: dict[str, Row]) -> dict:
    result = row.result
    if result is None:
        return {}
    numbers = {key: result["mean"][key] for key in ("acc", "stderr", "n")}
    if row.answers:
        own = statistics.accuracy(row.answers)
        numbers |= {"acc_low": own.low, "acc_high": own.high}
    percent = _percent_of_bf16(row, stored.get(result["recovery"]["reference"]))
    if percent:
        numbers |= {
            "percent_of_bf16": percent.value,
            "percent_low": percent.low,
            "percent_high": percent.high,
            "percent_stderr": percent.stderr,
        }
    numbers |= {key: result[key] for key in ("realised_bits", "realised_bits_with_scales")}
    for task, metric in result["metrics"].items():
        numbers |= {f"{task}_{key}": metric[key] for key in ("acc", "stderr", "n")}
    if result["kl"]:
        of_text = statistics.kl(result)
        numbers |= {f"kl_{key}": result["kl"][key] for key in ("mean", "stderr", "tokens")}
        numbers |= {"kl_low": of_text.low, "kl_high": of_text.high}
        numbers |= {key: result["kl"][key] for key in ("top1", "top1_stderr")}
    return numbers


def _percent_of_bf16(row: Row, reference: Row | None) -> Interval | None:
    """Percent of the reference's accuracy; with an interval where answers were kept."""
    if reference is None or not reference.result["mean"]["acc"]:
        return None
    ours, theirs = (
        {key: one.config["eval"][key] for key in ("tasks", "source", "limit", "seed")}
        for one in (row, reference)
    )
    if ours != theirs or row.config["model"] != reference.config["model"]:
        return None  # other documents or another model: no percentage at all
    ratio = row.result["mean"]["acc"] / reference.result["mean"]["acc"]
    if row.answers and reference.answers and row.path != reference.path:
        try:
            part = statistics.recovery(row.answers, reference.answers)
            ends = [
                None if end is None else 100 * end for end in (part.low, part.high, part.stderr)
            ]
            return Interval(100 * part.value, *ends)
        except ValueError as error:
            print(f"{row.path}: {one_line(error)}", file=sys.stderr)
    return Interval(100 * ratio, None, None, None)


@dataclass(frozen=True)
class Pair:
    """One cell less another: accuracy (a fraction) and KL (nats per token), as far as they are paired."""

    accuracy: Interval | None
    p: float | None
    needed: int | None  # documents a task
    kl: Interval | None
    kl_p: float | None
    unpaired: tuple[str, ...]  # why not


def pair(one: Row, other: Row) -> Pair:
    accuracy = p = needed = kl = kl_p = None
    unpaired = []
    try:
        if one.answers is None or other.answers is None:
            raise ValueError("accuracy not paired: no correct.json")
        accuracy = statistics.difference(one.answers, other.answers)
        p = statistics.p_value(one.answers, other.answers)
        needed = statistics.documents_needed(one.answers, other.answers)
    except ValueError as error:
        unpaired.append(str(error))
    try:
        kl = statistics.kl_difference(one.result, other.result)
        kl_p = statistics.kl_p_value(one.result, other.result)
    except ValueError as error:
        unpaired.append(str(error))
    return Pair(accuracy, p, needed, kl, kl_p, tuple(unpaired))


def _corrected(p_values: list[float | None]) -> list[float | None]:
    """Holm's correction over those that are known."""
    corrected = iter(statistics.holm([p for p in p_values if p is not None]))
    return [None if p is None else next(corrected) for p in p_values]


def _compared(table: pd.DataFrame, stored: dict[str, Row]) -> pd.DataFrame:
    """`table` with what is told about rules of one budget and options.

    best, best_kl: the highest accuracy and the lowest KL of at least two. minus_ours, kl_minus_ours:
    the difference to `ours`, with _low, _high, and _p after Holm's correction over all of one evaluation.
    """
    if table.empty:
        return table
    table = table.assign(best=False, best_kl=False)
    budgeted = table[_column(table, "acc").notna() & _column(table, "budget").notna()]
    compared: dict[str, list[tuple[int, Pair]]] = {}
    for (of, model, options, budget), cells in budgeted.groupby(
        ["eval", "model", "options", "budget"], sort=False
    ):
        if len(cells) < 2:
            continue
        table.loc[cells.index[cells.acc == cells.acc.max()], "best"] = True
        kl = _column(cells, "kl_mean")
        if kl.notna().sum() > 1:
            table.loc[cells.index[kl == kl.min()], "best_kl"] = True
        ours = f"{of}/{model}/{options}/ours-{budget:.10g}"
        if ours in set(cells.path):
            compared.setdefault(of, []).extend(
                (place, pair(stored[path], stored[ours]))
                for place, path in cells.path.items()
                if path != ours
            )
    for pairs in compared.values():
        corrected = _corrected([one.p for _, one in pairs])
        kl_corrected = _corrected([one.kl_p for _, one in pairs])
        for (place, one), p, kl_p in zip(pairs, corrected, kl_corrected, strict=True):
            for name, interval, held in (
                ("minus_ours", one.accuracy, p),
                ("kl_minus_ours", one.kl, kl_p),
            ):
                if interval is not None:
                    columns = [name, f"{name}_low", f"{name}_high", f"{name}_p"]
                    values = [interval.value, interval.low, interval.high, held]
                    table.loc[place, columns] = [math.nan if v is None else v for v in values]
            table.loc[place, "documents_needed"] = math.nan if one.needed is None else one.needed
    return table


def report_table(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and, in brackets, percent of BF16: rows are rules, columns are models."""
    cells = table.assign(text=[_accuracy(line) for _, line in table.iterrows()])
    rows = list(dict.fromkeys(cells.row))
    return (
        cells.pivot_table(index="row", columns="model", values="text", aggfunc="first", sort=False)
        .reindex(rows)
        .fillna(DASH)
        .rename_axis(index=None, columns=None)
    )


def layout(part: pd.DataFrame, table: Printed) -> pd.DataFrame:
    """One evaluation in the report's rows and columns: reproduced, published, difference."""
    cells = {(line["row"], line["model"]): line for _, line in part.iterrows()}
    models = list(dict.fromkeys(part.model))
    lines = []
    for row in table.rows:
        of_row = [cells[row.name, model] for model in models]
        lines.append((row.name, [_accuracy(line) for line in of_row]))
        if table.numbers:
            lines.append(("· published", [_as_printed(line) for line in of_row]))
        if any(pd.notna(line.get("difference")) for line in of_row):
            differences = [
                _points(line.get("difference"), line.get("difference_stderr")) for line in of_row
            ]
            lines.append(("· difference", differences))
    return pd.DataFrame([line for _, line in lines], [name for name, _ in lines], models)


def detail_table(table: pd.DataFrame) -> pd.DataFrame:
    """One model's cells with everything that qualifies them: errors, KL, bits both ways, tasks."""
    tasks = [c.removesuffix("_acc") for c in table.columns if c.endswith("_acc")]
    tasks = [task for task in tasks if f"{task}_n" in table]  # not published_acc
    lines = []
    for _, row in table.iterrows():
        line = {"": row["row"], "mean": _accuracy(row), "KL": _divergence(row)}
        line["top-1"] = markup.plus_minus(row.get("top1"), row.get("top1_stderr"), 3)
        line["bits"] = markup.number(row.get("realised_bits"), 3)
        line["with scales"] = markup.number(row.get("realised_bits_with_scales"), 3)
        for task in tasks:
            line[task] = markup.plus_minus(row.get(f"{task}_acc"), row.get(f"{task}_stderr"), 3)
        lines.append(line)
    return pd.DataFrame(lines).set_index("").rename_axis(None)


def summary(table: pd.DataFrame) -> Document:
    """One evaluation in short: every model's cells, rows of one option set together."""
    pieces = []
    for model, cells in table.groupby("model", sort=False):
        for options, of_options in cells.groupby("options", sort=False):
            part = detail_table(of_options)[["mean", "KL", "bits"]]
            part.insert(0, "options", DASH if options == "none" else options)
            part.insert(0, "model", model)
            pieces.append(part)
    whole = pd.concat(pieces).rename(columns={"mean": "accuracy", "KL": "KL to BF16"})
    if whole.model.nunique() == 1:
        whole = whole.drop(columns="model")
    return [whole, *_marks(table)]


def paired_table(cells: pd.DataFrame, stored: dict[str, Row]) -> tuple[pd.DataFrame, str]:
    """(differences between one model's cells, what is to be said about them); empty if none is paired."""
    rows = [
        (line["row"], stored[line["path"]]) for _, line in cells.iterrows() if not line["reason"]
    ]
    names, pairs = [], []
    for (earlier, one), (later, other) in combinations(rows, 2):
        names.append(f"{later} − {earlier}")
        pairs.append(pair(other, one))
    if not any(one.accuracy or one.kl for one in pairs):
        return pd.DataFrame(), ""
    corrected, kl_corrected = (
        _corrected([getattr(one, name) for one in pairs]) for name in ("p", "kl_p")
    )
    lines = [
        {
            "accuracy": _differs(one.accuracy and markup.points(one.accuracy), p),
            "p": markup.p_value(p),
            "n needed": DASH if one.needed is None else f"{one.needed:,}",
            "KL": _differs(
                one.kl and markup.interval(one.kl.value, one.kl.low, one.kl.high, 3, 3, "+"), kl_p
            ),
        }
        for one, p, kl_p in zip(pairs, corrected, kl_corrected, strict=True)
    ]
    counts = [
        f"{sum(p < ALPHA for p in known)} of {len(known)} ({what})"
        for what, ps in (("accuracy", corrected), ("KL", kl_corrected))
        if (known := [p for p in ps if p is not None])
    ]
    note = (
        "Differences of the same documents (accuracy, percentage points) and of the same sequences (KL, nats per token), "
        "with 95 % intervals. p: of accuracy, after Holm's correction over this table. *: p < 0.05, as are "
        f"{', '.join(counts)}. n needed: documents a task that would show a difference of accuracy as large as this one "
        "in 4 of 5 samples."
    )
    unpaired = {text for one in pairs for text in one.unpaired}
    note += "".join(f" {text[0].upper()}{text[1:]}." for text in sorted(unpaired))
    return pd.DataFrame(lines, names), note


def document(title: str, table: pd.DataFrame, stored: dict[str, Row] | None = None) -> Document:
    """A section for every evaluation: accuracies, then the details of each model.

    `stored`: the cells to pair with each other; None: do not.
    """
    items: Document = [f"# {title}"]
    for evaluation, of_evaluation in table.groupby("eval", sort=False):
        options = [name for name in dict.fromkeys(of_evaluation.options) if name != "none"]
        for name in options or ["none"]:
            part = of_evaluation[of_evaluation.options.isin([name, "none"])]
            items += [f"## {evaluation}, {name}", _CAPTION, report_table(part)]
            items += _marks(of_evaluation)
            for _, cells in part.groupby("model", sort=False):
                items += _details(cells, stored)
            items += _reasons(part) + [f"- {note}" for note in _notes(part)]
    return items


def markdown(title: str, table: pd.DataFrame, stored: dict[str, Row] | None = None) -> str:
    return markup.markdown(document(title, table, stored))


def printed_document(table: Printed, cells: pd.DataFrame, stored: dict[str, Row]) -> Document:
    """One of the report's tables: a section for every evaluation."""
    items: Document = [f"# {table.title}"]
    for _, part in cells.groupby("eval", sort=False):
        items += section(table, part, stored)
    return items


def section(table: Printed, part: pd.DataFrame, stored: dict[str, Row]) -> Document:
    """One evaluation of one of the report's tables."""
    part = part.dropna(axis="columns", how="all")
    caption = _CAPTION
    if table.numbers:
        caption += (
            " published: as printed, for all documents and without an uncertainty; difference: percentage points of "
            "accuracy, ± the reproduced number's standard error alone."
        )
    items: Document = [f"## {part['eval'].iloc[0] or 'no evaluation yet'}", caption]
    items += [layout(part, table), *_marks(part)]
    finished = set(part.model[_column(part, "acc").notna()])
    idle = [
        model
        for model, cells in part.groupby("model", sort=False)
        if model not in finished and set(cells.reason) == {"not run"}
    ]
    if idle:
        items.append(f"Not run here: {', '.join(idle)}.")
    if part.empty or not finished:
        items.append(
            f"To run it: `python run.py -m experiment={table.name}`, with `model=NAME` for one model."
        )
    busy = part[~part.model.isin(idle)]
    for _, cells in busy.groupby("model", sort=False):
        items += _details(cells, stored)
    items += _reasons(busy)
    for model, cells in busy[busy.options != "none"].groupby("model", sort=False):
        options = cells.options.iloc[0]
        if options != table.options[0] and table.numbers:
            items.append(f"- {model}: options {options} where the report has {table.options[0]}.")
    if table.numbers and table.budget is not None:
        items.append(
            f"- Printed under {table.average_bits:g} average bits; run at {table.budget:g}, because options of "
            f"{' and '.join(map(str, table.bits))} bits cannot average {table.average_bits:g}."
        )
    return items + [f"- {note}" for note in _notes(part)]


def _details(cells: pd.DataFrame, stored: dict[str, Row] | None) -> Document:
    """One model: its numbers with all that qualifies them, and which of them differ."""
    items: Document = [f"### {cells.model.iloc[0]}: ± one standard error"]
    items += [detail_table(cells), _sizes(cells)]
    if stored is not None:
        differences, note = paired_table(cells, stored)
        if note:
            items += [differences, note]
    return items


def _marks(table: pd.DataFrame) -> list[str]:
    """What bold and * mean in one evaluation of a table, and what cannot be told."""
    if _column(table, "acc").isna().all():
        return []
    bold = ["Bold: the best of its options and budget."] if _column(table, "best").any() else []
    known = {
        what: p.dropna()
        for what, name in (("accuracy", "minus_ours_p"), ("KL", "kl_minus_ours_p"))
        if (p := _column(table, name)).notna().any()
    }
    if not known:
        sign = "Nothing is compared with `ours`: no other rule of its options and budget is paired with it."
    else:
        counts = " and ".join(
            f"{sum(p < ALPHA)} of {len(p)} in {what}" for what, p in known.items()
        )
        sign = (
            "*: differs from `ours` of the same options and budget, at the 5 % level after Holm's correction over all "
            f"such comparisons of this table: {counts}."
        )
        untold = [what for what, p in known.items() if not any(p < ALPHA)]
        if untold:
            sign += f" So no rule can be told from `ours` by its {' or '.join(untold)}."
    return [" ".join([*bold, sign])]


def _reasons(part: pd.DataFrame) -> list[str]:
    return [
        f"- {DASH} {row.model}, {row.row}: {row.reason}" for row in part.itertuples() if row.reason
    ]


def _sizes(cells: pd.DataFrame) -> str:
    """How many documents and tokens the numbers above stand on."""
    finished = cells[_column(cells, "acc").notna()]
    if finished.empty:
        return "No finished cell."
    first = finished.iloc[0]
    counts = [
        f"{column.removesuffix('_n')} {int(first[column])}"
        for column in cells.columns
        if column.endswith("_n") and pd.notna(first[column])
    ]
    text = f"n: {', '.join(counts)} documents"
    if pd.notna(first.get("kl_tokens")):
        text += f"; KL in nats per token over {int(first['kl_tokens'])} tokens of other text"
    return text + "."


def _notes(table: pd.DataFrame) -> list[str]:
    notes = []
    if "smollm2_135m" in set(table.model):
        notes += [ABOUT_PACKAGED_MODEL, ABOUT_PACKAGED_DOCUMENTS]
    if table.baseline.str.match("head|tail").any():
        notes.append(ABOUT_ENDS)
    return notes


def render(
    root: Path, experiments: Path = published.EXPERIMENTS, only: str | None = None
) -> dict[str, pd.DataFrame]:
    """Write and print every table and the audit; returns the tables by name, none if nothing is stored.

    only: print this table alone. Raises ConfigError if there is none of this name, or if what the
    report printed cannot be read.
    """
    printed = published.read(experiments)
    stored, plans = read(root)
    if not stored and not plans:
        return {}
    tables, documents = {}, {}
    for name, table in printed.items():
        cells = printed_frame(table, stored, plans.get(name, []))
        if cells.empty:
            continue  # neither printed nor run
        tables[name], documents[name] = cells, printed_document(table, cells, stored)
    for name, rows in plans.items():
        if name not in printed and rows:
            tables[name] = frame(rows, stored)
            documents[name] = document(name, tables[name], stored)
    seen = {path for table in tables.values() for path in table.path}
    others = [row for path, row in stored.items() if path not in seen]
    if only and only not in documents:
        raise ConfigError(f"only={only}: accepted: {', '.join(documents)}")
    for name, items in documents.items():
        text = _write_document(root, name, items)
        if only in (None, name):
            print(text)
    if others and not only:
        print(markdown("Cells of no table above", frame(others, stored)))
    if stored:
        tables["all"] = frame(list(stored.values()), stored)
        _write_document(root, "all", document("all", tables["all"]))
    for name, table in tables.items():
        write(
            root / "tables" / f"{name}.csv",
            lambda path, table=table: table.to_csv(path, index=False),
        )
    text = audit.markdown(printed)
    _write(root, "audit.md", text)
    if not only:
        print(text)
    return tables


def _write_document(root: Path, name: str, items: Document) -> str:
    """Write it as Markdown and as LaTeX; returns the Markdown."""
    text = markup.markdown(items)
    _write(root, f"{name}.md", text)
    _write(root, f"{name}.tex", markup.latex(items, name))
    return text


def _write(root: Path, name: str, text: str) -> None:
    write(root / "tables" / name, lambda path: path.write_text(text, encoding="utf-8"))


_REPRODUCED = re.compile(
    r"(?P<open><!-- reproduced: (?P<table>\S+) (?P<evaluation>\S+) -->\n).*?(?P<close><!-- /reproduced -->)",
    re.DOTALL,
)


def with_reproduced(text: str, root: Path, experiments: Path = published.EXPERIMENTS) -> str:
    """A README's `text` with the tables of `root` between its markers.

    `<!-- reproduced: TABLE EVALUATION -->` … `<!-- /reproduced -->`; the TABLE `all` is a summary of every
    cell of an evaluation. Raises ConfigError for an unknown table.
    """
    printed = published.read(experiments)
    stored, plans = read(root)

    def one(match: re.Match) -> str:
        name, evaluation = match["table"], match["evaluation"]
        if name == "all":
            cells = [row for path, row in stored.items() if path.split("/")[0] == evaluation]
            body = markup.markdown(summary(frame(cells, stored))) if cells else "Not run here.\n"
            return f"{match['open']}{body}{match['close']}"
        if name not in printed:
            raise ConfigError(f"reproduced: {name}: accepted: all, {', '.join(printed)}")
        cells = printed_frame(printed[name], stored, plans.get(name, []), evaluation)
        items = section(printed[name], cells, stored) if len(cells) else ["Not run here."]
        return f"{match['open']}{markup.markdown(items)}{match['close']}"

    return _REPRODUCED.sub(one, text)


def readmes(experiments: Path = published.EXPERIMENTS) -> list[Path]:
    """The README files that may hold reproduced tables."""
    return [experiments.parent / "README.md", *sorted(experiments.glob("*/README.md"))]


def refresh_readmes(root: Path, experiments: Path = published.EXPERIMENTS) -> None:
    """Put the tables of `root` between the markers of every README that has some."""
    for file in readmes(experiments):
        before = file.read_text(encoding="utf-8")
        after = with_reproduced(before, root, experiments)
        if after != before:
            write(file, lambda path, text=after: path.write_text(text, encoding="utf-8"))


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    return table[name] if name in table else pd.Series(None, index=table.index, dtype=float)


def _accuracy(line: pd.Series) -> str:
    """As `0.4123 ± 0.0110 (97.9 %, 95–101)`, bold if the best, with a * if not that of `ours`."""
    if markup.absent(line.get("acc")):
        return DASH
    text = markup.plus_minus(line["acc"], line.get("stderr"), 4)
    ends = [line.get(f"percent_{name}") for name in ("of_bf16", "low", "high")]
    text += f" ({markup.percent(*ends)})"
    return markup.marked(text, best=bool(line["best"]), differs=_held(line, "minus_ours_p"))


def _divergence(line: pd.Series) -> str:
    """KL, as `0.5227 (0.446–0.605)`; ± its standard error where the sequences' own were not kept."""
    low, high = line.get("kl_low"), line.get("kl_high")
    if markup.absent(low):
        text = markup.plus_minus(line.get("kl_mean"), line.get("kl_stderr"), 4)
    else:
        text = markup.interval(line["kl_mean"], low, high, 4, 3)
    return markup.marked(text, best=bool(line["best_kl"]), differs=_held(line, "kl_minus_ours_p"))


def _differs(text: str | None, p: float | None) -> str:
    return (
        DASH
        if text is None
        else markup.marked(text, best=False, differs=p is not None and p < ALPHA)
    )


def _held(line: pd.Series, name: str) -> bool:
    return not markup.absent(line.get(name)) and line[name] < ALPHA


def _as_printed(line: pd.Series) -> str:
    if markup.absent(line.get("published_acc")):
        return DASH
    percent = line.get("published_percent")
    shown = "" if markup.absent(percent) else f" ({markup.percent(percent)})"
    return f"{line['published_acc']:.4f}{shown}"


def _points(value: float | None, error: float | None) -> str:
    """A difference in percentage points with its standard error; never the one without the other."""
    if markup.absent(value) or markup.absent(error):
        return DASH
    return markup.plus_minus(100 * value, 100 * error, 2, "+")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.tables", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--track", choices=["off", "offline", "online"], default="off",
                        help="log the tables to W&B as a run of their own (default: off)")  # fmt: skip
    parser.add_argument("--only", metavar="NAME", help="print this table alone, such as demo")
    parser.add_argument("--readme", action="store_true",
                        help="also put the tables between the markers in the README files")  # fmt: skip
    chosen = parser.parse_args(arguments)
    paired.keep(chosen.results)
    try:
        tables = render(chosen.results, only=chosen.only)
        if chosen.readme:
            refresh_readmes(chosen.results)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not tables:
        print(audit.markdown(published.read()))
        print(
            f"no results in {chosen.results}/ yet: run `make demo` or `python run.py`",
            file=sys.stderr,
        )
        return 1
    print(f"written: {chosen.results}/tables/ ({', '.join(tables)})")
    if chosen.track != "off":
        from mixprec.cell import Tracking
        from mixprec.tracking import log_tables

        log_tables(tables, Tracking(mode=chosen.track, project="mixprec"), str(chosen.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
