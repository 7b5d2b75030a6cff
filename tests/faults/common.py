"""A sweep of tiny cells that is forked from a warm process: a trial takes a second or two, not ten.

Every script here is resumable: a trial is a line in `--log`, and those that are there are not made again.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a process whose threads are at work cannot be forked

import mixprec.environment  # noqa: F401, I001 - first, as in run.py

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.conftest import CACHE, _tiny_model, tiny_overrides
from omegaconf import OmegaConf

from mixprec import runner, store, sweep
from mixprec.cell import cell_of
from mixprec.evaluate.tasks import tasks_of
from mixprec.sweep import configuration

BASELINES = ("fisher", "bf16", "low", "tail8")
# What no two runs have in common, and how a run came by what it has.
NOT_COMPARED = ("seconds", "peak_memory_bytes", "resumed", "content_hash")


class World:
    """A place of its own in `folder` for one tiny model, its cells and what they are when undisturbed."""

    def __init__(self, folder: Path, documents: int = 20):
        self.folder, self.results, self.cache = folder, folder / "results", folder / "cache"
        model = _tiny_model("llama", folder / "model")
        (folder / "cache").mkdir()
        (folder / "cache/documents").symlink_to((CACHE / "documents").resolve())
        small = [*tiny_overrides(model), f"model.limit={documents}", "tracking=off", "budget=5"]
        self.configs = [
            configuration(
                *small, f"results='{self.results}'", f"cache='{self.cache}'", f"baseline={baseline}"
            )
            for baseline in BASELINES
        ]
        self.cells = [cell_of(cfg) for cfg in self.configs]
        runner._load(self.cells[0], self.cache)  # what a child need not do again
        tasks_of(self.cells[0].eval, self.cache)
        self.seconds = 0.0
        self.reference = self.undisturbed()

    def undisturbed(self) -> dict[str, tuple]:
        began = time.monotonic()
        assert wait(self.start()) == 0, self.output()
        self.seconds = time.monotonic() - began
        found = self.stored()
        assert len(found) == len(self.cells), self.output()
        self.clear()
        return found

    def start(self, prepare: Callable[[], object] = lambda: None) -> int:
        """Fork a process that runs the whole sweep; its id. Its exit code is that of run.py."""
        pid = os.fork()
        if pid:
            return pid
        code = 99
        try:
            output = os.open(self.folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.argv[1:] = []  # those of the trials are not run.py's
            sweep._progress = sweep._Progress(cells=self.cells, cfg=self.configs[0])
            prepare()
            code = sweep.main(self._sweep)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def _sweep(self) -> None:
        for cfg in self.configs:
            sweep.run_one(OmegaConf.structured(cfg))

    def clear(self) -> None:
        """As if nothing had been run, nor scored."""
        shutil.rmtree(self.results, ignore_errors=True)
        for name in ("scores", "reference", "autoscheme"):
            shutil.rmtree(self.cache / name, ignore_errors=True)
        (self.folder / "output").unlink(missing_ok=True)

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def stored(self) -> dict[str, tuple]:
        """Cell -> what is compared of everything stored for it. Raises Damaged if it is not whole."""
        found = {}
        for cell in self.cells:
            folder = self.results / cell.path
            try:
                result = store.read(folder)
            except FileNotFoundError:
                continue
            if (why := store.unsealed(folder, result)) is not None:
                raise store.Damaged(f"{cell}: {why}")
            files = {
                name: (folder / name).read_bytes()
                for name in ("allocation.json", "correct.json", "samples.parquet")
            }
            found[cell.path] = comparable(result), files
        return found

    def resumed(self) -> int:
        """Cells of which something was taken from before."""
        return sum("resumed" in store.read(self.results / cell.path) for cell in self.cells)

    def wrong(self) -> list[str]:
        """What is not as it should be among the stored cells, whichever these are; a line each."""
        try:
            found = self.stored()
        except store.Damaged as error:
            return [str(error)]
        return [
            f"{path}: differs from the undisturbed one"
            for path in found
            if found[path] != self.reference[path]
        ]

    def unfinished(self) -> list[str]:
        """What is missing of a whole sweep, or was left behind by it; a line each."""
        lines = [f"{p}: missing" for p in self.reference.keys() - self.stored().keys()]
        for path in self.reference:
            expected = {
                "result.json",
                "allocation.json",
                "correct.json",
                "samples.parquet",
                "status.json",
            }
            there = {file.name for file in (self.results / path).iterdir()}
            lines += [f"{path}: {name}" for name in there ^ expected]
            state = json.loads((self.results / path / "status.json").read_text())["state"]
            if state != "done":
                lines.append(f"{path}: status {state}")
        return lines


def comparable(result: dict) -> dict:
    kept = {key: value for key, value in result.items() if key not in NOT_COMPARED}
    # Whether scores lay in the cache is how a run came by them.
    notes = {k: v for k, v in result["notes"].items() if not k.endswith("_stored")}
    # Nor whether somebody commits meanwhile: what code ran decides whether a stage counts.
    provenance = {k: v for k, v in result["provenance"].items() if k != "git"}
    return {**kept, "notes": notes, "provenance": provenance}


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def alive(pid: int) -> bool:
    """False once, when it has ended; it is reaped then."""
    return os.waitpid(pid, os.WNOHANG)[0] == 0


def writes(act: Callable[[int], object], below: Path) -> None:
    """Call `act(n)` before the n-th operation of this process that changes a file below a folder."""
    state = {"count": 0, "busy": False}
    place = str(below)
    changes = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree"}

    def hook(event: str, arguments: tuple) -> None:
        if state["busy"] or (event != "open" and event not in changes):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, Path)) else place
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if not path.startswith(place):
            return
        state["count"] += 1
        state["busy"] = True
        try:
            act(state["count"])
        finally:
            state["busy"] = False

    sys.addaudithook(hook)


def trials(what: str, default: int) -> Iterator[tuple[int, Callable[[dict], None]]]:
    """(number, how to note its outcome) of every trial that is not in the log; sums up at the end.

    An outcome has `wrong`: a list of lines, empty if all is well. Exits with 1 if any is not.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--trials", type=int, default=default)
    parser.add_argument("--log", type=Path, help="go on after the trials in this file")
    chosen = parser.parse_args()
    log = chosen.log or Path(tempfile.mkdtemp()) / "trials.jsonl"
    rows = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    for number in range(len(rows), chosen.trials):

        def note(row: dict, number=number) -> None:
            rows.append({"trial": number, **row})
            with log.open("a") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
            for line in row["wrong"]:
                print(f"trial {number}: {line}", flush=True)

        yield number, note
    bad = sum(bool(row["wrong"]) for row in rows)
    more = {
        key: sum(row.get(key, 0) for row in rows)
        for key in sorted({k for row in rows for k in row if isinstance(row[k], int)} - {"trial"})
    }
    counted = "".join(f", {value} {key}" for key, value in more.items())
    print(f"{what}: {len(rows)} trials{counted}; {bad} went wrong")
    if bad:
        sys.exit(1)
