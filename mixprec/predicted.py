"""A cell's predicted KL against its measured one: do sums of scores tell what will be measured?

The prediction is a mean over calibration sequences and the measurement one over held-out sequences of
other text, so their errors are independent.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
from scipy.stats import linregress, spearmanr
from tabulate import tabulate

from mixprec import tables
from mixprec.store import write

FUSED = ", fused"
# Okabe and Ito's colours, which tell apart for the colour-blind, without the yellow that white hides.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
MARKERS = "osD^v<>pPX*hd8"


def rule_of(config: dict) -> str:
    """What a cell's result depends on beside its bits: the baseline, and how it was fused or tuned."""
    fused = FUSED if "fused" in config else ""
    tuned = f", tuned {config['tuning']['iters']}" if "tuning" in config else ""
    return config["baseline"]["name"] + fused + tuned


def text_of(result: dict) -> tuple:
    """Which held-out text its KL is of."""
    return result["provenance"]["heldout_text"], result["kl"]["tokens"]


def cells(rows: list[tables.Row]) -> pd.DataFrame:
    """Every cell with a prediction, equal ones once.

    Columns model, options, rule, budget (bits or KL, as text), bits, predicted, predicted_stderr,
    measured, measured_stderr (nats per token), ratio, ratio_stderr. Tuned cells are left out: what
    is predicted is rounding to nearest.

    ratio = P / M has, by the delta method, the standard error r √((σ_P / P)² + (σ_M / M)²).
    """
    lines = []
    for row in rows:
        result, config = row.result, row.config
        notes, kl = result["notes"], result["kl"]
        if "predicted_kl" not in notes or not kl or "tuning" in config:
            continue
        target = config.get("target")
        line = {
            "model": row.model,
            "options": config["options"]["name"],
            "rule": rule_of(config),
            "budget": f"KL ≤ {target['kl']:.10g}" if target else f"{config['budget']:.10g} bits",
            "bits": result["realised_bits"],
            "predicted": notes["predicted_kl"],
            "predicted_stderr": notes["predicted_kl_stderr"],
            "measured": kl["mean"],
            "measured_stderr": kl["stderr"],
        }
        lines.append(line | _ratio(line))
    frame = pd.DataFrame(lines).drop_duplicates()  # two evaluations of one text
    return frame if frame.empty else frame.sort_values(["model", "rule", "options", "bits"])


def _ratio(line: dict) -> dict[str, float | None]:
    ratio = line["predicted"] / line["measured"]
    errors = [line["predicted_stderr"], line["measured_stderr"]]
    if None in errors:
        return {"ratio": ratio, "ratio_stderr": None}
    relative = math.hypot(errors[0] / line["predicted"], errors[1] / line["measured"])
    return {"ratio": ratio, "ratio_stderr": abs(ratio) * relative}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Per model and rule: Spearman's rank correlation and the slope of log measured on log predicted.

    A slope of 1 says that both fall alike, whatever the ratio. NaN for fewer than three cells. The
    slope's standard error is least squares', which takes cells to be independent; they share text.
    """
    lines = []
    for (model, rule), group in frame.groupby(["model", "rule"], sort=False):
        line = {"model": model, "rule": rule, "n": len(group)}
        line |= {"spearman": math.nan, "slope": math.nan, "slope_stderr": math.nan}
        positive = group[(group.predicted > 0) & (group.measured > 0)]
        if len(positive) > 2:
            fit = linregress(*(positive[c].map(math.log) for c in ("predicted", "measured")))
            line |= {"slope": fit.slope, "slope_stderr": fit.stderr}
            line["spearman"] = spearmanr(positive.predicted, positive.measured).statistic
        lines.append(line)
    return pd.DataFrame(lines)


def render(results: Path) -> tuple[str, list[Path]]:
    """(the comparison as plain text, files written); a line that says so where there is no cell."""
    frame = cells(list(tables.read(results)[0].values()))
    if frame.empty:
        return f"no cell in {results}/ has a prediction and a measured KL", []
    written = []
    for model, group in frame.groupby("model", sort=False):
        svg, csv = (results / "figures" / f"predicted-{model}.{kind}" for kind in ("svg", "csv"))
        write(csv, lambda path, group=group: group.to_csv(path, index=False))
        figure(group, str(model), svg)
        written += [svg, csv]
    return text(frame), written


def text(frame: pd.DataFrame) -> str:
    """Both tables for the terminal."""
    each = [
        (
            line.model, line.options, line.rule, line.budget, f"{line.bits:.3f}",
            _number(line.predicted, line.predicted_stderr, 4),
            _number(line.measured, line.measured_stderr, 4),
            _number(line.ratio, line.ratio_stderr, 2),
        )
        for line in frame.itertuples()
    ]  # fmt: skip
    headers = ("model", "options", "rule", "budget", "bits", "predicted", "measured", "ratio")
    whole = [
        (
            line.model, line.rule, line.n, "—" if math.isnan(line.spearman) else f"{line.spearman:.3f}",
            _number(line.slope, line.slope_stderr, 2),
        )
        for line in summary(frame).itertuples()
    ]  # fmt: skip
    return "\n\n".join(
        (
            "KL to BF16 in nats per token, ± one standard error over sequences; ratio: predicted / measured",
            tabulate(each, headers, "plain", disable_numparse=True),
            tabulate(
                whole,
                ("model", "rule", "cells", "rank correlation", "slope, log-log"),
                "plain",
                disable_numparse=True,
            ),
        )
    )


def _number(value: float, error: float | None, digits: int) -> str:
    if pd.isna(value):
        return "—"
    return f"{value:.{digits}f}" + ("" if pd.isna(error) else f" ± {error:.{digits}f}")


# --- figures ----------------------------------------------------------------------------------


def axes(title: str):
    """(figure, axes) for an SVG that is the same for the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mixprec"
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    return fig, axes


def style(name: str) -> dict:
    """How a rule's points look, the same in every figure; hollow if fused."""
    baseline = re.split(r"[, ]", name)[0]
    place = [*tables.ORDER, baseline].index(baseline)
    colour = COLOURS[place % len(COLOURS)]
    return {
        "fmt": MARKERS[place % len(MARKERS)],
        "color": colour,
        "markerfacecolor": "white" if FUSED in name else colour,
        "markersize": 6,
        "capsize": 2,
    }


def logarithmic(axis) -> None:
    """A logarithmic axis whose ticks are read without powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save(fig, axes, file: Path) -> None:
    from matplotlib import pyplot

    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    write(file, lambda path: fig.savefig(path, format="svg", metadata={"Date": None}))
    pyplot.close(fig)


def figure(frame: pd.DataFrame, title: str, file: Path) -> None:
    """Measured against predicted, both with one standard error; the line is where they are equal."""
    fig, ax = axes(f"{title}: KL to BF16, nats per token")
    sets = list(dict.fromkeys(frame.options))
    for (rule, options), group in frame.groupby(["rule", "options"], sort=False):
        colour = COLOURS[sets.index(options) % len(COLOURS)]
        look = style(rule) | {"color": colour}
        if look["markerfacecolor"] != "white":
            look["markerfacecolor"] = colour
        ax.errorbar(
            group.predicted, group.measured, group.measured_stderr.astype(float),
            group.predicted_stderr.astype(float), label=f"{rule}, {options}", **look,
        )  # fmt: skip
    both = [*frame.predicted, *frame.measured]
    ends = [min(both), max(both)]
    ax.plot(ends, ends, color="grey", linewidth=1, label="equal")
    logarithmic(ax.xaxis)
    logarithmic(ax.yaxis)
    ax.set_xlabel("predicted")
    ax.set_ylabel("measured")
    save(fig, ax, file)
