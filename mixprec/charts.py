"""The report's figures as plain values: a colour and a mark for every rule, axes, what stands where. No I/O.

The page draws them as SVG (templates/charts.html) and figures.py as files for a paper, from the same numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mixprec.sections import OWN, Comparison, Section, finite, normal
from mixprec.statistics import Interval

STAGES = ("load", "reference", "allocate", "tune", "quantize", "kl", "evaluate")

# baseline: (colour on white, colour on black, mark). At least 3:1 against either ground; the marks are
# matplotlib's names, so that nothing is told by colour alone.
LOOK = {
    "bf16": ("#1f2328", "#e6edf3", "*"),
    "low": ("#5b6470", "#a7b0bb", "v"),
    "high": ("#5b6470", "#a7b0bb", "^"),
    "tail8": ("#00795a", "#57d9a3", ">"),
    "head8": ("#9a3b8a", "#e394dc", "<"),
    "tail4": ("#00795a", "#57d9a3", ">"),
    "head4": ("#9a3b8a", "#e394dc", "<"),
    "random": ("#7a6000", "#d9b800", "X"),
    "weight_error": ("#8c564b", "#d8a08f", "p"),
    "output_error": ("#6a51a3", "#b7a6f5", "h"),
    "modelopt": ("#00748a", "#4fd3e6", "P"),
    "ours": ("#0b5fa5", "#6cb6ff", "s"),
    "fisher": ("#c43e00", "#ff9e64", "o"),
    "measured_kl": ("#8a0f3c", "#ff8fb1", "D"),
}
OTHER = ("#444444", "#bbbbbb", "d")  # a rule that is not in LOOK yet

# SVG paths around (0, 0) for the names above.
MARKS = {
    "o": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "s": "M-4-4h8v8h-8z",
    "D": "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "d": "M0-6L3.5 0L0 6L-3.5 0z",
    "^": "M0-5L5 4.5h-10z",
    "v": "M0 5L5-4.5h-10z",
    "<": "M-5 0L4.5-5v10z",
    ">": "M5 0L-4.5-5v10z",
    "X": "M-5-3l2-2l3 3l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3z",
    "P": "M-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "*": "M0-6L1.6-2L6-1.9L2.5.8L3.7 5L0 2.5L-3.7 5L-2.5.8L-6-1.9L-1.6-2z",
    "p": "M0-5.2L5-1.6L3.1 4.2h-6.2L-5-1.6z",
    "h": "M0-5.2L4.5-2.6v5.2L0 5.2L-4.5 2.6v-5.2z",
}


def look(rule: str) -> tuple[str, str]:
    """(CSS class, mark) of a rule such as `fisher` or `ours, tuned 200`."""
    baseline = re.split(r"[, (]", rule)[0]
    known = baseline if baseline in LOOK else "other"
    return f"r-{known.replace('_', '-')}", LOOK.get(known, OTHER)[2]


@dataclass(frozen=True)
class Axis:
    """From values low … high to pixels start … end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, text): three to eight round numbers."""
        values = _log_ticks(self.low, self.high) if self.log else []
        if len(values) < 2:
            values = _ticks(self.low, self.high)
        return [(self.at(value), f"{value:.6g}".replace("-", "−")) for value in values]


def axis(values, start: float, end: float, *, log: bool = False, pad: float = 0.06) -> Axis:
    """An axis that holds `values` with some room at either end; (0, 1) if there is none."""
    values = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    low, high = min(values, default=0.1 if log else 0), max(values, default=1)
    if log:
        room = max(pad * math.log(high / low), 0.05)
        return Axis(low * math.exp(-room), high * math.exp(room), start, end, True)
    room = pad * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end)


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if (high - low) / (s * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = math.log10(high / low) < 2
    of_decade = (1, 2, 3, 5) if fine else (1,)
    values = [factor * 10.0**power for power in decades for factor in of_decade]
    return [value for value in values if low <= value <= high]


# --- block × module ---------------------------------------------------------------------------


def place(layer: str) -> tuple[int, str]:
    """(block, module) of a linear's name; experts of one block share a module, `experts.*.up`."""
    match = re.match(r"(?:.*?\.)?(\d+)\.(.+)", layer)
    if match is None:
        return 0, layer
    module = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", match[2])
    return int(match[1]), module


def short(module: str) -> str:
    """`self_attn.q_proj` as `q`, `mlp.experts.*.up_proj` as `experts.up`."""
    name = module.rpartition(".")[2].removesuffix("_proj")
    return f"experts.{name}" if "*" in module else name


@dataclass(frozen=True)
class Grid:
    """Which layers stand where: blocks down, modules across, in the order of the model."""

    blocks: list[int]
    modules: list[str]
    layers: dict[tuple[int, str], list[str]]

    @staticmethod
    def of(layers: list[str]) -> Grid:
        found: dict[tuple[int, str], list[str]] = {}
        for layer in layers:
            found.setdefault(place(layer), []).append(layer)
        modules = list(dict.fromkeys(module for _, module in found))
        return Grid(sorted({block for block, _ in found}), modules, found)

    @staticmethod
    def of_section(section: Section) -> Grid:
        return Grid.of(list(next(iter(section.allocations.values()), {})))

    def shares(self, allocation: dict[str, str], schemes: list[str]) -> list[list[list[float]]]:
        """[block][module][scheme]: the share of the layers there that have it; empty if none is there."""
        return [
            [
                [sum(allocation.get(name) == s for name in names) / len(names) for s in schemes]
                if (names := self.layers.get((block, module)))
                else []
                for module in self.modules
            ]
            for block in self.blocks
        ]


CELL_WIDTH, CELL_HEIGHT = 16, 9  # pixels of a heat map's cell


def runs(shares: list[list[list[float]]]) -> list[tuple[int, int, float, float]]:
    """(row, scheme, from, to): equal neighbours as one; experts that differ share a cell's width."""
    found: list[tuple[int, int, float, float]] = []
    for row, modules in enumerate(shares):
        for column, cell in enumerate(modules):
            at = float(column)
            for scheme, share in enumerate(cell):
                if not share:
                    continue
                if found and found[-1][:2] == (row, scheme) and found[-1][3] == at:
                    found[-1] = (row, scheme, found[-1][2], at + share)
                else:
                    found.append((row, scheme, at, at + share))
                at += share
    return found


def scheme_paths(shares: list[list[list[float]]], schemes: int) -> list[str]:
    """An SVG path for every scheme."""
    paths = [""] * schemes
    for row, scheme, start, end in runs(shares):
        left, width = (round(CELL_WIDTH * x, 1) for x in (start, end - start))
        paths[scheme] += f"M{left:g} {row * CELL_HEIGHT}h{width:g}v{CELL_HEIGHT}h-{width:g}z"
    return paths


def level(place: int, of: int) -> int:
    """How a scheme among `of` options looks: 0 is the lowest and 3 the highest, whatever their number."""
    if place == 0 or of > 3:
        return min(place, 3)
    return 3 if place == of - 1 else 2


# --- sections -> figures ----------------------------------------------------------------------
# Plain values that templates/charts.html and figures.py draw; sizes are pixels of the SVG's viewBox.


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
    measured = {(line.rule, line.budget): line.kl for line in section.done}
    points = []
    for line in section.predicted.itertuples():
        ratio, prediction = (
            finite(normal(value, None if pd.isna(error) else error))
            for value, error in (
                (line.ratio, line.ratio_stderr),
                (line.predicted, line.predicted_stderr),
            )
        )
        kl = measured.get((line.rule, line.budget))
        if prediction and kl and min(prediction.value, kl.value) > 0:
            points.append({"rule": line.rule, "budget": line.budget, "ratio": ratio,
                           "predicted": prediction, "measured": kl})  # fmt: skip
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
    grid = Grid.of_section(section)
    for line in section.done:
        allocation = section.allocations.get(line.row.path)
        if not line.budget or not allocation:
            continue
        shares = grid.shares(allocation, section.schemes)
        counts = Counter(allocation.values())
        found.setdefault(line.budget, []).append({
            "rule": line.rule,
            "shares": shares,
            "paths": scheme_paths(shares, len(section.schemes)),
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
        grid = Grid.of([layer.name for layer in one.layers])
        x = Axis(grid.blocks[0] - 0.7, grid.blocks[-1] + 0.7, 52, 218)
        panels = {module: [[] for _ in one.options] for module in grid.modules}
        for layer, option, score, error in zip(
            positive.layer, positive.option, positive.score, positive.stderr, strict=True
        ):
            block, module = place(layer)
            bars = None if pd.isna(error) else (max(score - error, y.low), score + error)
            panels[module][one.options.index(option)].append((block, score, bars))
        ranked = table.pivot(index="layer", columns="option", values="score")[one.options]
        gain = (ranked[one.options[0]] - ranked[one.options[-1]]).sort_values(ascending=False)
        found.append({
            "label": one.label, "options": one.options, "x": x, "y": y, "panels": panels,
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
        bars.append((line.row.label, 8 + 22 * place, pieces, at, seconds))
    return {"x": x, "bars": bars, "stages": stages, "width": 640, "height": 22 * len(rows) + 46}
