"""How the report's figures look: a colour and a mark for every rule, axes, heat maps. No I/O.

The page draws them as SVG (templates/charts.j2) and figures.py as files for a paper, from the same numbers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

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
