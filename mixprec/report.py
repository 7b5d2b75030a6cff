"""One page that says which allocation is better, by how much, and whether the data can tell.

`python -m mixprec.report` reads `results/` (and `experiments/`, for what was published) and nothing else: no model, no
torch, no network. It writes results/report.html, one file that asks for nothing, and the same figures
for a paper in results/figures/.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

import jinja2
import pandas as pd

from mixprec import audit, charts, figures, markup, published, statistics, tables
from mixprec.cell import ConfigError
from mixprec.markup import DASH
from mixprec.published import Printed
from mixprec.sections import OWN, Line, Section, accuracy, sections
from mixprec.statistics import Interval
from mixprec.store import one_line, write
from mixprec.tables import Row

# --- what stands in the page beside its sections ----------------------------------------------


def report_tables(
    stored: dict[str, Row], plans: dict[str, list[Row]], printed: dict[str, Printed]
) -> list[dict]:
    """The report's tables, reproduced beside what was printed: models are columns."""
    questions = {(f.table, f.row, f.model): "; ".join(f.reasons) for f in audit.findings(printed)}
    found = []
    for name, table in printed.items():
        frame = tables.printed_frame(table, stored, plans.get(name, []))
        if frame.empty:
            continue
        parts = []
        for evaluation, part in frame.groupby("eval", sort=False):
            models = list(dict.fromkeys(part.model))
            cells = {(line["row"], line["model"]): line for line in part.to_dict("records")}
            rows = [
                (row.name, [_printed_cell(cells[row.name, m], table, questions) for m in models])
                for row in table.rows
            ]  # fmt: skip
            options = dict(zip(part.model, part.options, strict=True))
            others = {m: o for m, o in options.items() if o not in ("none", table.options[0])}
            parts.append({"evaluation": evaluation, "models": models, "rows": rows, "others": others})  # fmt: skip
        notes = [text for (of, row, model), text in questions.items() if of == name and not model]
        found.append({"table": table, "parts": parts, "notes": notes})
    return found


def _printed_cell(line: dict, table: Printed, questions: dict) -> dict:
    """line: of tables.printed_frame."""
    line = {key: None if pd.isna(value) else value for key, value in line.items()}
    return {
        "accuracy": accuracy(line),
        "percent": line.get("percent_of_bf16"),
        "reason": line["reason"],
        "published": table.number(line["row"], line["model"]),
        "question": questions.get((table.name, line["row"], line["model"]), ""),
    }


def faults(results: Path) -> list[tuple[str, str]]:
    """(path, what is wrong with it) of every cell that has no result or whose last run failed."""
    found = {}
    for file in sorted(results.glob("*/*/*/*/status.json")):
        path = file.parent.relative_to(results).as_posix()
        has_result = (file.parent / "result.json").is_file()
        try:
            status = json.loads(file.read_text(encoding="utf-8"))
            state, error = status.get("state"), status.get("error")
        except (OSError, ValueError, AttributeError):
            state, error = "unreadable", "status.json cannot be read"
        if state == "failed":
            kept = "; the result shown is an earlier run's" if has_result else ""
            found[path] = f"failed: {error}{kept}"
        elif not has_result:
            found[path] = error or f"not finished ({state})"
    for file in sorted(results.glob("*/*/*/*/result.json")):
        path = file.parent.relative_to(results).as_posix()
        try:
            json.loads(file.read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            found[path] = f"result.json cannot be read: {one_line(error)}"
    return list(found.items())


def provenance(lines: list[Line]) -> list[tuple[str, list[tuple[str, int]]]]:
    """(what, its distinct values with how many cells have each) over everything that is shown."""
    seen: dict[str, Counter] = {}

    def note(key: str, value: object) -> None:
        seen.setdefault(key, Counter())[DASH if value in (None, "") else str(value)] += 1

    for line in {line.row.path: line for line in lines}.values():
        kept = line.row.result.get("provenance") or {}
        git, hardware = kept.get("git") or {}, kept.get("hardware") or {}
        dirty = " with changes" if git.get("dirty") else ""
        note("code", f"{str(git['commit'])[:12]}{dirty}" if git.get("commit") else None)
        note("hardware", ", ".join(
            [f"{hardware.get('cores')} × {hardware.get('cpu')}", *map(str, hardware.get("gpus") or [])]
        ) if hardware else None)  # fmt: skip
        note("device, arithmetic", ", ".join(str(kept[k]) for k in ("device", "arithmetic") if kept.get(k)))  # fmt: skip
        note("Python", kept.get("python"))
        for package, version in (kept.get("packages") or {}).items():
            note(package, version)
        note(f"weights of {line.row.model}", str(kept.get("model_hash") or "")[:16])
        note("held-out text", str(kept.get("heldout_text") or "")[:16])
        for task, digest in (kept.get("documents") or {}).items():
            note(f"documents of {task} in {line.row.group[0]}", str(digest)[:16])
    return [(key, values.most_common()) for key, values in seen.items()]


# --- numbers as text --------------------------------------------------------------------------


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    value = round(value, digits) + 0.0  # not −0.00
    sign = sign and value != 0
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def roughly(count: int) -> str:
    """Two digits of a number that is as uncertain as what it was made of: 9067 as 9,100."""
    return f"{round(count, 2 - len(str(count))):,}"


def span(one: Interval | None, digits: int = 3, scale: float = 1) -> str:
    """`0.35–0.41`, or `−1.2 to 2.3` where a dash would be read as a sign."""
    if one is None or one.low is None:
        return ""
    low, high = (number(scale * end, digits) for end in (one.low, one.high))
    if low == high:
        return ""  # BF16's own KL
    return f"{low} to {high}" if "−" in low + high else f"{low}–{high}"


def with_span(one: Interval | None, digits: int = 3, scale: float = 1, sign: bool = False) -> str:
    """A value and, in brackets, its 95 % interval."""
    if one is None:
        return DASH
    text, within = number(scale * one.value, digits, sign), span(one, digits, scale)
    return f"{text} ({within})" if within else text


def key(value) -> str:
    """What a table is sorted by: the number in full, or nothing where there is none."""
    value = value.value if isinstance(value, Interval) else value
    return "" if value is None or not math.isfinite(value) else f"{float(value):.10g}"


# --- page -------------------------------------------------------------------------------------


def page(results: Path, experiments: Path = published.EXPERIMENTS) -> tuple[str, list[Section]]:
    """(the whole page, its sections); no page if nothing is stored, planned or failed.

    Everything is escaped but this project's own style sheet and script.
    """
    printed = published.read(experiments)
    stored, plans = tables.read(results)
    made, trouble = sections(results, stored, plans, printed), faults(results)
    if not made and not trouble:
        return "", []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals.update(
        # numbers as text
        number=number, span=span, with_span=with_span, roughly=roughly, key=key, p_value=markup.p_value,
        # figures
        axis=charts.axis, ends=charts.ends, look=charts.look, level=charts.level, short=charts.short,
        by_bits=charts.by_bits, forest=charts.forest, times=charts.times, grid=charts.Grid.of_section,
        heat_maps=charts.heat_maps, agreement=charts.agreement, layer_scores=charts.layer_scores,
        measured_against_predicted=charts.measured_against_predicted,
        MARKS=charts.MARKS, STAGES=charts.STAGES, CELL=(charts.CELL_WIDTH, charts.CELL_HEIGHT),
        OWN=OWN, DASH=DASH, ALPHA=statistics.ALPHA,
    )  # fmt: skip
    environment.filters["ends"] = charts.ends
    css = environment.get_template("report.css").render(look={**charts.LOOK, "other": charts.OTHER})
    script = environment.get_template("report.js").render()
    lines = [line for section in made for line in section.done]
    text = environment.get_template("report.html").render(
        made=made, lead=next((section for section in made if section.best), None),
        tables=report_tables(stored, plans, printed), audit=audit.findings(printed),
        faults=trouble, missing=_missing(made),
        provenance=provenance(lines), cells=len({line.row.path for line in lines}),
        css=css, script=script, css_hash=_hash(css), script_hash=_hash(script),
        about_ends=tables.ABOUT_ENDS,
        packaged=[tables.ABOUT_PACKAGED_MODEL, tables.ABOUT_PACKAGED_DOCUMENTS],
    )  # fmt: skip
    return text, made


def _missing(made: list[Section]) -> list[tuple[str, str]]:
    """(path, why) of the cells that were planned and have no result."""
    rows = {line.row.path: line.row.reason for s in made for line in s.lines if not line.done}
    return sorted(rows.items())


def _hash(text: str) -> str:
    """Of an inline style sheet or script, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render(results: Path, experiments: Path = published.EXPERIMENTS) -> list[Path]:
    """Write the page and its figures; the files written, none if nothing is stored or planned."""
    text, made = page(results, experiments)
    if not text:
        return []
    file = results / "report.html"
    write(file, lambda path: path.write_text(text, encoding="utf-8"))
    return [file, *figures.draw(made, results / "figures")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    chosen = parser.parse_args(arguments)
    try:
        written = render(chosen.results)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not written:
        print(f"no results in {chosen.results}/ yet: run `make demo` or `python run.py`", file=sys.stderr)  # fmt: skip
        return 1
    print(f"written: {written[0]} ({written[0].stat().st_size / 1e6:.2f} MB), and {len(written) - 1} files in {chosen.results}/figures/")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
