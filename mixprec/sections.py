"""What the report compares: results -> a section for every evaluation, model and options. No torch.

A section has the numbers of tables.py, with every rule beside AutoScheme (`ours`) of the same budget, and what is
stored of allocations and scores. charts.py makes figures of it and report.py a page.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm

from mixprec import paired, predicted, statistics, tables
from mixprec.published import Printed
from mixprec.statistics import Interval
from mixprec.store import one_line
from mixprec.tables import Row

if TYPE_CHECKING:
    from mixprec.frontier import Scored

OWN = "ours"  # what the report calls AutoScheme: every rule is compared with it


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

    accuracy and tasks: `line` − `ours`, as fractions; kl: in nats per token; ratio: of the two KL, at one
    budget. None where the two are not paired.
    """

    line: Line
    own: Line
    accuracy: Interval | None
    tasks: dict[str, Interval]
    kl: Interval | None
    ratio: Interval | None
    mcnemar: dict[str, float]
    needed: int | None  # documents a task
    p: float | None  # of the accuracy, after Holm's correction over the evaluation (tables.frame)
    kl_p: float | None  # the same of KL

    @property
    def budget(self) -> str:
        return self.own.budget

    @property
    def accuracy_seems_clear(self) -> bool:
        """As if it were the only comparison."""
        return excludes(self.accuracy, 0)

    @property
    def accuracy_clear(self) -> bool:
        return self.accuracy_seems_clear and (self.p is None or self.p <= statistics.ALPHA)

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
    scored: list[Scored]  # of this model and these options
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


def excludes(interval: Interval | None, value: float) -> bool:
    """Is `value` outside the interval? Then the data can tell."""
    return interval is not None and interval.low is not None and not (
        interval.low <= value <= interval.high
    )  # fmt: skip


# --- results -> sections ----------------------------------------------------------------------


def sections(
    results: Path,
    stored: dict[str, Row],
    plans: dict[str, list[Row]],
    printed: dict[str, Printed],
) -> list[Section]:
    """Everything that is stored or planned, a section for every evaluation, model and options.

    stored, plans: as tables.read has them of `results`. The section that compares most comes first.
    """
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
    numbers = {}
    if stored:  # the same numbers as in every other table
        every = tables.frame(list(stored.values()), stored)
        numbers = every.astype(object).where(every.notna(), None).set_index("path").to_dict("index")
    scored = _scored(results)
    made = []
    for place, ((evaluation, model, options), group) in enumerate(sorted(groups.items())):
        reference = references.get((evaluation, model))
        if options != "none":
            group = [reference or _no_reference(evaluation, model), *group]
        lines = [_line(row, numbers.get(row.path), printed) for row in _ordered(group)]
        made.append(
            _section(f"s{place}", evaluation, model, options, lines, numbers, results, scored)
        )
    return sorted(made, key=lambda s: -sum(map(len, s.comparisons.values())))


def _no_reference(evaluation: str, model: str) -> Row:
    config = {
        "baseline": {"name": "bf16"},
        "budget": None,
        "options": None,
        "model": {"name": model},
    }
    return Row(f"{evaluation}/{model}/none/bf16", config, None, "not run")


def _ordered(rows: list[Row]) -> list[Row]:
    order = {name: place for place, name in enumerate(tables.ORDER)}

    def key(row: Row):
        place = order.get(row.config["baseline"]["name"], len(order))
        return place, row.config.get("budget") or 0, row.label

    return sorted(rows, key=key)


def _section(id, evaluation, model, options, lines, numbers, results, scored) -> Section:
    rows = [line.row for line in lines]
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
        id, evaluation, model, options, schemes, lines, _comparisons(lines, numbers), allocations,
        own, _curves(own, schemes), _predicted(done),
    )  # fmt: skip


def _line(row: Row, numbers: dict | None, printed: dict[str, Printed]) -> Line:
    """numbers: the cell's line of tables.frame."""
    where = _published(row, printed)
    if row.result is None or numbers is None:
        return Line(row, published=where)
    tasks = {
        task: normal(metric["acc"], metric.get("stderr"))
        for task, metric in row.result["metrics"].items()
    }
    for task, right in row.answers.correct.items() if row.answers else ():
        one = paired.Answers({task: row.answers.documents[task]}, {task: right})
        tasks[task] = statistics.accuracy(one)
    return Line(
        row,
        accuracy=accuracy(numbers),
        recovery=_interval(numbers, "percent_of_bf16", "percent", 0.01),
        kl=_interval(numbers, "kl_mean", "kl"),
        bits=numbers["realised_bits"],
        bits_with_scales=numbers["realised_bits_with_scales"],
        tasks={task: one for task, interval in tasks.items() if (one := finite(interval))},
        published=where,
    )


def _interval(numbers: dict, value: str, ends: str, scale: float = 1) -> Interval | None:
    """The columns `value`, `ends`_low and `ends`_high of tables.frame."""
    columns = (value, f"{ends}_low", f"{ends}_high")
    of = [None if (v := numbers.get(c)) is None else scale * v for c in columns]
    return finite(Interval(*of, None))


def accuracy(numbers: dict) -> Interval | None:
    """Of a line of tables.frame; from its standard error where the answers were not kept."""
    found = _interval(numbers, "acc", "acc")
    if found and found.low is None and numbers.get("stderr") is not None:
        return finite(normal(found.value, numbers["stderr"]))
    return found


def normal(value: float, stderr: float | None) -> Interval:
    """95 % of a normal distribution: where only a mean and its standard error are stored."""
    if stderr is None:
        return Interval(value, None, None, None)
    return Interval(value, value - norm.ppf(0.975) * stderr, value + norm.ppf(0.975) * stderr, stderr)  # fmt: skip


def finite(interval: Interval | None) -> Interval | None:
    """Without what is not a number: an estimate that is none is not known, nor is a bound."""
    if interval is None or interval.value is None or not math.isfinite(interval.value):
        return None
    if any(end is None or not math.isfinite(end) for end in (interval.low, interval.high)):
        return Interval(interval.value, None, None, None)
    return interval


def _published(row: Row, printed: dict[str, Printed]):
    """(table and row, accuracy, percent of BF16) of the first table that prints this cell."""
    name, options = row.path.rpartition("/")[2], row.group[1]
    for table in printed.values():
        for line in table.rows:
            number = table.number(line.name, row.model)
            fits = line.baseline == "bf16" or table.options[0] == options
            if number and fits and line.folder == name:
                percent = None if number.percent is None else float(number.percent)
                return f"{table.name}, {line.name}", float(number.accuracy), percent
    return None


def _comparisons(lines: list[Line], numbers: dict[str, dict]) -> dict[str, list[Comparison]]:
    """Every other rule against `ours`, at each of its budgets; rules without a budget at all of them."""
    found: dict[str, list[Comparison]] = {}
    for own in lines:
        if own.rule != OWN or not own.done:
            continue
        rivals = [one for one in lines if one.done and one is not own]
        rivals = [one for one in rivals if one.budget in ("", own.budget)]
        found[own.budget] = [_compare(one, own, numbers[one.row.path]) for one in rivals]
    return found


def _compare(line: Line, own: Line, numbers: dict) -> Comparison:
    pair = tables.pair(line.row, own.row)
    answers = (line.row.answers, own.row.answers) if pair.accuracy else None
    return Comparison(
        line, own,
        accuracy=finite(pair.accuracy),
        tasks=statistics.task_differences(*answers) if answers else {},
        kl=finite(pair.kl),
        ratio=finite(_kl_ratio(line.row.result, own.row.result)) if pair.kl and line.budget else None,
        mcnemar=statistics.mcnemar(*answers) if answers else {},
        needed=pair.needed,
        p=numbers.get("minus_ours_p"),
        kl_p=numbers.get("kl_minus_ours_p"),
    )  # fmt: skip


def _kl_ratio(one: dict, other: dict) -> Interval | None:
    """KL of `one` over KL of `other`, paired by sequence.

    Interval: every r for which `kl_difference` of one and r × other contains 0 (Fieller 1954), so that it leaves
    out 1 where the difference leaves out 0. None where either KL cannot be told from 0, as BF16's own.
    """

    def difference(r: float) -> Interval:
        scaled = [r * value for value in other["kl"]["per_sequence"]]
        return statistics.kl_difference(one, other | {"kl": {"per_sequence": scaled}})

    of, to = statistics.kl(one), statistics.kl(other)
    if min(of.value, to.value, of.low or 0, to.low or 0) < 1e-6:
        return None
    ratio = of.value / to.value
    # An end is where the difference's interval begins or ends at 0. Few steps: two digits are shown.
    found = []
    for end, factor in (("low", 0.9), ("high", 1 / 0.9)):
        beyond = factor
        while (getattr(difference(beyond * ratio), end) < 0) == (end == "low"):
            beyond *= beyond
        root = brentq(lambda r, end=end: getattr(difference(r), end), beyond * ratio, ratio, xtol=1e-3 * ratio)  # fmt: skip
        found.append(root)
    return Interval(ratio, *found, None)


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

    try:
        stored = frontier.stored_scores(results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{results}/scores cannot be read: {one_line(error)}", file=sys.stderr)
        return []
    found = {(s.model, s.model_hash, *s.options, s.label): s for s in stored}
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
