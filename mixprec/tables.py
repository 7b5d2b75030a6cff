"""pandas: results on disk -> the report's tables. Reads `results/` and nothing else.

`python -m mixprec.tables` renders every experiment that was ever planned there, and one table of all
cells, as Markdown and CSV in results/tables/ and on the terminal.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mixprec.store import one_line, write

DASH = "—"
_ORDER = ["bf16", "low", "tail4", "head4", "tail8", "head8", "random", "ours", "high"]

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

    @property
    def label(self) -> str:
        """The row's name: baseline and budget, or the width where there is only one."""
        name, budget, options = (self.config[key] for key in ("baseline", "budget", "options"))
        if name["name"] == "bf16":
            return "BF16"
        tuned = f", tuned {self.config['tuning']['iters']}" if "tuning" in self.config else ""
        if budget is None:
            scheme = options["schemes"][0 if name["name"] == "low" else -1]
            return f"{name['name']} ({scheme}){tuned}"
        seed = f" (seed {self.config['seed']})" if self.config["seed"] else ""
        return f"{name['name']} {budget:.10g}-bit{seed}{tuned}"

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
            result = json.loads(file.read_text(encoding="utf-8"))
            stored[path] = Row(path, result["config"], result)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{path}: result.json cannot be read: {one_line(error)}", file=sys.stderr)
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
    else:
        try:
            status = json.loads((root / cell["path"] / "status.json").read_text())
            reason = f"failed: {status['error']}" if "error" in status else "not finished"
        except (OSError, ValueError):
            reason = "not run"
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
            "reason": row.reason,
        }
        if row.result is not None:
            line |= _numbers(row.result, stored)
        lines.append(line)
    table = pd.DataFrame(lines)
    order = {name: place for place, name in enumerate(_ORDER)}
    table["_order"] = table.baseline.map(lambda name: order.get(name, len(order)))
    table = table.sort_values(["eval", "model", "_order", "budget"], ignore_index=True)
    return table.drop(columns="_order")


def _numbers(result: dict, stored: dict[str, Row]) -> dict:
    reference = stored.get(result["recovery"]["reference"])
    accuracy = result["mean"]["acc"]
    numbers = {
        "acc": accuracy,
        "stderr": result["mean"]["stderr"],
        "n": result["mean"]["n"],
        "percent_of_bf16": (
            100 * accuracy / reference.result["mean"]["acc"]
            if reference is not None and reference.result["mean"]["acc"]
            else None
        ),
        "realised_bits": result["realised_bits"],
        "realised_bits_with_scales": result["realised_bits_with_scales"],
    }
    for task, metric in result["metrics"].items():
        numbers |= {f"{task}_{key}": metric[key] for key in ("acc", "stderr", "n")}
    if result["kl"]:
        numbers |= {f"kl_{key}": result["kl"][key] for key in ("mean", "stderr", "tokens")}
        numbers |= {key: result["kl"][key] for key in ("top1", "top1_stderr")}
    return numbers


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


def detail_table(table: pd.DataFrame) -> pd.DataFrame:
    """One model's cells with everything that qualifies them: standard errors, KL, bits both ways."""
    tasks = [c.removesuffix("_acc") for c in table.columns if c.endswith("_acc")]
    lines = []
    for _, row in table.iterrows():
        line = {"": row["row"], "mean": _plus_minus(row, "acc", "stderr")}
        line["% of BF16"] = _percent(row.get("percent_of_bf16"))
        for task in tasks:
            line[task] = _plus_minus(row, f"{task}_acc", f"{task}_stderr", digits=3)
        line["KL"] = _plus_minus(row, "kl_mean", "kl_stderr")
        line["top-1"] = _plus_minus(row, "top1", "top1_stderr", digits=3)
        line["bits"] = _number(row.get("realised_bits"), 3)
        line["with scales"] = _number(row.get("realised_bits_with_scales"), 3)
        lines.append(line)
    return pd.DataFrame(lines).set_index("").rename_axis(None)


def markdown(title: str, table: pd.DataFrame) -> str:
    """A section for every evaluation: the report's table, then the details of each model."""
    parts = [f"# {title}", ""]
    for evaluation, of_evaluation in table.groupby("eval", sort=False):
        options = [name for name in dict.fromkeys(of_evaluation.options) if name != "none"]
        for name in options or ["none"]:
            part = of_evaluation[of_evaluation.options.isin([name, "none"])]
            parts += [f"## {evaluation}, {name}", "", "Accuracy (percent of BF16)", ""]
            parts += [report_table(part).to_markdown(stralign="left"), ""]
            for model, cells in part.groupby("model", sort=False):
                parts += [f"### {model}: ± one standard error", ""]
                parts += [
                    detail_table(cells).to_markdown(stralign="left", disable_numparse=True),
                    "",
                ]
                parts += [_sizes(cells), ""]
            parts += [
                f"- {DASH} {row.model}, {row.row}: {row.reason}"
                for row in part.itertuples()
                if row.reason
            ]
            parts += [f"- {note}" for note in _notes(part)] + [""]
    return "\n".join(parts).rstrip() + "\n"


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


def render(root: Path) -> dict[str, pd.DataFrame]:
    """Write and print every table; returns them by name."""
    stored, plans = read(root)
    experiments = {name: rows for name, rows in plans.items() if rows}
    if stored:
        experiments["all"] = list(stored.values())
    tables = {}
    for name, rows in experiments.items():
        table = frame(rows, stored)
        text = markdown(name, table)
        write(
            root / "tables" / f"{name}.md",
            lambda path, text=text: path.write_text(text, encoding="utf-8"),
        )
        write(
            root / "tables" / f"{name}.csv",
            lambda path, table=table: table.to_csv(path, index=False),
        )
        if name != "all" or len(experiments) == 1:
            print(text)
        tables[name] = table
    return tables


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    return table[name] if name in table else pd.Series(None, index=table.index, dtype=float)


def _plus_minus(row: pd.Series, value: str, error: str, digits: int = 4) -> str:
    if pd.isna(row.get(value)):
        return DASH
    text = f"{row[value]:.{digits}f}"
    return text if pd.isna(row.get(error)) else f"{text} ± {row[error]:.{digits}f}"


def _percent(value: float | None) -> str:
    return DASH if value is None or pd.isna(value) else f"{value:.1f}%"


def _number(value: float | None, digits: int) -> str:
    return DASH if value is None or pd.isna(value) else f"{value:.{digits}f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.tables", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--track", choices=["off", "offline", "online"], default="off",
                        help="log the tables to W&B as a run of their own (default: off)")  # fmt: skip
    chosen = parser.parse_args(arguments)
    tables = render(chosen.results)
    if not tables:
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
