"""Predicted KL against average bits, and what was measured: from stored scores and results, no model.

`python -m mixprec.frontier` solves the knapsack at every STEP of bits for each signal whose scores are
nats per token, and puts the measured KL of the cells in results/ on top; then it compares each cell's
prediction with its measurement (predicted.py). It writes results/figures/*.svg and *.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mixprec import predicted, tables
from mixprec.allocate import scores
from mixprec.cell import baselines_that_take
from mixprec.schemes import BF16, Layer, realised_bits, scheme_named
from mixprec.store import write
from mixprec.tables import Row

STEP = 0.05  # bits


@dataclass(frozen=True)
class Scored:
    """One signal's stored scores. calibration: [samples, tokens]; table, lowest_kl: of `scores.stored`."""

    signal: str
    model: str
    model_hash: str
    options: list[str]
    calibration: list[int]
    layers: list[Layer]
    lowest_kl: list[float]
    seconds: dict[str, float]
    table: pd.DataFrame

    @property
    def label(self) -> str:
        return f"{self.signal}, predicted ({self.calibration[0]} × {self.calibration[1]} tokens)"


def stored_scores(results: Path) -> list[Scored]:
    """Every stored score below results/ that is in nats per token, those of more text last."""
    signals, found = baselines_that_take("target"), []
    for file in sorted((results / "scores").glob("*/about.json")):
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["signal"] in signals:
            layers = [Layer(name, *shape) for name, shape in about.pop("layers").items()]
            table = pd.read_parquet(file.with_name("scores.parquet"))
            found.append(Scored(**about, layers=layers, table=table))
    return sorted(found, key=lambda scored: scored.calibration)


def solved(scored: Scored, options: list[str], *, tied: bool = False) -> pd.DataFrame:
    """The frontier: the best allocation at every STEP from the lowest option to the highest.

    Columns budget and bits (allowed, taken), kl and stderr (predicted, nats per token; over
    calibration sequences). options: those that are scored, with bf16 or without.
    """
    schemes = [scheme_named(name) for name in options]
    lowest, highest = schemes[0].bits, schemes[-1].bits
    lines = []
    for place in range(round((highest - lowest) / STEP) + 1):
        budget = round(lowest + place * STEP, 6)
        allocation, kl, stderr = scores.best(
            scored.layers, schemes, scored.table, budget, tied=tied, lowest_kl=scored.lowest_kl
        )
        bits = realised_bits(scored.layers, allocation)
        lines.append({"budget": budget, "bits": bits, "kl": kl, "stderr": stderr})
    return pd.DataFrame(lines)


def measured(rows: list[Row]) -> pd.DataFrame:
    """Cells that were measured, equal ones once: columns name, budget, bits, kl, stderr.

    A budget is in bits; NaN for one scheme everywhere and for a target.
    """
    several = len({predicted.text_of(row.result) for row in rows}) > 1
    lines = []
    for row in rows:
        name = predicted.rule_of(row.config) + (f" ({row.group[0]})" if several else "")
        kl = row.result["kl"]
        lines.append(
            {
                "name": name,
                "budget": row.config["budget"],
                "bits": row.result["realised_bits"],
                "kl": kl["mean"],
                "stderr": kl["stderr"],
            }
        )
    columns = ["name", "budget", "bits", "kl", "stderr"]
    frame = pd.DataFrame(lines, columns=columns).drop_duplicates()  # two evaluations of one text
    return frame.sort_values(["name", "bits"], ignore_index=True)


def figure(curves: dict[str, pd.DataFrame], points: pd.DataFrame, title: str, file: Path) -> None:
    """Lines by signal, dashed where fused; points by baseline with one standard error."""
    fig, axes = predicted.axes(title)
    for place, (name, curve) in enumerate(curves.items()):
        style = "--" if name.endswith(predicted.FUSED) else "-"
        colour = predicted.COLOURS[place // 2 % len(predicted.COLOURS)]
        axes.plot(curve.bits, curve.kl, style, color=colour, linewidth=1.2, label=name)
    for name, cells in points.groupby("name", sort=False):
        axes.errorbar(
            cells.bits, cells.kl, cells.stderr.astype(float), label=name, **predicted.style(name)
        )
    axes.set_xlabel("average bits per quantized weight, scales not counted")
    axes.set_ylabel("KL to BF16, nats per token")
    predicted.logarithmic(axes.yaxis)
    predicted.save(fig, axes, file)


def render(results: Path) -> list[Path]:
    """Write the frontier of every model and option set that has scores and results."""
    rows = [row for row in tables.read(results)[0].values() if row.result.get("kl")]
    by_model: dict[tuple[str, str], list[Scored]] = {}
    for scored in stored_scores(results):
        by_model.setdefault((scored.model, scored.model_hash), []).append(scored)
    written = []
    for (model, model_hash), scored in by_model.items():
        own = [
            row
            for row in rows
            if row.model == model and row.result["provenance"]["model_hash"] == model_hash
        ]
        if not own:
            continue  # such as a model whose results lie in another folder
        sets = {tuple(one.options): "_".join(one.options) for one in scored}
        for row in own:  # bf16 needs no scores of its own
            options = row.config["options"]
            if options and tuple(n for n in options["schemes"] if n != BF16.name) in sets:
                sets[tuple(options["schemes"])] = options["name"]
        for options, name in sets.items():
            written += _render(model, list(options), name, scored, own, results / "figures")
    return written


def _render(
    model: str, options: list[str], name: str, scored: list[Scored], rows: list[Row], folder: Path
) -> list[Path]:
    plain = [option for option in options if option != BF16.name]
    curves = {}
    for one in scored:
        if one.options == plain:  # of several with one label, the last
            curves[one.label] = solved(one, options)
            curves[one.label + predicted.FUSED] = solved(one, options, tied=True)
    of_options = [
        r for r in rows if r.config["options"] and r.config["options"]["schemes"] == options
    ]
    points = measured(of_options)
    whole = pd.concat(
        [frame.assign(name=name, kind="predicted") for name, frame in curves.items()]
        + [points.assign(kind="measured")],
        ignore_index=True,
    )[["kind", "name", "budget", "bits", "kl", "stderr"]]
    svg, csv = (folder / f"frontier-{model}-{name}.{kind}" for kind in ("svg", "csv"))
    write(csv, lambda path: whole.to_csv(path, index=False))
    figure(curves, points, f"{model}, {', '.join(options)}", svg)
    return [svg, csv]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.frontier", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    chosen = parser.parse_args(arguments)
    written = render(chosen.results)
    if not written:
        names = ", ".join(baselines_that_take("target"))
        print(
            f"error: {chosen.results}/scores has no scores in nats per token of a model in {chosen.results}/; "
            f"accepted: those of baseline={names}, which a run stores",
            file=sys.stderr,
        )
        return 2
    text, files = predicted.render(chosen.results)
    print(text)
    print(f"written: {', '.join(str(file) for file in written + files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
