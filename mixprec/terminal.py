"""What a sweep shows while it runs: a line a cell on a terminal, plain lines anywhere else.

Libraries show by tqdm how far they are. While a sweep runs none of their bars draws anything; the one that moved
last says how far the stage of the cell is. Nothing here may cost a cell.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mixprec.cell import Cell, Config
from mixprec.store import Outcome, Store

log = logging.getLogger(__name__)

SHOWN = {"shown": True}  # `extra` of a log line that says what the lines of the cells say
PLAIN_SECONDS = 30  # between two plain lines about one cell
ENOUGH = 0.05  # of a stage: from there on its own pace says what remains of it


@dataclass
class _Line:
    """A cell, as it is shown. Times are of time.monotonic()."""

    cell: Cell
    expected: float | None = None  # seconds, as mixprec.estimate has it
    state: str = "waiting"
    began: float | None = None
    seconds: float | None = None  # that it took
    stage: str = ""
    bar: object = None  # the bar that moved last
    bar_began: float = 0.0
    fraction: float | None = None  # of that bar
    accuracy: dict | None = None  # acc, stderr, n, tasks


@dataclass
class _Sweep:
    lines: dict[str, _Line]  # by hash
    results: Path
    console: object = None  # rich's, on a terminal
    live: object = None  # its live lines
    now: _Line | None = None
    said: float = 0.0
    restore: list = field(default_factory=list)


_sweep: _Sweep | None = None


def start(cells: list[Cell], cfg: Config) -> None:
    """Show `cells` from here on: by live lines if standard output is a terminal."""
    global _sweep
    stop()
    expected = _estimated(cells, cfg)
    lines = {cell.hash: _Line(cell, expected.get(cell.hash)) for cell in cells}
    _sweep = _Sweep(lines, Path(cfg.results))
    _take_bars(_sweep)
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from rich.console import Console
        from rich.live import Live

        _sweep.console = Console()
        _sweep.live = Live(
            console=_sweep.console, get_renderable=_rendered, refresh_per_second=4, transient=True
        )
        _sweep.live.start()


def stop() -> bool:
    """Show nothing more. True if the lines were live: they are gone, and said what is not logged."""
    global _sweep
    if _sweep is None:
        return False
    live = _sweep.live
    if live is not None:
        live.stop()
    for undo in _sweep.restore:
        undo()
    _sweep = None
    return live is not None


def begin(cell: Cell) -> None:
    """`cell` is next. Hydra has set up logging anew for it."""
    if _sweep is None or cell.hash not in _sweep.lines:
        return
    line = _sweep.now = _sweep.lines[cell.hash]
    line.state, line.began = "running", time.monotonic()
    _sweep.said = time.monotonic()
    if _sweep.live is not None:
        for handler in logging.getLogger().handlers:
            handler.addFilter(lambda record: not getattr(record, "shown", False))


def stage(name: str) -> None:
    """The cell of now is at another of its stages."""
    if _sweep is not None and _sweep.now is not None:
        _sweep.now.stage, _sweep.now.bar, _sweep.now.fraction = name, None, None


def so_far(counts: dict[str, tuple[int, int]]) -> None:
    """Task -> (documents that are complete, how many of them are right)."""
    if _sweep is not None and _sweep.now is not None:
        _sweep.now.accuracy = _mean(counts)


def end(outcome: Outcome) -> None:
    """What became of the cell of now."""
    if _sweep is None or outcome.cell.hash not in _sweep.lines:
        return
    line = _sweep.lines[outcome.cell.hash]
    line.state, line.accuracy = outcome.state, None
    if outcome.state == "done":
        line.seconds = time.monotonic() - line.began
    if outcome.state in ("done", "stored"):
        with suppress(OSError, ValueError, KeyError):
            file = _sweep.results / outcome.cell.path / "result.json"
            result = json.loads(file.read_text(encoding="utf-8"))
            line.accuracy = result["mean"] | {"tasks": len(result["metrics"])}
    _sweep.now = None


def table(outcomes: list[Outcome], results: Path) -> str:
    """A sweep's cells in short, for its end; empty if none has a result."""
    from mixprec import markup, tables

    stored: dict[str, tables.Row] = {}
    for outcome in outcomes:
        for path in (outcome.cell.path, outcome.cell.reference_path):
            with suppress(OSError, ValueError, KeyError, TypeError):
                stored[path] = _row(results, path)
    rows = [
        tables.Row(one.cell.path, one.cell.settings, None, one.message)
        if one.failed or one.cell.path not in stored
        else stored[one.cell.path]
        for one in outcomes
    ]
    if all(row.result is None for row in rows):
        return ""
    texts = []
    for evaluation, part in tables.frame(rows, stored).groupby("eval", sort=False):
        texts.append(f"{evaluation}\n\n{markup.markdown(tables.summary(part)).strip()}")
    return "\n\n".join(texts)


def _row(results: Path, path: str):
    from mixprec import paired, tables

    result = json.loads((results / path / "result.json").read_text(encoding="utf-8"))
    answers = paired.read(results / path, result)
    return tables.Row(path, result["config"], result, answers=answers)


# --- the bars of libraries --------------------------------------------------------------------


class _Nowhere(io.TextIOBase):
    """Where bars write what they draw. It says to be a terminal, for some would not move otherwise."""

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return True


def _take_bars(sweep: _Sweep) -> None:
    from tqdm.std import tqdm

    made, drawn, nowhere = tqdm.__init__, tqdm.display, _Nowhere()

    def make(bar, *args, **kwargs):
        made(bar, *args[:4], **{**kwargs, "file": nowhere})

    def draw(bar, msg=None, pos=None):
        _moved(bar)
        return True

    def undo():
        tqdm.__init__, tqdm.display = made, drawn

    tqdm.__init__, tqdm.display = make, draw
    sweep.restore.append(undo)


def _moved(bar) -> None:
    line = _sweep.now if _sweep is not None else None
    if line is None or not bar.total:
        return
    if line.bar is not bar:
        line.bar, line.bar_began = bar, time.monotonic()
    line.fraction = min(1.0, bar.n / bar.total)
    if _sweep.live is None and time.monotonic() - _sweep.said > PLAIN_SECONDS:
        _sweep.said = time.monotonic()
        log.info("  %s", _plain(line))


# --- what is said -----------------------------------------------------------------------------


def _plain(line: _Line) -> str:
    parts = [f"{line.stage} {100 * line.fraction:.0f} %"]
    if line.accuracy:
        acc = line.accuracy
        parts.append(f"accuracy so far {_accuracy(acc)} (n={acc['n']}, {_of_tasks(line)})")
    if (left := _remaining(line)) is not None:
        parts.append(f"{_clock(left)} left")
    return f"{', '.join(parts)}; {_total()}"


def _total() -> str:
    lines = list(_sweep.lines.values())
    over = sum(line.state not in ("waiting", "running") for line in lines)
    times = [_remaining(line) for line in lines if line.state in ("waiting", "running")]
    known = [time for time in times if time is not None]
    text = f"{over} of {len(lines)} cells are over"
    if known and len(known) == len(times):
        text += f", about {_clock(sum(known))} left"
    return text


def _remaining(line: _Line) -> float | None:
    """Seconds; None if unknown: by the evaluation's own pace, or by what cells are expected to take."""
    now = time.monotonic()
    if line.state == "running" and line.stage == "evaluate" and (line.fraction or 0) > ENOUGH:
        return (now - line.bar_began) * (1 - line.fraction) / line.fraction
    whole = _expected(line)
    if whole is None or line.state == "waiting":
        return whole
    return max(0.0, whole - (now - line.began))


def _expected(line: _Line) -> float | None:
    """As estimated, corrected by what this sweep's cells took; without an estimate, their mean."""
    over = [other for other in list(_sweep.lines.values()) if other.seconds is not None]
    if line.expected is not None:
        pace = [other.seconds / other.expected for other in over if other.expected]
        return line.expected * (statistics.median(pace) if pace else 1)
    return statistics.mean(other.seconds for other in over) if over else None


def _estimated(cells: list[Cell], cfg: Config) -> dict[str, float]:
    """Hash -> seconds of the cells that are to be run, where something like them was measured here."""
    store = Store(Path(cfg.results))
    to_run = [cell for cell in cells if cfg.force or store.settled(cell) is None]
    if not to_run:
        return {}
    try:
        from mixprec import estimate, plan

        machine, sizes = plan.Machine.this(), plan.sizes_of(to_run)
        results, found = plan.results_here(store, machine), {}
        for place, cell in enumerate(to_run):
            if size := sizes[str(cell.model.name)]:
                dtype = estimate.arithmetic(cell.model, machine.device)
                found[cell.hash] = estimate.seconds(cell, size, results, to_run[:place], dtype)
        return found
    except Exception:  # an estimate is not worth a sweep
        log.debug("no estimate", exc_info=True)
        return {}


def _mean(counts: dict[str, tuple[int, int]]) -> dict:
    """As a result's mean: unweighted over the tasks, ± from each task's own documents."""
    from mixprec.evaluate import harness

    metrics = {}
    for task, (n, correct) in counts.items():
        acc = correct / n
        stderr = math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else None
        metrics[task] = {"acc": acc, "stderr": stderr, "n": n}
    return harness.mean(metrics) | {"tasks": len(metrics)}


def _accuracy(mean: dict) -> str:
    error = mean["stderr"]
    return f"{mean['acc']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _of_tasks(line: _Line) -> str:
    return f"{line.accuracy['tasks']} of {len(line.cell.eval.tasks)} tasks"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# --- live -------------------------------------------------------------------------------------

_STYLES = {"done": "green", "stored": "green", "failed": "red", "running": "bold", "waiting": "dim"}


def _rendered():
    """The cells around the one of now that fit the screen, a line each, and the sweep's last line."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if _sweep is None:
        return Text()
    console = _sweep.console
    lines = list(_sweep.lines.values())
    common = os.path.commonpath([line.cell.path for line in lines]) if len(lines) > 1 else ""
    now = lines.index(_sweep.now) if _sweep.now else sum(x.state != "waiting" for x in lines)
    room = max(3, console.height - 5)
    first = max(0, min(now - room // 2, len(lines) - room))
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("cell", no_wrap=True, overflow="ellipsis", ratio=1)
    with_bar = console.width >= 100
    for name in (
        "state",
        *(("",) if with_bar else ()),
        "",
        "accuracy so far",
        "n",
        "tasks",
        "time",
    ):
        right = name in ("", "n", "time")
        grid.add_column(name, no_wrap=True, justify="right" if right else "left")
    for line in lines[first : first + room]:
        running = line.state == "running"
        known = line.fraction if running else None
        bar = ProgressBar(total=1, completed=known, width=12) if known is not None else ""
        acc, left = (
            line.accuracy,
            _remaining(line) if line.state in ("running", "waiting") else None,
        )
        when = "" if left is None else f"{_clock(left)} left" if running else f"≈ {_clock(left)}"
        grid.add_row(
            line.cell.path.removeprefix(common).lstrip("/"),
            line.stage if running and line.stage else line.state,
            *((bar,) if with_bar else ()),
            "" if known is None else f"{100 * known:.0f} %",
            _accuracy(acc) if acc else "",
            str(acc["n"]) if acc else "",
            f"{acc['tasks']}/{len(line.cell.eval.tasks)}" if acc else "",
            when if line.seconds is None else _clock(line.seconds),
            style=_STYLES.get(line.state, ""),
        )
    hidden = len(lines) - len(lines[first : first + room])
    total = _total() + (f"; {hidden} cells not shown" if hidden else "")
    return (
        Group(Text(common, style="dim"), grid, Text(total)) if common else Group(grid, Text(total))
    )
