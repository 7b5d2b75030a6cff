"""The W&B dashboard as code: a workspace and a report over the runs that mixprec.tracking writes.

`python -m mixprec.dashboard` writes the specification, made and read back by wandb-workspaces' own models, to
results/dashboard/. With `--track online` it then creates both in the project, or updates the ones it created
before: what was changed in them by hand is replaced. The workspace is known by its name, the report by its title.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr
from wandb_workspaces.reports.v2 import internal as reports
from wandb_workspaces.workspaces import internal as workspaces

from mixprec import published, tracking
from mixprec.cell import ConfigError, Tracking
from mixprec.store import one_line, write

TITLE = "Mixed precision: accuracy and KL against bits"
VIEW = "nw-mixprec-v"  # W&B shows it as ?nw=mixprec
APPLY_SECONDS = 30
# A line and a group for each of these: cells that differ in more than their bits are never averaged.
GROUPS = ("baseline.name", "options.name", "model.name", "eval.limit")
COLUMNS = (
    "acc/mean", "stderr/mean", "n", "kl/mean", "kl/stderr", "kl/predicted",
    "bits/realised", "bits/realised_with_scales",
)  # fmt: skip
_BITS = "average bits per quantized weight, scales not counted"
_ACCURACY = "accuracy, unweighted mean over tasks"
_KL = "KL to BF16, nats per token"
_ABOUT = (
    "One run a cell: model, options, baseline, budget, evaluation. Accuracy is plain acc of lm-eval's tasks, "
    "stderr one standard error over documents, n their number. KL is in nats per token on text that was neither "
    "calibrated on nor evaluated, kl/stderr over its sequences. bits/realised is what was allocated, without scales. "
    "Two numbers that differ by less than two standard errors may well be equal; paired differences are in the tables."
)
_LAYERS = (
    "The scheme of every quantized linear. Block 0 follows the embedding and the last one precedes lm_head; head8 "
    "fills from lm_head, tail8 from the embedding."
)


def _summary(name: str) -> wr.SummaryMetric:
    return wr.SummaryMetric(name)


def _curves(width: int, height: int) -> list:
    """Accuracy and KL against bits, as lines by group and as one point a run, and KL as predicted."""

    def place(column: int, row: int) -> wr.Layout:
        return wr.Layout(x=column * width, y=row * height, w=width, h=height)

    point, bits = "${run:displayName}", _summary("bits/realised")
    return [
        wr.LinePlot(
            title="Accuracy against bits", x="bits/realised", y=["acc/mean"], title_x=_BITS,
            title_y=_ACCURACY, max_runs_to_show=100, smoothing_type="none", layout=place(0, 0),
        ),
        wr.LinePlot(
            title="KL against bits", x="bits/realised", y=["kl/mean"], title_x=_BITS, title_y=_KL,
            log_y=True, max_runs_to_show=100, smoothing_type="none", layout=place(1, 0),
        ),
        wr.ScatterPlot(
            title="Accuracy against bits, a point a cell", x=bits, y=_summary("acc/mean"),
            legend_template=point, layout=place(0, 1),
        ),
        wr.ScatterPlot(
            title="KL against bits, a point a cell", x=bits, y=_summary("kl/mean"), log_y=True,
            legend_template=point, layout=place(1, 1),
        ),
        wr.ScatterPlot(
            title="KL: measured against predicted", x=_summary("kl/predicted"), log_x=True,
            y=_summary("kl/mean"), log_y=True, legend_template=point, layout=place(0, 2),
        ),
    ]  # fmt: skip


def _tables(names: list[str], width: int, height: int) -> list:
    return [
        wr.WeavePanelSummaryTable(
            table_name=f"tables/{name}", layout=wr.Layout(y=place * height, w=width, h=height)
        )
        for place, name in enumerate(names)
    ]


def _layers(width: int, height: int) -> list:
    return [
        wr.MediaBrowser(
            title="Bits by block and linear", media_keys=["allocation/heat_map"], num_columns=2,
            mode="gallery", gallery_axis="run", layout=wr.Layout(w=width, h=height),
        ),
        wr.WeavePanelSummaryTable(
            table_name="allocation/layers", layout=wr.Layout(y=height, w=width, h=height)
        ),
    ]  # fmt: skip


def workspace(project: str, entity: str, tables: list[str]) -> ws.Workspace:
    """Panels in four sections; runs grouped by baseline, within it by what else must not be mixed."""
    compare = [wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=12))]
    made = ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            ws.Section(name=name, panels=panels, is_open=True)
            for name, panels in (
                ("Accuracy and KL against bits", _curves(12, 8)),
                ("Tables", _tables(tables, 24, 10)),
                ("Layers", _layers(24, 12)),
                ("Runs compared", compare),
            )
        ],
        settings=ws.WorkspaceSettings(x_axis="bits/realised", max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Config(name) for name in GROUPS],
            order=[expr.Ordering(expr.Summary("bits/realised"), ascending=True)],
            pinned_columns=[f"summary:{name}" for name in COLUMNS],
        ),
    )
    made._internal_name = VIEW
    return made


def report(project: str, entity: str, tables: list[str]) -> wr.Report:
    def grid(panels: list, grouped: bool) -> wr.PanelGrid:
        groupby = [f"config.{name}" for name in GROUPS] if grouped else []
        # Without entity and project it is the report's own project, and nobody is asked for its id.
        runs = wr.Runset(
            name="by baseline" if grouped else "cells", groupby=groupby,
            pinned_columns=["run:displayName", *(f"summary:{name}" for name in COLUMNS)],
        )  # fmt: skip
        return wr.PanelGrid(runsets=[runs], panels=panels)

    lines = [panel for panel in _curves(12, 8) if isinstance(panel, wr.LinePlot)]
    points = [panel for panel in _curves(12, 8) if isinstance(panel, wr.ScatterPlot)]
    return wr.Report(
        entity=entity,
        project=project,
        title=TITLE,
        description="Mixed-precision quantization under a budget of average bits per weight",
        width="fluid",
        blocks=[
            wr.TableOfContents(),
            wr.P(_ABOUT),
            wr.H1("Accuracy and KL against bits"),
            grid(lines, True),
            grid(points, False),
            wr.H1("Tables"),
            grid(_tables(tables, 24, 10), False),
            wr.H1("Layers"),
            wr.P(_LAYERS),
            grid(_layers(24, 12), False),
            wr.H1("Runs compared"),
            grid([wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=12))], False),
        ],
    )


# --- the specification ------------------------------------------------------------------------


def specification(project: str, entity: str, tables: list[str]) -> dict[str, str]:
    """File name -> JSON, as the library's models read it. Raises ValueError if they refuse it."""
    made = {
        "workspace.json": workspace(project, entity, tables)._to_model(),
        "report.json": report(project, entity, tables)._to_model(),
    }
    return {name: _json(read_back(name, _json(model))) for name, model in made.items()}


def read_back(name: str, text: str) -> workspaces.View | reports.ReportViewspec:
    """The library's model of what W&B stores. Its `from_model` loses a query panel's size (0.4.13)."""
    model = workspaces.View if name == "workspace.json" else reports.ReportViewspec
    return model.model_validate_json(text)


def _json(model) -> str:
    return model.model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n"


def apply(project: str, entity: str, tables: list[str]) -> str:
    """Create or update both in W&B; where they are, in one line. entity: "" is the key's own."""
    api = wandb.Api(timeout=APPLY_SECONDS)
    entity = entity or api.default_entity
    if project not in {one.name for one in api.projects(entity)}:
        api.create_project(project, entity)
    shown, written = workspace(project, entity, tables), report(project, entity, tables)
    for known in api.reports(f"{entity}/{project}"):
        if known.display_name == TITLE:
            written.id = known.id
    with suppress(ValueError):  # there is none yet
        shown._internal_id = workspaces.View.from_name(entity, project, VIEW).id
    written.save()
    shown.save()
    return f"workspace {shown.url}, report {written.url}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixprec.dashboard", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--track", choices=["off", "offline", "online"], default="offline",
                        help="online: create or update it in W&B too (default: offline)")  # fmt: skip
    chosen = parser.parse_args(arguments)
    from mixprec.sweep import configuration

    where: Tracking = configuration("tracking=online").tracking
    try:
        tables = ["all", *published.read(published.EXPERIMENTS)]
        folder = chosen.results / "dashboard"
        for name, text in specification(where.project, where.entity or "", tables).items():
            write(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    print(f"written: {folder}/workspace.json and report.json")
    if chosen.track != "online" or not os.environ.get("WANDB_API_KEY"):
        print("to apply it: set WANDB_API_KEY, then `make sync` and `make dashboard TRACK=online`")
        return 0
    arguments = (where.project, where.entity or "", tables)
    command = f"from mixprec import dashboard; print(dashboard.apply(*{arguments!r}))"
    try:  # in a process of its own, which can be ended if W&B never answers
        print(tracking.limited([sys.executable, "-c", command], APPLY_SECONDS))
    except Exception as error:
        print(f"W&B: {tracking.safe(error)}; the specification is in {folder}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
