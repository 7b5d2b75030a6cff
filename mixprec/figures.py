"""The report's figures as files for a paper: SVG, the same for the same numbers, and PNG.

One set for every section of sections.py, `results/figures/<evaluation>-<model>-<options>-<figure>.{svg,png}`.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mixprec import charts, predicted
from mixprec.charts import LOOK, OTHER
from mixprec.sections import Section
from mixprec.statistics import Interval
from mixprec.store import write

SCHEMES = ("#d8e3ee", "#a9c4e2", "#5e93c9", "#12508c")  # the lowest option to the highest
HATCHES = (None, "..", "--", "////")
STAGES = ("#6a51a3", "#8a6500", "#00795a", "#9a3b8a", "#a1471b", "#00748a", "#4a6f9c", "#5b6470")


def draw(made: list[Section], folder: Path) -> list[Path]:
    """Every figure of every section that has the cells for it; the files written."""
    written = []
    for section in made:
        name = "-".join((section.evaluation, section.model, section.options))
        figures = {"kl": _by_bits(section, "kl"), "accuracy": _by_bits(section, "accuracy"),
                   "predicted": _predicted(section), "seconds": _seconds(section)}  # fmt: skip
        for budget, comparisons in section.comparisons.items():
            figures[f"differences-{_slug(budget)}"] = _forest(section, budget, comparisons)
        for budget, panels in charts.heat_maps(section).items():
            figures[f"allocation-{_slug(budget)}"] = _heat_maps(section, budget, panels)
        for scores in charts.layer_scores(section)[:1]:  # the larger calibration
            figures["scores"] = _scores(section, scores)
        for kind, figure in figures.items():
            if figure is not None:
                written += _save(figure, folder / f"{_slug(name)}-{kind}")
    return written


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text.replace(" bits", "").replace(" ≤ ", "")).strip("-")


def _save(figure, file: Path) -> list[Path]:
    """As predicted.save, which has a legend for one pair of axes; and a PNG."""
    from matplotlib import pyplot

    svg, png = (file.with_name(f"{file.name}.{kind}") for kind in ("svg", "png"))
    write(svg, lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))
    write(
        png, lambda path: figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
    )
    pyplot.close(figure)
    return [svg, png]


def _axes(title: str, width: float, height: float):
    figure, axes = predicted.axes(title)
    figure.set_size_inches(width, height)
    return figure, axes


def _style(rule: str) -> dict:
    """A rule's colour and mark, those of the page; hollow if fused or tuned."""
    baseline = re.split(r"[, (]", rule)[0]
    colour, _, mark = LOOK.get(baseline, OTHER)
    face = "white" if ", " in rule else colour
    return {"color": colour, "marker": mark, "markerfacecolor": face, "markersize": 6}


def _errors(one: Interval, scale: float = 1) -> list[list[float]] | None:
    if one.low is None:
        return None
    return [[scale * (one.value - one.low)], [scale * (one.high - one.value)]]


def _by_bits(section: Section, what: str):
    chart = charts.by_bits(section, what)
    if chart is None:
        return None
    figure, axes = _axes(section.name, 6, 4)
    x = chart["x"]
    for place, (label, curve) in enumerate(section.curves.items() if what == "kl" else ()):
        seen = curve[(curve.bits >= x.low) & (curve.bits <= x.high)]
        axes.plot(seen.bits, seen.kl, color=_style(label)["color"], alpha=0.35, linewidth=4,
                  linestyle=("-", "--", ":")[place % 3], label=label)  # fmt: skip
    if chart["band"]:
        band = chart["band"]
        axes.axhline(band.value, color="grey", linestyle="--", linewidth=1, label="BF16")
        if band.low is not None:
            axes.axhspan(band.low, band.high, color="grey", alpha=0.15)
    per_pixel = (x.high - x.low) / (x.end - x.start)
    for rule, points in chart["series"].items():
        at = [x.low + (pixel - x.start) * per_pixel for pixel, _, _ in points]
        for place, (_, one, _) in enumerate(points):
            axes.errorbar(at[place], one.value, _errors(one), capsize=2, **_style(rule),
                          label=rule if place == 0 else None)  # fmt: skip
        axes.plot(at, [one.value for _, one, _ in points], color=_style(rule)["color"],
                  linewidth=0.7, alpha=0.5)  # fmt: skip
    if chart["y"].log:
        predicted.logarithmic(axes.yaxis)
    axes.set_xlabel(chart["xlabel"])
    label = "KL to BF16, nats per token" if what == "kl" else "accuracy, mean of tasks"
    axes.set_ylabel(f"{label} (95 % intervals)")
    axes.legend(fontsize="x-small")
    return figure


def _predicted(section: Section):
    chart = charts.measured_against_predicted(section)
    if chart is None:
        return None
    figure, axes = _axes(section.name, 5, 4)
    for place, point in enumerate(chart["points"]):
        one, other = point["predicted"], point["measured"]
        first = point["rule"] not in {p["rule"] for p in chart["points"][:place]}
        axes.errorbar(one.value, other.value, _errors(other), _errors(one), capsize=2,
                      label=point["rule"] if first else None, **_style(point["rule"]))  # fmt: skip
    ends = (chart["x"].low, chart["x"].high)
    axes.plot(ends, ends, color="grey", linewidth=1, linestyle="--", label="equal")
    predicted.logarithmic(axes.xaxis)
    predicted.logarithmic(axes.yaxis)
    axes.set(xlabel="predicted KL, nats per token", ylabel="measured KL (95 % intervals)")
    axes.legend(fontsize="small")
    return figure


def _forest(section: Section, budget: str, comparisons):
    chart = charts.forest(section, comparisons)
    if chart is None:
        return None
    figure, axes = _axes(f"{section.name}, {budget}", 6, chart["height"] / 90)
    seen = set()
    for _, _, rows in chart["groups"]:
        for rule, one, y in rows:
            axes.errorbar(100 * one.value, y, xerr=_errors(one, 100), capsize=0, **_style(rule),
                          label=None if rule in seen else rule)  # fmt: skip
            seen.add(rule)
    middles = [np.mean([y for _, _, y in rows]) for _, _, rows in chart["groups"]]
    axes.set_yticks(middles, [name for name, _, _ in chart["groups"]])
    for _, top, _ in chart["groups"][1:]:
        axes.axhline(top - 4, color="lightgrey", linewidth=0.8)
    axes.grid(False, axis="y")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_ylim(chart["bottom"], 0)
    axes.set_xlabel("accuracy − AutoScheme’s, points (95 % intervals)")
    axes.legend(fontsize="x-small")
    return figure


def _heat_maps(section: Section, budget: str, panels: list[dict]):
    from matplotlib import pyplot
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path as Outline

    pyplot.close(predicted.axes("")[0])  # it sets the backend and the salt
    grid = charts.Grid.of_section(section)
    width, height = len(grid.modules), len(grid.blocks)
    figure, several = pyplot.subplots(
        1, len(panels), sharey=True, squeeze=False, layout="constrained",
        figsize=(0.9 + len(panels) * (0.4 + 0.16 * width), 1.6 + 0.11 * height),
    )  # fmt: skip
    levels = [charts.level(place, len(section.schemes)) for place in range(len(section.schemes))]
    for axes, panel in zip(several[0], panels, strict=True):
        boxes: dict[int, list[Outline]] = {}
        for row, scheme, start, end in charts.runs(panel["shares"]):
            corners = [(start, row), (end, row), (end, row + 1), (start, row + 1), (start, row)]
            boxes.setdefault(levels[scheme], []).append(Outline(corners))
        for level, outlines in sorted(boxes.items()):  # one path a scheme: small files
            path = Outline.make_compound_path(*outlines)
            axes.add_patch(PathPatch(path, facecolor=SCHEMES[level], linewidth=0, edgecolor="white",
                                     hatch=HATCHES[level]))  # fmt: skip
        axes.vlines(range(width), 0, height, color="white", linewidth=0.5)
        axes.hlines(range(height), 0, width, color="white", linewidth=0.5)
        axes.set(xlim=(0, width), ylim=(height, 0), title=panel["rule"])
        axes.set_xticks(np.arange(width) + 0.5, map(charts.short, grid.modules), rotation=60)
        axes.set_yticks(np.arange(0, height, 5) + 0.5, grid.blocks[::5])
    several[0][0].set_ylabel("block, from the embedding to lm_head")
    patches = [Patch(facecolor=SCHEMES[level], hatch=HATCHES[level], edgecolor="white", label=name)
               for name, level in zip(section.schemes, levels, strict=True)]  # fmt: skip
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize="small")
    figure.suptitle(f"{section.name}, {budget}", fontsize="small")
    return figure


def _scores(section: Section, scores: dict):
    from matplotlib import pyplot

    names = list(scores["panels"])
    columns = min(4, len(names))
    pyplot.close(predicted.axes("")[0])
    figure, several = pyplot.subplots(
        -(-len(names) // columns), columns, sharex=True, sharey=True, squeeze=False,
        layout="constrained", figsize=(2 * columns + 0.6, 1.7 * -(-len(names) // columns) + 0.6),
    )  # fmt: skip
    for axes in several.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(several.flat, names, strict=False):
        for place, points in enumerate(scores["panels"][name]):
            axes.plot([block for block, _, _ in points], [score for _, score, _ in points],
                      "so^D"[place % 4], markersize=2.5, color=predicted.COLOURS[(1, 0, 2, 3)[place % 4]],
                      label=scores["options"][place])  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(charts.short(name), fontsize="small")
        axes.grid(alpha=0.3)
    several[0][0].legend(fontsize="x-small")
    figure.supxlabel("block", fontsize="small")
    figure.supylabel("score, nats per token", fontsize="small")
    figure.suptitle(f"{section.model}: {scores['label']}", fontsize="small")
    return figure


def _seconds(section: Section):
    chart = charts.times(section)
    if chart is None:
        return None
    figure, axes = _axes(section.name, 6, 0.9 + 0.24 * len(chart["bars"]))
    hatches = ("||", "--", "////", "..", "\\\\\\\\", "++", None, "xx")
    for stage in chart["stages"]:
        place = charts.STAGES.index(stage) if stage in charts.STAGES else 7
        at, widths, starts = [], [], []
        for row, (_, _, pieces, *_) in enumerate(chart["bars"]):
            before = 0.0
            for name, _, _, seconds in pieces:
                if name == stage:
                    at, widths, starts = [*at, row], [*widths, seconds], [*starts, before]
                before += seconds
        axes.barh(at, widths, left=starts, color=STAGES[place], hatch=hatches[place],
                  edgecolor="white", linewidth=0.3, label=stage)  # fmt: skip
    axes.set_yticks(
        range(len(chart["bars"])), [label for label, *_ in chart["bars"]], fontsize="small"
    )
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(fontsize="x-small")
    return figure
