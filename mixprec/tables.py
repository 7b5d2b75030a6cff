"""pandas: results on disk -> the report's tables. Reads `results/` and `experiments/`, nothing else.

`python -m mixprec.tables` renders the report's tables next to what was published, every other experiment that was
ever planned, one table of all cells, and the audit of the printed tables: as Markdown and CSV in
results/tables/ and on the terminal. With `--readme` it also puts them between the markers in README files.
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

from mixprec import audit, paired, published, store
from mixprec.audit import WIDTH, wrapped
from mixprec.cell import ConfigError
from mixprec.paired import Answers, Estimate
from mixprec.published import Printed, PrintedRow
from mixprec.store import one_line, write

DASH = "—"
ORDER = [
    "bf16", "low", "tail4", "head4", "tail8", "head8", "random",
    "weight_error", "output_error", "modelopt", "ours", "fisher", "measured_kl", "high",
]  # fmt: skip

_ABOUT_PACKAGED_MODEL = (
    "smollm2_135m is SmolLM2-135M-Instruct de-quantized from a Q4_1 GGUF; what is called BF16 is "
    "that, not the published checkpoint."
)
_ABOUT_PACKAGED_DOCUMENTS = (
    "lambada_openai is the variant of the packaged documents, whose text has no line breaks; its "
    "number is not comparable with the original's."
)
_ABOUT_ENDS = (
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
    return table.drop(columns="_order")


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
    return pd.DataFrame(lines)


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
    percent = _percent_of_bf16(row, stored.get(result["recovery"]["reference"]))
    numbers = {
        "acc": result["mean"]["acc"],
        "stderr": result["mean"]["stderr"],
        "n": result["mean"]["n"],
        "percent_of_bf16": percent.value if percent else None,
        "percent_stderr": percent.stderr if percent else None,
        "realised_bits": result["realised_bits"],
        "realised_bits_with_scales": result["realised_bits_with_scales"],
    }
    for task, metric in result["metrics"].items():
        numbers |= {f"{task}_{key}": metric[key] for key in ("acc", "stderr", "n")}
    if result["kl"]:
        numbers |= {f"kl_{key}": result["kl"][key] for key in ("mean", "stderr", "tokens")}
        numbers |= {key: result["kl"][key] for key in ("top1", "top1_stderr")}
    return numbers


def _percent_of_bf16(row: Row, reference: Row | None) -> Estimate | None:
    """Percent of the reference's accuracy; with a standard error where answers were kept."""
    if reference is None or not reference.result["mean"]["acc"]:
        return None
    ours, theirs = (
        {key: one.config["eval"][key] for key in ("tasks", "source", "limit", "seed")}
        for one in (row, reference)
    )
    if ours != theirs or row.config["model"] != reference.config["model"]:
        return None  # other documents or another model: no percentage at all
    ratio = Estimate(row.result["mean"]["acc"] / reference.result["mean"]["acc"], None)
    if row.answers and reference.answers and row.path != reference.path:
        try:
            ratio = paired.recovery(row.answers, reference.answers)
        except ValueError as error:
            print(f"{row.path}: {one_line(error)}", file=sys.stderr)
    return Estimate(100 * ratio.value, None if ratio.stderr is None else 100 * ratio.stderr)


def report_table(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and, in brackets, percent of BF16: rows are rules, columns are models."""
    cells = table.assign(
        text=[
            DASH if pd.isna(acc) else f"{acc:.4f} ({_percent(percent)})"
            for acc, percent in zip(
                _column(table, "acc"), _column(table, "percent_of_bf16"), strict=True
            )
        ]
    )
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
    """One model's cells with everything that qualifies them: standard errors, KL, bits both ways."""
    tasks = [c.removesuffix("_acc") for c in table.columns if c.endswith("_acc")]
    tasks = [task for task in tasks if f"{task}_n" in table]  # not published_acc
    lines = []
    for _, row in table.iterrows():
        line = {"": row["row"], "mean": _plus_minus(row, "acc", "stderr")}
        line["% of BF16"] = _percent(row.get("percent_of_bf16"), row.get("percent_stderr"))
        line["KL"] = _plus_minus(row, "kl_mean", "kl_stderr")
        line["top-1"] = _plus_minus(row, "top1", "top1_stderr", digits=3)
        line["bits"] = _number(row.get("realised_bits"), 3)
        line["with scales"] = _number(row.get("realised_bits_with_scales"), 3)
        for task in tasks:
            line[task] = _plus_minus(row, f"{task}_acc", f"{task}_stderr", digits=3)
        lines.append(line)
    return pd.DataFrame(lines).set_index("").rename_axis(None)


def summary_table(table: pd.DataFrame) -> pd.DataFrame:
    """One evaluation in short: every model's cells, rows of one option set together."""
    pieces = []
    for model, cells in table.groupby("model", sort=False):
        for options, of_options in cells.groupby("options", sort=False):
            part = detail_table(of_options)[["mean", "% of BF16", "KL", "bits"]]
            part.insert(0, "options", DASH if options == "none" else options)
            part.insert(0, "model", model)
            pieces.append(part)
    whole = pd.concat(pieces).rename(columns={"mean": "accuracy", "KL": "KL to BF16"})
    return whole if whole.model.nunique() > 1 else whole.drop(columns="model")


def paired_table(cells: pd.DataFrame, stored: dict[str, Row]) -> tuple[pd.DataFrame, str]:
    """(differences between one model's cells, what is to be said about them); empty if none is paired.

    `*`: more than twice its paired standard error away from zero.
    """
    rows = [
        (line["row"], stored[line["path"]]) for _, line in cells.iterrows() if not line["reason"]
    ]
    lines, clear, unpaired = {}, {"accuracy": [], "KL": []}, set()
    for (earlier, one), (later, other) in combinations(rows, 2):
        line = []
        for what, compare, scale in (
            ("accuracy", _answers_difference, 100),
            ("KL", _kl_difference, 1),
        ):
            try:
                estimate = compare(other, one)
                clear[what].append(estimate.clear)
                line.append(_points(estimate.value, estimate.stderr, scale) + " *" * estimate.clear)
            except ValueError as error:
                unpaired.add(str(error))
                line.append(DASH)
        lines[f"{later} − {earlier}"] = line
    counts = [f"{sum(marks)} of {len(marks)} ({what})" for what, marks in clear.items() if marks]
    if not counts:
        return pd.DataFrame(), ""
    note = (
        "Differences of the same documents (accuracy, percentage points) and of the same sequences (KL, nats per "
        f"token), ± paired standard error. *: more than twice that: {', '.join(counts)}. Where nothing differs, one "
        "in twenty would be marked."
    )
    note += "".join(f" {text[0].upper()}{text[1:]}." for text in sorted(unpaired))
    return pd.DataFrame(lines.values(), list(lines), ["accuracy", "KL"]), note


def _answers_difference(one: Row, other: Row) -> Estimate:
    if one.answers is None or other.answers is None:
        raise ValueError("accuracy not paired: no correct.json")
    return paired.difference(one.answers, other.answers)


def _kl_difference(one: Row, other: Row) -> Estimate:
    return paired.kl_difference(one.result, other.result)


def markdown(title: str, table: pd.DataFrame, stored: dict[str, Row] | None = None) -> str:
    """A section for every evaluation: accuracies, then the details of each model.

    `stored`: the cells to pair with each other; None: do not.
    """
    lines = [f"# {title}", ""]
    for evaluation, of_evaluation in table.groupby("eval", sort=False):
        options = [name for name in dict.fromkeys(of_evaluation.options) if name != "none"]
        for name in options or ["none"]:
            part = of_evaluation[of_evaluation.options.isin([name, "none"])]
            lines += [f"## {evaluation}, {name}", "", "Accuracy (percent of BF16)", ""]
            lines += _grid(report_table(part))
            for _, cells in part.groupby("model", sort=False):
                lines += _details(cells, stored)
            lines += _reasons(part) + [f"- {note}" for note in _notes(part)] + [""]
    return wrapped(lines)


def printed_markdown(table: Printed, cells: pd.DataFrame, stored: dict[str, Row]) -> str:
    """One of the report's tables: a section for every evaluation."""
    lines = [f"# {table.title}", ""]
    for _, part in cells.groupby("eval", sort=False):
        lines += [section(table, part, stored), ""]
    return "\n".join(lines).rstrip() + "\n"


def section(table: Printed, part: pd.DataFrame, stored: dict[str, Row]) -> str:
    """One evaluation of one of the report's tables."""
    part = part.dropna(axis="columns", how="all")
    lines = [f"## {part['eval'].iloc[0] or 'no evaluation yet'}", ""]
    caption = "Accuracy ± one standard error (percent of BF16)."
    if table.numbers:
        caption += (
            " published: as printed, for all documents and without an uncertainty; difference: percentage points of "
            "accuracy, ± the reproduced number's standard error alone."
        )
    lines += [caption, "", *_grid(layout(part, table))]
    finished = set(part.model[_column(part, "acc").notna()])
    idle = [
        model
        for model, cells in part.groupby("model", sort=False)
        if model not in finished and set(cells.reason) == {"not run"}
    ]
    if idle:
        lines += [f"Not run here: {', '.join(idle)}.", ""]
    if part.empty or not finished:
        lines += [
            f"To run it: `python run.py -m experiment={table.name}`, with `model=NAME` for one model.",
            "",
        ]
    busy = part[~part.model.isin(idle)]
    for _, cells in busy.groupby("model", sort=False):
        lines += _details(cells, stored)
    lines += _reasons(busy)
    for model, cells in busy[busy.options != "none"].groupby("model", sort=False):
        options = cells.options.iloc[0]
        if options != table.options[0] and table.numbers:
            lines.append(f"- {model}: options {options} where the report has {table.options[0]}.")
    if table.numbers and table.budget is not None:
        lines.append(
            f"- Printed under {table.average_bits:g} average bits; run at {table.budget:g}, because options of "
            f"{' and '.join(map(str, table.bits))} bits cannot average {table.average_bits:g}."
        )
    lines += [f"- {note}" for note in _notes(part)]
    return wrapped(lines).rstrip()


def _details(cells: pd.DataFrame, stored: dict[str, Row] | None) -> list[str]:
    """One model: its numbers with all that qualifies them, and which of them differ."""
    lines = [f"### {cells.model.iloc[0]}: ± one standard error", ""]
    lines += [*_grid(detail_table(cells)), _sizes(cells), ""]
    if stored is not None:
        differences, note = paired_table(cells, stored)
        if note:
            lines += [*_grid(differences), note, ""]
    return lines


def _grid(table: pd.DataFrame) -> list[str]:
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
        notes += [_ABOUT_PACKAGED_MODEL, _ABOUT_PACKAGED_DOCUMENTS]
    if table.baseline.str.match("head|tail").any():
        notes.append(_ABOUT_ENDS)
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
    tables, texts = {}, {}
    for name, table in printed.items():
        cells = printed_frame(table, stored, plans.get(name, []))
        if cells.empty:
            continue  # neither printed nor run
        tables[name], texts[name] = cells, printed_markdown(table, cells, stored)
    for name, rows in plans.items():
        if name not in printed and rows:
            tables[name] = frame(rows, stored)
            texts[name] = markdown(name, tables[name], stored)
    seen = {path for table in tables.values() for path in table.path}
    others = [row for path, row in stored.items() if path not in seen]
    if only and only not in texts:
        raise ConfigError(f"only={only}: accepted: {', '.join(texts)}")
    for name, text in texts.items():
        _write(root, f"{name}.md", text)
        if only in (None, name):
            print(text)
    if others and not only:
        print(markdown("Cells of no table above", frame(others, stored)))
    if stored:
        tables["all"] = frame(list(stored.values()), stored)
        _write(root, "all.md", markdown("all", tables["all"]))
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
            body = (
                "\n".join(_grid(summary_table(frame(cells, stored)))) if cells else "Not run here."
            )
            return f"{match['open']}{body}\n{match['close']}"
        if name not in printed:
            raise ConfigError(f"reproduced: {name}: accepted: all, {', '.join(printed)}")
        cells = printed_frame(printed[name], stored, plans.get(name, []), evaluation)
        body = section(printed[name], cells, stored) if len(cells) else "Not run here."
        return f"{match['open']}{body}\n{match['close']}"

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


def _plus_minus(row: pd.Series, value: str, error: str, digits: int = 4) -> str:
    if pd.isna(row.get(value)):
        return DASH
    text = f"{round(row[value], digits) + 0.0:.{digits}f}"  # not -0.0000
    return text if pd.isna(row.get(error)) else f"{text} ± {row[error]:.{digits}f}"


def _percent(value: float | None, error: float | None = None) -> str:
    if value is None or pd.isna(value):
        return DASH
    return f"{value:.1f}%" if error is None or pd.isna(error) else f"{value:.1f} ± {error:.1f}%"


def _accuracy(line: pd.Series) -> str:
    """As `0.4123 ± 0.0110 (97.9%)`."""
    if pd.isna(line.get("acc")):
        return DASH
    return f"{_plus_minus(line, 'acc', 'stderr')} ({_percent(line.get('percent_of_bf16'))})"


def _as_printed(line: pd.Series) -> str:
    if pd.isna(line.get("published_acc")):
        return DASH
    percent = line.get("published_percent")
    return f"{line['published_acc']:.4f}" + ("" if pd.isna(percent) else f" ({percent:.1f}%)")


def _points(value: float | None, error: float | None, scale: float = 100) -> str:
    """A difference with its standard error, as percentage points unless `scale` says otherwise.

    Never the one without the other.
    """
    if value is None or error is None or pd.isna(value) or pd.isna(error):
        return DASH
    digits = 2 if scale == 100 else 4
    rounded = round(scale * value, digits) + 0.0  # not -0.00
    return f"{rounded:+.{digits}f} ± {scale * error:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return DASH if value is None or pd.isna(value) else f"{value:.{digits}f}"


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
