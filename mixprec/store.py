"""Results on disk: one folder a cell, each file whole or not there, result.json written last."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixprec import secrets
from mixprec.cell import SCHEMA, Cell, differences

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Stored:
    """What lies where a cell belongs: `missing`, `same`, or `other` (then `why`, in one line)."""

    state: str
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: `done`, `stored` (it was there already) or `failed` (and why)."""

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
        file = self.folder(cell) / "result.json"
        if not file.exists():
            return Stored("missing")
        try:
            result = json.loads(file.read_text())
            settings, stored_hash = result["config"], result["hash"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Stored("other", f"result.json cannot be read ({one_line(error)})")
        if stored_hash == cell.hash:
            return Stored("same")
        return Stored(
            "other", "; ".join(differences(settings, cell.settings)) or "its hash differs"
        )

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
        """(stored, other, failed, running or missing; why, in one line, where there is a reason)."""
        stored = self.look_up(cell)
        if stored.state != "missing":
            return ("stored", "") if stored.state == "same" else ("other", stored.why)
        try:
            status = json.loads((self.folder(cell) / "status.json").read_text())
            known = status["state"] if status["state"] in ("running", "failed") else "missing"
            return known, status.get("error", "")
        except (OSError, ValueError, KeyError, TypeError):
            return "missing", ""

    def results(self) -> list[dict]:
        """Every result of today's schema below the folder."""
        found = []
        for file in sorted(self.root.rglob("result.json")):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(file.read_text()))
        return [result for result in found if result.get("schema") == SCHEMA]

    def start(self, cell: Cell) -> None:
        self._status(
            cell, state="running", host=socket.gethostname(), pid=os.getpid(), started=_now()
        )

    def finish(self, cell: Cell, result: dict, allocation: dict, samples: pandas.DataFrame) -> None:
        """Store a finished cell. Its result.json is the last file to appear."""
        folder = self.folder(cell)
        _json(result), _json(allocation)  # raises before anything that is stored is touched
        (folder / "result.json").unlink(missing_ok=True)
        write_json(folder / "allocation.json", allocation)
        write(folder / "samples.parquet", lambda path: samples.to_parquet(path, index=False))
        write_json(folder / "result.json", result)
        self._status(cell, state="done", finished=_now())

    def fail(self, cell: Cell, error: str) -> None:
        """Note why a cell failed; a result that was stored before stays."""
        self._status(cell, state="failed", error=error, finished=_now())

    def add_to_plan(self, experiment: str, cells: list[Cell]) -> None:
        """Note which cells an experiment consists of, so that its table can show what is missing."""
        file = self.root / "plans" / f"{experiment}.json"
        planned = json.loads(file.read_text())["cells"] if file.exists() else []
        known = {row["path"]: row for row in planned}
        for cell in cells:
            known[cell.path] = {"path": cell.path, "hash": cell.hash, "config": cell.settings}
        write_json(file, {"experiment": experiment, "cells": list(known.values())})

    def _status(self, cell: Cell, **fields: Any) -> None:
        file = self.folder(cell) / "status.json"
        try:
            before = {} if fields["state"] == "running" else json.loads(file.read_text())
        except (OSError, ValueError):
            before = {}
        write_json(file, {**before, **fields})


def write_json(file: Path, value: Any) -> None:
    text = _json(value)
    write(file, lambda path: path.write_text(text, encoding="utf-8"))


def _json(value: Any) -> str:
    # allow_nan: a NaN in a result is a fault that must not be stored, not a number.
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write(file: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write aside, then put it in place: `file` is whole, or as it was before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        make(aside)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.replace(file)
        directory = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        aside.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """What went wrong, without tokens: this is printed, stored and handed to W&B."""
    text = secrets.message(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
