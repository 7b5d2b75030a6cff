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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm

from mixprec import audit, charts, paired, predicted, published, statistics, tables
from mixprec.cell import ConfigError
from mixprec.charts import Axis, axis
from mixprec.published import Printed
from mixprec.statistics import Interval
from mixprec.store import one_line, write
from mixprec.tables import DASH, Row

CLEAR = 0.05
STAGES = ("load", "reference", "allocate", "tune", "quantize", "kl", "evaluate")
OWN = "ours"  # what the report calls AutoScheme: every rule is compared with it


# --- what a section holds ---------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One cell of a section, with everything that is printed of it; None where it is not known."""

    row: Row
    accuracy: Interval | None = None
    recovery: Interval | None = None  # 1.0: BF16
    kl: Interval | None = None  # nats per token
    bits: float | None = None
    bits_with_scales: float | None = None
    tasks: dict[str, Interval] = field(default_factory=dict)
    published: tuple[str, float, float | None] | None = None  # where, accuracy, percent of BF16

    @property
    def rule(self) -> str:
        """The row's name without its budget."""
        seed = self.row.config.get("seed")
        return predicted.rule_of(self.row.config) + (f" (seed {seed})" if seed else "")

    @property
    def budget(self) -> str:
        """`5 bits`, `KL ≤ 0.3`, or nothing where the rule needs none."""
        config = self.row.config
        if "target" in config:
            return f"KL ≤ {config['target']['kl']:.10g}"
        return "" if config.get("budget") is None else f"{config['budget']:.10g} bits"

    @property
    def done(self) -> bool:
        return self.row.result is not None


@dataclass(frozen=True)
class Comparison:
    """A rule against AutoScheme (`ours`) on the same documents and the same text, at one budget.

    accuracy and tasks: `line` − `ours`, as fractions; kl: in nats per token; ratio: of the two KL. None where the
    two are not paired. adjusted: Holm's p of the accuracy over all comparisons of the section.
    """

    line: Line
    own: Line
    accuracy: Interval | None
    tasks: dict[str, Interval]
    kl: Interval | None
    ratio: Interval | None
    mcnemar: dict[str, float]
    needed: int | None  # documents a task
    adjusted: float | None = None

    @property
    def budget(self) -> str:
        return self.own.budget

    @property
    def accuracy_clear(self) -> bool:
        return excludes(self.accuracy, 0)

    @property
    def kl_clear(self) -> bool:
        return excludes(self.kl, 0)


@dataclass(frozen=True)
class Section:
    """One evaluation of one model with one set of options."""

    id: str
    evaluation: str
    model: str
    options: str
    schemes: list[str]
    lines: list[Line]
    comparisons: dict[str, list[Comparison]]  # budget -> every other rule
    allocations: dict[str, dict[str, str]]  # path -> layer -> scheme
    scored: list[Any]  # frontier.Scored of this model and these options
    curves: dict[str, pd.DataFrame]  # label -> predicted frontier
    predicted: pd.DataFrame  # predicted.cells of this section

    @property
    def name(self) -> str:
        return f"{self.model} · {self.options} · {self.evaluation}"

    @property
    def done(self) -> list[Line]:
        return [line for line in self.lines if line.done]

    @property
    def reference(self) -> Line | None:
        return next((line for line in self.done if line.rule == "bf16"), None)

    @property
    def rules(self) -> list[str]:
        """Rules with a result, in the order of the tables."""
        return list(dict.fromkeys(line.rule for line in self.done))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for line in self.done for task in line.tasks))

    @property
    def best(self) -> list[Comparison]:
        """At every budget the allocation with the least KL beside AutoScheme's, or else the most accuracy."""

        def key(one: Comparison) -> tuple[float, float]:
            return (
                one.line.kl.value if one.line.kl else math.inf,
                -one.line.accuracy.value if one.line.accuracy else math.inf,
            )

        found = []
        for comparisons in self.comparisons.values():
            rivals = [c for c in comparisons if c.line.budget == c.budget and (c.accuracy or c.kl)]
            found += [min(rivals, key=key)] if rivals else []
        return found

    @property
    def sizes(self) -> str:
        """How many documents and tokens its numbers stand on."""
        counts = {}
        for line in self.done:
            for task, metric in line.row.result["metrics"].items():
                counts.setdefault(task, set()).add(metric.get("n"))
        text = ", ".join(
            f"{task} {' or '.join(map(str, sorted(n - {None})))}" for task, n in counts.items()
        )
        tokens = {
            line.row.result["kl"].get("tokens") for line in self.done if line.row.result.get("kl")
        } - {None}
        kl = f"; KL in nats per token over {' or '.join(map(str, sorted(tokens)))} tokens of other text"
        return f"n: {text} documents" + (kl if tokens else "")

    @cached_property
    def grid(self) -> charts.Grid:
        layers = next(iter(self.allocations.values()), {})
        return charts.Grid.of(list(layers))


def excludes(interval: Interval | None, value: float) -> bool:
    """Is `value` outside the interval? Then the data can tell."""
    return interval is not None and interval.low is not None and not (
        interval.low <= value <= interval.high
    )  # fmt: skip


# --- results -> sections ----------------------------------------------------------------------


def sections(results: Path, printed: dict[str, Printed]) -> list[Section]:
    """Everything that is stored or planned, a section for every evaluation, model and options."""
    stored, plans = tables.read(results)
    rows = dict(stored)
    for planned in plans.values():
        # A cell that is planned otherwise than it is stored has no number here either.
        rows |= {row.path: row for row in planned}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    references: dict[tuple[str, str], Row] = {}
    for row in rows.values():
        evaluation, options = row.group
        if options == "none":
            references[evaluation, row.model] = row
        else:
            groups.setdefault((evaluation, row.model, options), []).append(row)
    for (evaluation, model), row in references.items():  # a BF16 that nothing stands beside yet
        if not any(key[:2] == (evaluation, model) for key in groups):
            groups[evaluation, model, "none"] = [row]
    scored = _scored(results)
    made = []
    for place, ((evaluation, model, options), group) in enumerate(sorted(groups.items())):
        reference = references.get((evaluation, model))
        if options != "none":
            group = [reference or _no_reference(evaluation, model), *group]
        made.append(_section(f"s{place}", evaluation, model, options, group, printed, results, scored))  # fmt: skip
    # What tells most comes first.
    return sorted(made, key=lambda s: -sum(map(len, s.comparisons.values())))


def _no_reference(evaluation: str, model: str) -> Row:
    config = {
        "baseline": {"name": "bf16"},
        "budget": None,
        "options": None,
        "model": {"name": model},
    }
    return Row(f"{evaluation}/{model}/none/bf16", config, None, "not run")


def _section(id, evaluation, model, options, rows, printed, results, scored) -> Section:
    order = {name: place for place, name in enumerate(tables.ORDER)}
    rows = sorted(
        rows,
        key=lambda row: (
            order.get(row.config["baseline"]["name"], len(order)),
            row.config.get("budget") or 0, row.label,
        ),
    )  # fmt: skip
    reference = next((row for row in rows if row.config["baseline"]["name"] == "bf16"), None)
    lines = [_line(row, reference, printed, model, options) for row in rows]
    schemes = next((row.config["options"]["schemes"] for row in rows if row.config["options"]), [])
    done = [row for row in rows if row.result is not None]
    hashes = {(row.result.get("provenance") or {}).get("model_hash") for row in done}
    own = [
        one for one in scored
        if one.model == model and one.model_hash in hashes
        and one.options == [name for name in schemes if name != "bf16"]
    ]  # fmt: skip
    allocations = {row.path: found for row in done if (found := _allocation(results / row.path))}
    return Section(
        id, evaluation, model, options, schemes, lines, _comparisons(lines), allocations,
        own, _curves(own, schemes), _predicted(done),
    )  # fmt: skip


def _line(row: Row, reference: Row | None, printed, model: str, options: str) -> Line:
    where = _published(row, printed, model, options)
    result = row.result
    if result is None:
        return Line(row, published=where)
    metrics = result["metrics"]
    tasks = {task: _normal(m["acc"], m.get("stderr")) for task, m in metrics.items()}
    accuracy = _normal(result["mean"]["acc"], result["mean"].get("stderr"))
    if row.answers:
        accuracy = statistics.accuracy(row.answers)
        for task, right in row.answers.correct.items():
            one = paired.Answers({task: row.answers.documents[task]}, {task: right})
            tasks[task] = statistics.accuracy(one)
    kl = None
    if result.get("kl"):
        kl = _attempt(statistics.kl, result)
        kl = kl or _normal(result["kl"]["mean"], result["kl"].get("stderr"))
    return Line(
        row,
        accuracy=_finite(accuracy),
        recovery=_recovery(row, reference),
        kl=_finite(kl),
        bits=result.get("realised_bits"),
        bits_with_scales=result.get("realised_bits_with_scales"),
        tasks={task: one for task, interval in tasks.items() if (one := _finite(interval))},
        published=where,
    )


def _normal(value: float, stderr: float | None) -> Interval:
    """95 % of a normal distribution: where only a mean and its standard error are stored."""
    if stderr is None:
        return Interval(value, None, None, None)
    return Interval(value, value - norm.ppf(0.975) * stderr, value + norm.ppf(0.975) * stderr, stderr)  # fmt: skip


def _finite(interval: Interval | None) -> Interval | None:
    """Without what is not a number: an estimate that is none is not known, nor is a bound."""
    if interval is None or interval.value is None or not math.isfinite(interval.value):
        return None
    if any(end is None or not math.isfinite(end) for end in (interval.low, interval.high)):
        return Interval(interval.value, None, None, None)
    return interval


def _attempt(compare, *what):
    """`compare(*what)`, or None where the two are not paired or something it needs is not stored."""
    try:
        return compare(*what)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _recovery(row: Row, reference: Row | None) -> Interval | None:
    """Of the reference's accuracy, under the rules of tables.py: same documents, same model."""
    if reference is None or reference.result is None:
        return None
    plain = tables._percent_of_bf16(row, reference)
    if plain is None:
        return None
    if row.answers and reference.answers and row.path != reference.path:
        found = _finite(_attempt(statistics.recovery, row.answers, reference.answers))
        if found:
            return found
    return _finite(Interval(plain.value / 100, None, None, None))


def _published(row: Row, printed: dict[str, Printed], model: str, options: str):
    """(table and row, accuracy, percent of BF16) of the first table that prints this cell."""
    name = row.path.rpartition("/")[2]
    for table in printed.values():
        for line in table.rows:
            number = table.number(line.name, model)
            fits = line.baseline == "bf16" or table.options[0] == options
            if number and fits and line.folder == name:
                percent = None if number.percent is None else float(number.percent)
                return f"{table.name}, {line.name}", float(number.accuracy), percent
    return None


def _comparisons(lines: list[Line]) -> dict[str, list[Comparison]]:
    """Every other rule against `ours`, at each of its budgets; rules without a budget at all of them."""
    found: dict[str, list[Comparison]] = {}
    for own in lines:
        if own.rule != OWN or not own.done:
            continue
        rivals = [one for one in lines if one.done and one is not own]
        rivals = [one for one in rivals if one.budget in ("", own.budget)]
        found[own.budget] = [_compare(one, own) for one in rivals]
    each = [c for comparisons in found.values() for c in comparisons]
    judged = [c for c in each if c.accuracy and c.line.rule != "bf16"]  # BF16 is no allocation
    p = [statistics.p_value(c.line.row.answers, c.own.row.answers) for c in judged]
    adjusted = dict(zip(map(id, judged), statistics.holm(p), strict=True))
    return {
        budget: [replace(c, adjusted=adjusted.get(id(c))) for c in comparisons]
        for budget, comparisons in found.items()
    }


def _compare(line: Line, own: Line) -> Comparison:
    answers = (line.row.answers, own.row.answers)
    results = (line.row.result, own.row.result)
    both = None not in answers
    return Comparison(
        line, own,
        accuracy=_finite(_attempt(statistics.difference, *answers)) if both else None,
        tasks=(_attempt(statistics.task_differences, *answers) or {}) if both else {},
        kl=_finite(_attempt(statistics.kl_difference, *results)),
        ratio=_finite(_attempt(_kl_ratio, *results)),
        mcnemar=(_attempt(statistics.mcnemar, *answers) or {}) if both else {},
        needed=_attempt(statistics.documents_needed, *answers) if both else None,
    )  # fmt: skip


def _kl_ratio(one: dict, other: dict) -> Interval:
    """KL of `one` over KL of `other`, paired by sequence.

    Interval: every r for which `kl_difference` of one and r × other contains 0 (Fieller 1954), so that it leaves
    out 1 where the difference leaves out 0. Raises ValueError if they are not paired or there is no such interval.
    """

    def difference(r: float) -> Interval:
        scaled = [r * value for value in other["kl"]["per_sequence"]]
        return statistics.kl_difference(one, other | {"kl": {"per_sequence": scaled}})

    if not statistics.kl(one).value > 0 < statistics.kl(other).value:
        raise ValueError("no ratio of a KL of 0")
    ratio = statistics.kl(one).value / statistics.kl(other).value
    if difference(1.0).low is None:
        return Interval(ratio, None, None, None)
    # An end is where the difference's interval begins or ends at 0: between 0 and many times the ratio.
    low = brentq(lambda r: difference(r).low, 0, ratio)
    high = brentq(lambda r: difference(r).high, ratio, 100 * ratio)
    return Interval(ratio, low, high, None)


def _allocation(folder: Path) -> dict[str, str]:
    try:
        layers = json.loads((folder / "allocation.json").read_text(encoding="utf-8"))["layers"]
        return {str(name): str(scheme) for name, scheme in layers.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        print(f"{folder}: allocation.json cannot be read: {one_line(error)}", file=sys.stderr)
        return {}


def _scored(results: Path) -> list:
    """Stored scores in nats per token, the last of each label."""
    if not any((results / "scores").glob("*/about.json")):
        return []
    from mixprec import frontier

    found = {
        (s.model, s.model_hash, *s.options, s.label): s for s in frontier.stored_scores(results)
    }
    # Of several calibrations of a signal, the larger first.
    return sorted(found.values(), key=lambda s: (s.signal, [-n for n in s.calibration or []]))


def _curves(scored: list, schemes: list[str]) -> dict[str, pd.DataFrame]:
    if not scored:
        return {}
    from mixprec import frontier

    first = {one.signal: one for one in reversed(scored)}.values()  # the larger calibration
    return {one.label: frontier.solved(one, schemes) for one in reversed(list(first))}


def _predicted(rows: list[Row]) -> pd.DataFrame:
    whole = [row for row in rows if row.result.get("notes") and row.result.get("kl")]
    return predicted.cells(whole)


# --- sections -> figures ----------------------------------------------------------------------
# Plain values that templates/charts.j2 draws. Widths and heights are pixels of the viewBox.


def by_bits(section: Section, what: str) -> dict | None:
    """`accuracy` or `kl` against bits, with intervals; None if no cell has both."""
    lines = [
        line for line in section.done
        if line.rule != "bf16" and line.bits is not None and getattr(line, what)
    ]  # fmt: skip
    if not lines:
        return None
    log = what == "kl"
    intervals = [getattr(line, what) for line in lines]
    if log and any(one.value <= 0 for one in intervals):
        log = False
    band = section.reference.accuracy if what == "accuracy" and section.reference else None
    bits = [line.bits for line in lines]
    x = axis([*bits, min(bits) + 0.5], 58, 446, pad=0.1)
    curves = _visible(section.curves, x) if what == "kl" else {}
    values = [v for one in [*intervals, *([band] if band else [])] for v in ends(one)]
    values += [v for points in curves.values() for _, v in points]
    y = axis(values, 268, 10, log=log)
    rules = list(dict.fromkeys(line.rule for line in lines))
    together: Counter = Counter()
    at_bits = Counter(round(line.bits, 2) for line in lines)
    series: dict[str, list] = {rule: [] for rule in rules}
    for line in lines:
        near = round(line.bits, 2)
        shift = 8 * (together[near] - (at_bits[near] - 1) / 2)  # side by side, not on top
        together[near] += 1
        series[line.rule].append((round(x.at(line.bits) + shift, 1), getattr(line, what), line))
    return {
        "x": x, "y": y, "series": series, "band": band, "width": 460, "height": 316,
        "curves": {name: [(x.at(b), y.at(v)) for b, v in points] for name, points in curves.items()},
        "xlabel": "average bits per quantized weight, scales not counted",
        "what": what,
    }  # fmt: skip


def _visible(curves: dict[str, pd.DataFrame], x: Axis) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [(b, v) for b, v in zip(c.bits, c.kl, strict=True) if x.low <= b <= x.high and v > 0]
        for name, c in curves.items()
    }


def ends(interval: Interval) -> list[float]:
    return [v for v in (interval.low, interval.value, interval.high) if v is not None]


def measured_against_predicted(section: Section) -> dict | None:
    """Each cell with a prediction: both KL with 95 % intervals, on logarithmic axes."""
    frame = section.predicted
    if frame.empty:
        return None
    points = []
    for line in frame.itertuples():
        both = [
            _finite(_normal(value, None if pd.isna(error) else error))
            for value, error in ((line.predicted, line.predicted_stderr), (line.measured, line.measured_stderr))
        ]  # fmt: skip
        if all(one and one.value > 0 for one in both):
            ratio = _finite(_normal(line.ratio, None if pd.isna(line.ratio_stderr) else line.ratio_stderr))  # fmt: skip
            points.append({"rule": line.rule, "budget": line.budget, "ratio": ratio,
                           "predicted": both[0], "measured": both[1]})  # fmt: skip
    if not points:
        return None
    values = [v for p in points for kind in ("predicted", "measured") for v in ends(p[kind])]
    return {
        "points": points, "width": 460, "height": 316,
        "x": axis(values, 58, 446, log=True), "y": axis(values, 268, 10, log=True),
    }  # fmt: skip


def heat_maps(section: Section) -> dict[str, list[dict]]:
    """Budget -> one panel a rule: block × module, and how the schemes are shared out."""
    found: dict[str, list[dict]] = {}
    for line in section.done:
        allocation = section.allocations.get(line.row.path)
        if not line.budget or not allocation:
            continue
        shares = section.grid.shares(allocation, section.schemes)
        counts = Counter(allocation.values())
        found.setdefault(line.budget, []).append({
            "rule": line.rule,
            "shares": shares,
            "paths": charts.scheme_paths(shares, len(section.schemes)),
            "code": "|".join("".join(_code(cell) for cell in row) for row in shares),
            "counts": {scheme: counts[scheme] for scheme in section.schemes},
            "layers": allocation,
        })  # fmt: skip
    by_size = {line.budget: line.row.config.get("budget") or math.inf for line in section.done}
    return dict(sorted(found.items(), key=lambda item: (by_size[item[0]], item[0])))


def _code(cell: list[float]) -> str:
    """The scheme's place; `m` where layers of one cell differ, `-` where there is none."""
    if not cell:
        return "-"
    return str(cell.index(1.0)) if 1.0 in cell else "m"


def agreement(panels: list[dict]) -> list[str]:
    """How many layers each rule gives the same scheme as AutoScheme does."""
    own = next((panel["layers"] for panel in panels if panel["rule"] == OWN), None)
    if own is None:
        return []
    same = {p["rule"]: sum(own.get(k) == v for k, v in p["layers"].items()) for p in panels}
    return [f"{rule} {n}" for rule, n in same.items() if rule != OWN]


def layer_scores(section: Section) -> list[dict]:
    """For each stored signal, a panel a module: score ± its standard error of every block and option."""
    found = []
    for one in section.scored:
        table = one.table[np.isfinite(one.table.score)]
        positive = table[table.score > 0]
        if positive.empty:
            continue
        y = axis(positive.score, 142, 22, log=True)
        grid = charts.Grid.of([layer.name for layer in one.layers])
        x = Axis(grid.blocks[0] - 0.7, grid.blocks[-1] + 0.7, 52, 218)
        panels = {module: [[] for _ in one.options] for module in grid.modules}
        for layer, option, score, error in zip(
            positive.layer, positive.option, positive.score, positive.stderr, strict=True
        ):
            block, module = charts.place(layer)
            bars = None if pd.isna(error) else (max(score - error, y.low), score + error)
            panels[module][one.options.index(option)].append((block, score, bars))
        ranked = (table.pivot(index="layer", columns="option", values="score").iloc[:, :]
                  .reindex(columns=one.options))  # fmt: skip
        gain = (ranked[one.options[0]] - ranked[one.options[-1]]).sort_values(ascending=False)
        found.append({
            "label": one.label, "options": one.options, "x": x, "y": y, "panels": panels,
            "total": float(ranked[one.options[0]].sum()),
            "top": [(name, *map(float, ranked.loc[name])) for name in gain.index[:10]],
            "top_share": float(gain.iloc[:10].sum() / gain.sum()) if gain.sum() > 0 else None,
            "layers": len(ranked),
        })  # fmt: skip
    return found


def forest(section: Section, comparisons: list[Comparison]) -> dict | None:
    """Differences in accuracy to AutoScheme, the mean and every task; in percentage points.

    Without BF16, which is far from all of them.
    """
    of = [c for c in comparisons if c.accuracy and c.line.rule != "bf16"]
    if not of:
        return None
    groups = [("mean of tasks", [(c.line.rule, c.accuracy) for c in of])]
    groups += [
        (task, [(c.line.rule, c.tasks[task]) for c in of if task in c.tasks])
        for task in section.tasks
    ]
    values = [100 * v for _, rows in groups for _, one in rows for v in ends(one)]
    top, placed = 8, []
    for name, rows in groups:
        lines = [(rule, one, top + 8 + 16 * place) for place, (rule, one) in enumerate(rows)]
        placed.append((name, top, lines))
        top += 16 * len(rows) + 12
    return {
        "groups": placed, "width": 720, "height": top + 40, "bottom": top,
        "x": axis([*values, 0], 112, 500, pad=0.03),
    }  # fmt: skip


def times(section: Section) -> dict | None:
    """Seconds by stage, a bar for every cell."""
    rows = [(line, line.row.result.get("seconds") or {}) for line in section.done]
    rows = [(line, {k: v for k, v in s.items() if v and math.isfinite(v)}) for line, s in rows]
    rows = [(line, seconds) for line, seconds in rows if seconds]
    if not rows:
        return None
    stages = [*STAGES, *sorted({name for _, s in rows for name in s} - set(STAGES))]
    stages = [stage for stage in stages if any(stage in s for _, s in rows)]
    x = Axis(0, 1.02 * max(sum(s.values()) for _, s in rows), 150, 580)
    bars = []
    for place, (line, seconds) in enumerate(rows):
        pieces, at = [], 0.0
        for stage in stages:
            if stage in seconds:
                pieces.append((stage, x.at(at), round(x.at(at + seconds[stage]) - x.at(at), 2), seconds[stage]))  # fmt: skip
                at += seconds[stage]
        bars.append((line.row.label, 8 + 22 * place, pieces, at))
    return {"x": x, "bars": bars, "stages": stages, "width": 640, "height": 22 * len(rows) + 46}


# --- the rest of the page ---------------------------------------------------------------------


def report_tables(results: Path, printed: dict[str, Printed]) -> list[dict]:
    """The report's tables, reproduced beside what was printed: models are columns."""
    stored, plans = tables.read(results)
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
                (row.name, [_printed_cell(cells[row.name, m], table, stored, questions) for m in models])
                for row in table.rows
            ]  # fmt: skip
            options = dict(zip(part.model, part.options, strict=True))
            others = {m: o for m, o in options.items() if o not in ("none", table.options[0])}
            parts.append({"evaluation": evaluation, "models": models, "rows": rows, "others": others})  # fmt: skip
        notes = [text for (of, row, model), text in questions.items() if of == name and not model]
        found.append({"table": table, "parts": parts, "notes": notes})
    return found


def _printed_cell(line: dict, table: Printed, stored: dict[str, Row], questions: dict) -> dict:
    number = table.number(line["row"], line["model"])
    row = stored.get(line["path"])
    done = None
    if row is not None and not line["reason"]:
        reference = stored.get((row.result.get("recovery") or {}).get("reference"))
        done = _line(row, reference, {}, line["model"], line["options"])
    return {
        "line": done,
        "reason": line["reason"],
        "published": number,
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


def summary(made: list[Section]) -> Section | None:
    """The section that the first paragraph is about: the one that compares most."""
    return next((section for section in made if section.best), None)


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


def page(results: Path, printed: dict[str, Printed], made: list[Section]) -> str:
    """The whole page. Everything is escaped but this project's own style sheet and script."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals.update(
        number=number, span=span, with_span=with_span, look=charts.look, level=charts.level, short=charts.short,
        by_bits=by_bits, measured_against_predicted=measured_against_predicted, heat_maps=heat_maps,
        agreement=agreement, layer_scores=layer_scores, forest=forest, times=times, axis=axis,
        ends=ends, roughly=roughly, key=key, MARKS=charts.MARKS, OWN=OWN, DASH=DASH, STAGES=STAGES, CLEAR=CLEAR,
        CELL=(charts.CELL_WIDTH, charts.CELL_HEIGHT),
    )  # fmt: skip
    environment.filters.update(ends=ends, capitalize_first=_capitalize, seconds_of=lambda p: (p[0], p[3]))  # fmt: skip
    css = environment.get_template("report.css").render(look={**charts.LOOK, "other": charts.OTHER})
    script = environment.get_template("report.js").render()
    lines = [line for section in made for line in section.done]
    return environment.get_template("report.html").render(
        made=made, lead=summary(made), tables=report_tables(results, printed),
        faults=faults(results), provenance=provenance(lines), cells=len({li.row.path for li in lines}),
        css=css, script=script, css_hash=_hash(css), script_hash=_hash(script),
        audit=audit.findings(printed), missing=_missing(made), about_ends=tables._ABOUT_ENDS,
        packaged=[tables._ABOUT_PACKAGED_MODEL, tables._ABOUT_PACKAGED_DOCUMENTS],
    )  # fmt: skip


def _missing(made: list[Section]) -> list[tuple[str, str]]:
    """(path, why) of the cells that were planned and have no result."""
    rows = {line.row.path: line.row.reason for s in made for line in s.lines if not line.done}
    return sorted(rows.items())


def _capitalize(text: str) -> str:
    return type(text)(text[:1].upper() + text[1:])


def _hash(text: str) -> str:
    """Of an inline style sheet or script, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render(results: Path, experiments: Path = published.EXPERIMENTS) -> list[Path]:
    """Write the page and its figures; the files written, none if nothing is stored or planned."""
    printed = published.read(experiments)
    made = sections(results, printed)
    trouble = faults(results)
    if not made and not trouble:
        return []
    text = page(results, printed, made)
    file = results / "report.html"
    write(file, lambda path: path.write_text(text, encoding="utf-8"))
    from mixprec import figures

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
