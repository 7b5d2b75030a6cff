"""Results on disk: one folder a cell, each file whole or not there, result.json written last.

result.json ends with `files`, the sha256 of the files beside it, and `content_hash`, the sha256 of everything above:
a file that was cut off, changed by a fault or edited by hand is noticed, named, and never overwritten by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixprec import lock, secrets
from mixprec.cell import SCHEMA, Cell, differences

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the exit code of a run that is to be started again
MIGRATE = "python -m mixprec.verify --migrate"


class Preempted(SystemExit):
    """SIGTERM: the process is wanted elsewhere. What is finished is kept; the exit code is PREEMPTED."""

    def __init__(self):
        super().__init__(PREEMPTED)


class Damaged(ValueError):
    """A stored file is not what was stored; the text says which and how, in one line."""


@dataclass(frozen=True)
class Stored:
    """What lies where a cell belongs: `missing`, `same`, or `other` (then `why`, in one line)."""

    state: str
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: `done`, `stored` (it was there already), `failed` (and why), or `elsewhere`.

    elsewhere: another process computes it (the message says which).
    """

    cell: Cell
    state: str
    message: str = ""

    @property
    def failed(self) -> bool:
        return self.state == "failed"


class Store:
    """The folder `results/`."""

    def __init__(self, root: Path):
        self.root = root

    def folder(self, cell: Cell) -> Path:
        return self.root / cell.path

    def look_up(self, cell: Cell) -> Stored:
        """Is `cell` stored? `other` if a result of another configuration lies in its place."""
        try:
            result = read(self.folder(cell))
        except FileNotFoundError:
            return Stored("missing")
        except Damaged as error:
            return Stored("other", str(error))
        if result["hash"] != cell.hash:
            found = differences(result["config"], cell.settings)
            return Stored("other", "; ".join(found) or "its hash differs")
        why = unsealed(self.folder(cell), result)
        return Stored("other", why) if why else Stored("same")

    def settled(self, cell: Cell) -> Outcome | None:
        """The outcome of a cell that need not or must not be run; None: run it."""
        stored = self.look_up(cell)
        if stored.state == "missing":
            return None
        if stored.state == "same":
            return Outcome(cell, "stored")
        message = f"another result is stored there: {stored.why}; force=true reruns it"
        return Outcome(cell, "failed", message)

    def state(self, cell: Cell) -> tuple[str, str]:
        """(stored, other, or as of `unfinished`; why, in one line, where there is a reason)."""
        stored = self.look_up(cell)
        if stored.state != "missing":
            return ("stored", "") if stored.state == "same" else ("other", stored.why)
        return unfinished(self.folder(cell))

    def claim(self, cell: Cell) -> lock.Lock:
        """Compute `cell` in this process alone. Raises lock.Busy if another does, OSError."""
        return lock.take(self.folder(cell), self._guard)

    def tidy(self, cell: Cell) -> None:
        """Remove what a process left that died after it stored `cell` and before it had cleaned up."""
        folder = self.folder(cell)
        names = {file.name for file in folder.iterdir()}
        left = names & {lock.NAME, "partial"} or any(name.endswith(".tmp") for name in names)
        if left or _status(folder).get("state") in ("running", "preempted"):
            with contextlib.suppress(OSError, lock.Busy), self.claim(cell):
                self._whole(cell)

    def results(self) -> list[dict]:
        """Every result of today's schema below the folder."""
        found = []
        for file in sorted(self.root.rglob("result.json")):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(file.read_text(encoding="utf-8")))
        return [result for result in found if result.get("schema") == SCHEMA]

    def start(self, cell: Cell) -> None:
        self._remove_temporary(cell)
        self._status(
            cell, state="running", host=socket.gethostname(), pid=os.getpid(), started=_now()
        )

    def partial(self, cell: Cell) -> Path:
        """Where the finished stages of an unfinished cell lie: mixprec/partial.py."""
        return self.folder(cell) / "partial"

    def finish(
        self,
        cell: Cell,
        result: dict,
        allocation: dict,
        samples: pandas.DataFrame,
        correct: dict | None = None,
    ) -> None:
        """Store a finished cell: all files aside, then each in place, its result.json last.

        correct: as of `paired.bits`. Raises OSError, and then what was stored before is whole; lock.Busy
        if this process has lost the cell's lock to another.
        """
        folder = self.folder(cell)
        makers = {
            "allocation.json": lambda path: path.write_text(_json(allocation), encoding="utf-8"),
            "samples.parquet": lambda path: _write_samples(samples, path),
        }
        if correct is not None:
            makers["correct.json"] = lambda path: path.write_text(_json(correct), encoding="utf-8")
        _json(result)  # raises before anything is written
        aside: dict[str, Path] = {}
        try:
            for name, make in makers.items():
                aside[name] = _aside(folder / name, make)
            files = {name: _sha256(path) for name, path in sorted(aside.items())}
            text = _json(sealed(result, files))
            aside["result.json"] = _aside(
                folder / "result.json", lambda path: path.write_text(text, encoding="utf-8")
            )
            lock.check(folder)
            # From here on nothing is written, so nothing can run out.
            (folder / "result.json").unlink(missing_ok=True)
            last = aside.pop("result.json")
            for name in list(aside):
                aside.pop(name).replace(folder / name)
            with contextlib.suppress(OSError):  # the files have their names; hashes tell the rest
                _sync(folder)
            last.replace(folder / "result.json")
            with contextlib.suppress(OSError):
                _sync(folder)
        finally:
            for path in aside.values():
                path.unlink(missing_ok=True)
        self._whole(cell)

    def _remove_temporary(self, cell: Cell) -> None:
        for left in self.folder(cell).glob(".*.tmp"):  # of a process that died
            left.unlink(missing_ok=True)

    def _whole(self, cell: Cell) -> None:
        self._remove_temporary(cell)
        shutil.rmtree(self.partial(cell), ignore_errors=True)
        try:
            self._status(cell, state="done", finished=_now())
        except OSError as error:
            log.warning("  stored, but status.json could not be written: %s", one_line(error))

    def preempt(self, cell: Cell) -> None:
        """Note that a cell was stopped from outside; what is finished of it is kept."""
        self._status(cell, state="preempted", finished=_now())

    def fail(self, cell: Cell, error: str) -> None:
        """Note why a cell failed; a result that was stored before stays."""
        self._status(cell, state="failed", error=error, finished=_now())

    def keep_scores(self, folder: Path) -> None:
        """Copy a model's scores to `scores/`, where tables and figures find them without the cache.

        A cell that was stopped does not need them again: they may be gone with the cache.
        """
        for name in ("scores.parquet", "about.json"):
            target = self.root / "scores" / folder.name / name
            if not target.is_file() and (folder / name).is_file():
                write(target, lambda path, name=name: shutil.copyfile(folder / name, path))

    def add_to_plan(self, experiment: str, cells: list[Cell]) -> None:
        """Note which cells an experiment consists of, so that its table can show what is missing."""
        file = self.root / "plans" / f"{experiment}.json"
        rows = [{"path": c.path, "hash": c.hash, "config": c.settings} for c in cells]
        if _planned(file).items() >= {row["path"]: row for row in rows}.items():
            return  # and a folder that cannot be written to is no hindrance
        self.root.mkdir(parents=True, exist_ok=True)
        with lock.guarded(self._guard):  # another runner may add its own cells
            known = _planned(file) | {row["path"]: row for row in rows}
            write_json(file, {"experiment": experiment, "cells": list(known.values())})

    @property
    def _guard(self) -> Path:
        return self.root / ".lock"

    def _status(self, cell: Cell, **fields: Any) -> None:
        file = self.folder(cell) / "status.json"
        before = {} if fields["state"] == "running" else _status(file.parent)
        write_json(file, {**before, **fields})


def read(folder: Path) -> dict:
    """The result in `folder`, if its text is what was stored. Raises FileNotFoundError or Damaged.

    A result without a content hash is returned too: `unsealed` says so.
    """
    try:
        text = (folder / "result.json").read_bytes().decode()
        result = json.loads(text)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise Damaged(f"result.json cannot be read ({one_line(error)})") from None
    if not isinstance(result, dict) or not {"config", "hash"} <= result.keys():
        raise Damaged("result.json cannot be read (no configuration and hash in it)")
    if "content_hash" in result and not _as_stored(text, result):
        raise Damaged("result.json is not what was stored: its content hash differs")
    if result.get("schema", SCHEMA) != SCHEMA:
        raise Damaged(f"result.json has schema {result['schema']}, and this version reads {SCHEMA}")
    return result


def _as_stored(text: str, result: dict) -> bool:
    try:
        # The text too: another one, such as more digits, can stand for the same values.
        return text == _json(result) and result["content_hash"] == content_hash(result)
    except ValueError:  # a NaN
        return False


def unsealed(folder: Path, result: dict) -> str | None:
    """Why `result` and the files beside it may not be what was stored, in one line; or None."""
    if "content_hash" not in result:
        return f"result.json has no content hash; if it is of an older version, `{MIGRATE}` adds it"
    for name, expected in result["files"].items():
        if name == "samples.parquet":
            continue  # not committed, and large: mixprec/verify.py reads it
        try:
            if _sha256(folder / name) != expected:
                return f"{name} is not what was stored: its hash in result.json differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({one_line(error)})"
    return None


def sealed(result: dict, files: dict[str, str]) -> dict:
    """`result` with the sha256 of the files beside it, by name, and its own content hash."""
    whole = {k: v for k, v in result.items() if k not in ("files", "content_hash")}
    whole["files"] = files
    return {**whole, "content_hash": content_hash(whole)}


def content_hash(result: dict) -> str:
    """sha256 of result.json's text without its last line, the content hash itself."""
    rest = {key: value for key, value in result.items() if key != "content_hash"}
    return hashlib.sha256(_json(rest).encode()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of the files that lie beside a result, by name."""
    names = ("allocation.json", "correct.json", "samples.parquet")
    return {name: _sha256(folder / name) for name in names if (folder / name).is_file()}


def unfinished(folder: Path) -> tuple[str, str]:
    """(running, stale, preempted, failed or missing; why, in one line) of a cell without a result.

    stale: its process died without a word. On another machine that is what a long silence looks like.
    """
    status = _status(folder)
    state, error = status.get("state"), status.get("error", "")
    who = f"pid {status.get('pid')} on {status.get('host')} since {status.get('started')}"
    if (folder / lock.NAME).exists():
        holder, silence = lock.read(folder), lock.silence(folder)
        dead = holder.dead if holder else None
        if dead is False or (dead is None and silence < lock.LEASE):
            return "running", str(holder or who)
        if dead is None:
            return "stale", f"{holder or who} has been silent for {silence:.0f} s"
        return "stale", f"{holder} died"
    if state == "running":
        return "stale", f"{who} died"
    return (state, error) if state in ("preempted", "failed") else ("missing", "")


def write_json(file: Path, value: Any) -> None:
    text = _json(value)
    write(file, lambda path: path.write_text(text, encoding="utf-8"))


def _json(value: Any) -> str:
    # allow_nan: a NaN in a result is a fault that must not be stored, not a number.
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write(file: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write aside, then put it in place: `file` is whole, or as it was before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(file, make)
    try:
        aside.replace(file)
        _sync(file.parent)
    finally:
        aside.unlink(missing_ok=True)


def _aside(file: Path, make: Callable[[Path], object]) -> Path:
    """What `make` writes, whole and on the disk, under a name of its own beside `file`."""
    aside = file.with_name(f".{file.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        make(aside)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def _sync(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write_samples(samples: pandas.DataFrame, path: Path) -> None:
    with path.open("wb") as stream:
        samples.to_parquet(stream, index=False)


def _status(folder: Path) -> dict:
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _planned(file: Path) -> dict[str, dict]:
    """A plan's cells by path; none if there is no plan."""
    try:
        return {row["path"]: row for row in json.loads(file.read_text("utf-8"))["cells"]}
    except FileNotFoundError:
        return {}


def one_line(error: BaseException) -> str:
    """What went wrong, without tokens: this is printed, stored and handed to W&B."""
    text = secrets.message(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
