"""What of an unfinished cell is finished: its allocation, its KL, its answers batch by batch.

They lie in `partial/` in the cell's folder until the cell is whole. They count only for the same cell, the same
code and packages, the same model and the same kind of machine: what is taken from before is what would be computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import time
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path

from mixprec.cell import digest
from mixprec.store import write_json

log = logging.getLogger(__name__)

SYNC = 5.0  # seconds after which answers are on the disk itself; a dead process loses none of them
CHUNK = 1024  # requests of an engine that does not say when a batch is finished


def _code() -> str:
    root = Path(__file__).resolve().parent
    files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*.py"))}
    return digest(
        {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    )


CODE = _code()  # sha256 over the sources of mixprec/ as this process read them


class Partial:
    """The folder `partial/` of one cell.

    taken: what was there already, in words; seconds: what the answers in it took.
    """

    def __init__(self, folder: Path, key: dict):
        """key: whatever decides that the stages are the same; with another one `folder` is emptied."""
        self.folder, self.taken, self.seconds = folder, [], 0.0
        self._calls = 0
        if self._read("about") != key:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(folder / "about.json", key)

    def read(self, stage: str) -> dict | None:
        """What `keep` was given for the stage; None if it is to be done."""
        value = self._read(stage)
        if value is not None:
            self.taken.append(stage)
        return value

    def keep(self, stage: str, value: dict) -> None:
        write_json(self.folder / f"{stage}.json", value)

    def answers(self, requests: list, size: int) -> Answers:
        """What is known of the next call for log-likelihoods. size: of its batches."""
        self._calls += 1
        found = Answers(self.folder / f"answers-{self._calls}.log", identity(requests), size)
        self.seconds += sum(seconds for seconds, _ in found.finished.values())
        if found.finished:
            self.taken.append(f"{len(found.finished)} batches of evaluate")
            log.info("  evaluate: %d batches are taken from before", len(found.finished))
        return found

    def _read(self, stage: str) -> dict | None:
        try:
            return json.loads((self.folder / f"{stage}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


class Answers:
    """A line a finished batch, each with its checksum; what follows a line that is torn is cut off.

    size: of the batches that the lines are of, which a later run must use too: arithmetic differs in
    its last bits between batches of one size and another.
    """

    def __init__(self, file: Path, requests: str, size: int):
        self.finished: dict[int, tuple[float, list]] = {}
        head, good = {"requests": requests, "size": size}, 0
        with contextlib.suppress(FileNotFoundError):
            lines = file.read_bytes().splitlines(keepends=True)
            found = _unsigned(lines[0]) if lines else None
            if found and found["requests"] == requests:
                head, good = found, len(lines[0])
                for line in lines[1:]:
                    value = _unsigned(line)
                    if value is None:
                        break
                    number, seconds, answers = value
                    self.finished[number] = seconds, [(value, greedy) for value, greedy in answers]
                    good += len(line)
        self.size = head["size"]
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._file, good)
        self._clock = self._synced = time.monotonic()
        if not good:
            self._append(head)

    def get(self, number: int) -> list[tuple[float, bool]] | None:
        """The answers of batch `number`, in its own order; None: to be computed."""
        self._clock = time.monotonic()
        return self.finished[number][1] if number in self.finished else None

    def add(self, number: int, answers: list[tuple[float, bool]]) -> None:
        """Keep the answers of a batch for whose answers `get` was asked before; unless one is not finite."""
        if all(math.isfinite(value) for value, _ in answers):
            self._append([number, round(time.monotonic() - self._clock, 3), answers])

    def close(self) -> None:
        os.close(self._file)

    def _append(self, value) -> None:
        line = _signed(value)
        written = os.write(self._file, line)
        if written < len(line):  # a disk that is full says so at the next byte only
            os.write(self._file, line[written:])
        if time.monotonic() - self._synced > SYNC:
            os.fsync(self._file)
            self._synced = time.monotonic()


def by_chunks(ask: Callable[[list], list], requests: list, partial: Partial | None) -> list:
    """`ask(requests)`; with `partial` in chunks of CHUNK, in order, but for those whose answers are there."""
    if partial is None:
        return ask(requests)
    known, answers = partial.answers(requests, CHUNK), []
    for number, begin in enumerate(range(0, len(requests), known.size)):
        found = known.get(number)
        if found is None:
            found = [(float(v), bool(g)) for v, g in ask(requests[begin : begin + known.size])]
            known.add(number, found)
        answers += found
    known.close()
    return answers


def identity(requests: list) -> str:
    """sha256 of what requests (texts, context, continuation) ask, as token ids."""
    found = hashlib.sha256()
    for _, context, continuation in requests:
        found.update(array("q", [len(context), *context, -1, *continuation, -1]).tobytes())
    return found.hexdigest()


def _signed(value) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _unsigned(line: bytes):
    """What `_signed` made `line` of; None if it is not whole."""
    checksum, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
        return None
    return json.loads(text)
