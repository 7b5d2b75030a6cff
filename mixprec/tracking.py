"""W&B: one run a cell. Whatever goes wrong here is one warning and costs no cell.

A run is written below results/wandb first, and uploaded from there by W&B's own `wandb sync`, in a process that
is given a limit: nothing is lost while W&B is down, and a server that never answers costs seconds. A run's id
is made from its cell's hash, and W&B replaces a run by one of the same id.

`python -m mixprec.tracking track` logs cells that are stored; `… sync` uploads what is not uploaded yet.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from mixprec.cell import TRACKING_MODES, Cell, Config, ConfigError, Tracking, digest
from mixprec.schemes import scheme_named
from mixprec.store import one_line, write

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 20  # for a cell's run, between two cells; after one failure there is no other
STILL_WRITTEN = 60  # seconds since the last change of a run that may not be finished yet
NO_GROUP = "no experiment"
DONE = "tracked"  # in a run's folder: it is whole, and the digest of what it was made from

_given_up = False  # W&B failed once in this process


def log_cell(cell: Cell, result: dict, allocation: dict, cfg: Config) -> None:
    """One finished cell as one run; after a failure, nothing for the rest of the process."""
    global _given_up
    if cfg.tracking.mode == "off" or _given_up:
        return
    try:
        results = Path(cfg.results)
        write_cell(cell.path, result, allocation, cfg.experiment, cfg.tracking, results)
        if cfg.tracking.mode == "online":
            upload(pending(results, _run_id(result)), UPLOAD_SECONDS)
    except Exception as error:
        _given_up = True
        log.warning(
            "  W&B: %s; results are stored all the same, tracking is off from here on "
            "(`make track` and `make sync` make up for it)",
            safe(error),
        )


def log_tables(tables: dict[str, object], tracking: Tracking, results: str) -> None:
    """The rendered tables (name -> pandas.DataFrame) as one run, the same one every time."""
    if tracking.mode == "off":
        return

    def fill(run) -> None:
        import wandb

        for name, frame in tables.items():
            run.log({f"tables/{name}": wandb.Table(dataframe=frame.astype(str))})

    content = {name: frame.to_csv() for name, frame in tables.items()}
    try:
        _write(
            fill, content, tracking, Path(results), id="tables", name="tables", job_type="tables"
        )
        if tracking.mode == "online":
            upload(pending(Path(results), "tables"), UPLOAD_SECONDS)
    except Exception as error:
        log.warning("W&B: %s", safe(error))


def write_cell(
    path: str, result: dict, allocation: dict, group: str | None, tracking: Tracking, results: Path
) -> bool:
    """Write a cell's run below results/wandb; False if it is there already, made from the same."""
    config = result["config"]

    def fill(run) -> None:
        import wandb

        logged = scalars(result)
        with tempfile.TemporaryDirectory() as folder:
            if layers := layer_table(allocation):
                picture = Path(folder) / "allocation.png"
                heat_map(layers, f"{path}, {result['realised_bits']:.3f} bits", picture)
                logged["allocation/heat_map"] = wandb.Image(str(picture))
                logged["allocation/layers"] = wandb.Table(
                    columns=list(layers[0]), data=[list(row.values()) for row in layers]
                )
            run.log(logged)
            run.summary.update({f"provenance/{k}": v for k, v in result["provenance"].items()})
            artifact = wandb.Artifact(f"allocation-{result['hash'][:16]}", type="allocation")
            file = Path(folder) / "allocation.json"
            file.write_text(json.dumps(allocation))
            artifact.add_file(str(file))
            run.log_artifact(artifact)

    options = config["options"]["name"] if config["options"] else "bf16"
    return _write(
        fill, [result, allocation], tracking, results,
        id=_run_id(result), name=path, group=group or NO_GROUP, job_type=config["baseline"]["name"],
        tags=[config["model"]["name"], options, path.split("/")[0]], config=config,
    )  # fmt: skip


def scalars(result: dict) -> dict[str, float]:
    """What is plotted of a cell: accuracy per task and in the mean, KL, bits, seconds, memory."""
    values = {f"acc/{task}": metric["acc"] for task, metric in result["metrics"].items()}
    values |= {f"stderr/{task}": m["stderr"] for task, m in result["metrics"].items()}
    values |= {"acc/mean": result["mean"]["acc"], "stderr/mean": result["mean"]["stderr"]}
    values["n"] = result["mean"]["n"]
    if result["kl"]:
        values |= {f"kl/{k}": v for k, v in result["kl"].items() if k != "per_sequence"}
    values |= {
        "kl/predicted": result["notes"].get("predicted_kl"),
        "kl/predicted_stderr": result["notes"].get("predicted_kl_stderr"),
        "bits/budget": result["config"]["budget"],
        "bits/realised": result["realised_bits"],
        "bits/realised_with_scales": result["realised_bits_with_scales"],
    }
    values |= {f"seconds/{stage}": s for stage, s in result["seconds"].items()}
    values |= {f"peak_memory_bytes/{k}": v for k, v in result["peak_memory_bytes"].items()}
    return {key: value for key, value in values.items() if value is not None}


def layer_table(allocation: dict) -> list[dict]:
    """A row a quantized linear: its name, block (from the embedding), kind, scheme and bits."""
    rows = []
    for name, scheme in allocation["layers"].items():
        place = re.search(r"\.(\d+)\.(.+)$", name)
        block, kind = (int(place[1]), place[2]) if place else (-1, name)
        rows.append(
            {
                "layer": name,
                "block": block,
                "linear": kind,
                "scheme": scheme,
                "bits": scheme_named(scheme).bits,
            }
        )
    return rows


def heat_map(layers: list[dict], title: str, file: Path) -> None:
    """A PNG of an allocation: blocks from the embedding to lm_head, kinds of linears, bits as colour."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["linear"] for row in layers))
    blocks = sorted({row["block"] for row in layers})
    grid = [[float("nan")] * len(blocks) for _ in kinds]
    for row in layers:
        grid[kinds.index(row["linear"])][blocks.index(row["block"])] = row["bits"]
    figure = Figure(
        figsize=(2.5 + 0.22 * len(blocks), 1.2 + 0.25 * min(len(kinds), 100)), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=LogNorm(2, 16))
    axes.set_title(title, fontsize="small")
    axes.set_xticks(range(0, len(blocks), 5), [str(block) for block in blocks[::5]])
    axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
    axes.set_xlabel("block, from the embedding to lm_head")
    widths = sorted({row["bits"] for row in layers})
    bar = figure.colorbar(image, ax=axes, label="bits")
    bar.set_ticks(widths, labels=[f"{bits:g}" for bits in widths])
    bar.minorticks_off()
    figure.savefig(file, dpi=100)


# --- runs on disk, and up ---------------------------------------------------------------------


def _run_id(result: dict) -> str:
    return f"cell-{result['hash'][:16]}"


def _folders(results: Path) -> dict[str, Path]:
    """Run id -> the newest folder that has it; older ones are what it replaces."""
    newest = {}
    for folder in sorted((results / "wandb").glob("offline-run-*")):  # then the time
        for file in folder.glob("run-*.wandb"):
            newest[file.stem.removeprefix("run-")] = folder
    return newest


def pending(results: Path, run_id: str | None = None) -> list[Path]:
    """Runs that are whole and not uploaded yet; all of them, or the one of `run_id`."""
    found = []
    for name, folder in _folders(results).items():
        if run_id in (None, name) and not _uploaded(folder):
            last = max((file.stat().st_mtime for file in folder.glob("*.wandb")), default=None)
            if last is not None and (
                (folder / DONE).is_file() or time.time() - last > STILL_WRITTEN
            ):
                found.append(folder)
    return found


def _write(
    fill: Callable[[object], None], content: object, tracking: Tracking, results: Path, **what
) -> bool:
    """Make the run `what` and `fill` it; False if the newest of this id was made from `content`."""
    mark, before = digest(content), _folders(results).get(what["id"])
    if before and (before / DONE).is_file() and (before / DONE).read_text() == mark:
        return False
    import wandb

    # Neither host, user, code nor installed packages: only what is handed over here is recorded.
    settings = wandb.Settings(
        console="off",
        silent=True,
        init_timeout=UPLOAD_SECONDS,
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        host="-",
    )
    results.mkdir(parents=True, exist_ok=True)
    with wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        mode="offline",
        dir=str(results),
        settings=settings,
        **what,
    ) as run:
        folder = Path(run.dir).parent
        fill(run)
    write(folder / DONE, lambda path: path.write_text(mark))
    return True


def upload(runs: list[Path], seconds: float) -> int:
    """`wandb sync` them; how many. One that another process is uploading is left to it.

    W&B marks a run that is uploaded by a file beside it, whatever becomes of the others. Raises
    RuntimeError or TimeoutError, in one line, if one is not uploaded by then.
    """
    from filelock import FileLock, Timeout

    with ExitStack() as locks:
        ours = []
        for run in runs:
            with suppress(Timeout):
                locks.enter_context(FileLock(run / ".sync.lock", timeout=0))
                ours += [] if _uploaded(run) else [run]
        if not ours:
            return 0
        said = limited(
            [sys.executable, "-m", "wandb", "sync", *map(str, ours)], seconds,
            WANDB_DIR=str(ours[0].parent.parent), NO_COLOR="1",  # for its own log
        )  # fmt: skip
    left = [run for run in ours if not _uploaded(run)]
    if left:
        raise RuntimeError(
            f"{len(left)} of {len(ours)} runs not uploaded: {said or 'no reason given'}"
        )
    return len(ours)


def _uploaded(run: Path) -> bool:
    return any(run.glob("*.wandb.synced"))


def limited(command: list[str], seconds: float, **environment: str) -> str:
    """Run a program that may talk to W&B; the last line it says.

    Raises TimeoutError after `seconds`, and RuntimeError with that line if the program fails.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"W&B did not answer within {seconds:g} s") from None
        finally:
            if process.poll() is None:  # too late, or this process is being interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = [line.strip() for line in output.read().splitlines() if line.strip()]
    last = lines[-1].removeprefix("wandb: ") if lines else ""
    if process.returncode:
        raise RuntimeError(last or f"exit code {process.returncode}")
    return last


def safe(error: Exception) -> str:
    """In one line, without the key."""
    text, key = one_line(error), os.environ.get("WANDB_API_KEY")
    return text.replace(key, "…") if key else text


# --- after the fact ---------------------------------------------------------------------------


def experiments(results: Path) -> dict[str, list[str]]:
    """Experiment -> the paths of its stored cells: those that were planned, and the printed tables'."""
    from mixprec import published, tables

    stored, plans = tables.read(results)
    found = {}
    for name, table in published.read(published.EXPERIMENTS).items():
        cells = tables.printed_frame(table, stored, plans.get(name, []))
        if not cells.empty:
            found[name] = [path for path in cells.path if path in stored]
    for name, rows in plans.items():
        found.setdefault(name, [row.path for row in rows if row.result is not None])
    return {name: paths for name, paths in found.items() if paths}


def track(results: Path, tracking: Tracking, only: str | None = None) -> tuple[int, int]:
    """Write the runs of stored cells; (how many were written, how many there are).

    only: an experiment. Raises ConfigError if no cell of it is stored.
    """
    from mixprec import tables

    groups = experiments(results)
    if only and only not in groups:
        raise ConfigError(f"only={only}: accepted: {', '.join(sorted(groups)) or 'none is stored'}")
    group_of = {path: name for name, paths in reversed(groups.items()) for path in paths}
    stored = tables.read(results)[0]
    paths = dict.fromkeys(groups[only]) if only else stored
    written = 0
    for path in paths:
        try:
            allocation = json.loads((results / path / "allocation.json").read_text())
        except (OSError, ValueError) as error:
            print(f"{path}: allocation.json cannot be read: {one_line(error)}", file=sys.stderr)
            continue
        group = only or group_of.get(path)
        written += write_cell(path, stored[path].result, allocation, group, tracking, results)
    return written, len(paths)


def sync(results: Path) -> tuple[int, int]:
    """Upload every run below results/wandb that is not yet; (how many now, how many before)."""
    runs, before = pending(results), sum(map(_uploaded, _folders(results).values()))
    return upload(runs, 60 + 20 * len(runs)), before


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mixprec.tracking")
    parser.add_argument("command", choices=["track", "sync"],
                        help="track: log stored cells; sync: upload what is not uploaded")  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--track", choices=[m for m in TRACKING_MODES if m != "off"],
                        default="offline", help="online: upload them too (default: offline)")  # fmt: skip
    parser.add_argument("--only", metavar="EXPERIMENT", help="its cells alone, such as table1")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "track":
            from mixprec.sweep import configuration

            tracking = configuration(f"tracking={chosen.track}").tracking
            written, there = track(chosen.results, tracking, chosen.only)
            print(f"{written} runs written, {there - written} were there: {chosen.results}/wandb")
        if chosen.command == "sync" or chosen.track == "online":
            uploaded, before = sync(chosen.results)
            print(f"{uploaded} runs uploaded, {before} were before")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"W&B: {safe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
