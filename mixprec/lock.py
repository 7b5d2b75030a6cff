"""Who computes a cell: a lock file in its folder, on one machine or on many that share the folder.

A lock's process is known to live or to be dead on its own machine, by its id and start time. Seen from another
machine it lives as long as its file is touched. No two clocks are compared for that, so that none can be
wrong: whoever waits sees whether the file's time stamp changes while its own monotonic clock runs for LEASE seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "lock.json"
BEAT = 15.0  # seconds between two touches of a lock's file
LEASE = 150.0  # without a touch; NFS may show a time stamp that is a minute old

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


@dataclass(frozen=True)
class Holder:
    """A process. machine: this boot of this host and this name space of process ids; None: not known.

    began: its start in clock ticks since the boot, which no setting of a clock changes.
    """

    host: str
    machine: str | None
    pid: int
    began: int | None
    since: str
    token: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    @property
    def dead(self) -> bool | None:
        """None: it is on another machine, and who looks from here cannot tell."""
        if self.machine is None or self.machine != _machine():
            return None
        return _began(self.pid) != self.began


class Busy(Exception):
    """The cell is computed by another process; the text says which."""


class Lock:
    """This process computes the cell in `folder` until it lets go. See `take`."""

    def __init__(self, folder: Path, guard: Path, holder: Holder):
        self.folder, self.guard, self.holder = folder, guard, holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()
        _held[folder] = self

    def held(self) -> bool:
        """False if another took it, which it may if this process stood still for LEASE seconds."""
        return read(self.folder) == self.holder

    def let_go(self) -> None:
        self._stop.set()
        self._thread.join()
        _held.pop(self.folder, None)
        with guarded(self.guard):
            if self.held():
                (self.folder / NAME).unlink(missing_ok=True)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # a lock that stays is found to be of a dead process
            self.let_go()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                if self.held():
                    os.utime(self.folder / NAME)  # by the clock of whoever serves the file


_held: dict[Path, Lock] = {}
_seen: dict[tuple[Path, str], tuple[int, float]] = {}  # a lock -> its time stamp, and seen when


def take(folder: Path, guard: Path) -> Lock:
    """Take the lock of the cell in `folder`, from a dead process if need be. Raises Busy, OSError.

    guard: a file that all runners lock for the moments in which a dead process's lock changes hands.
    """
    me = Holder(
        socket.gethostname(), _machine(), os.getpid(), _began(os.getpid()),
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), os.urandom(8).hex(),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    while not _create(folder, me):
        other = read(folder)
        if other is None and not (folder / NAME).exists():
            continue  # it was let go just now
        if not abandoned(folder, other):
            raise Busy(f"being computed by {other or 'an unknown process'}")
        with guarded(guard) as safe:
            if not safe:
                raise Busy(
                    f"{other or 'its process'} is dead, but no lock can be had in this file system to take its "
                    f"place; remove {folder / NAME}"
                )
            if read(folder) == other:
                with contextlib.suppress(FileNotFoundError):  # as in _create
                    _put(folder, me)
                    break
    return Lock(folder, guard, me)


def check(folder: Path) -> None:
    """Raise Busy if this process had the lock of `folder` and has lost it."""
    lock = _held.get(folder)
    if lock is not None and not lock.held():
        raise Busy(
            f"this process stood still; now being computed by {read(folder) or 'another process'}"
        )


def read(folder: Path) -> Holder | None:
    """Who holds the lock of `folder`; None: nobody, or it cannot be read."""
    try:
        return Holder(**json.loads((folder / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def abandoned(folder: Path, holder: Holder | None) -> bool:
    """Is the holder dead? From another machine: asked again, it is so at the soonest after LEASE."""
    if holder is not None and holder.dead is not None:
        return holder.dead
    try:
        stamp = (folder / NAME).stat().st_mtime_ns
    except OSError:
        return False
    now, key = time.monotonic(), (folder, holder.token if holder else "")
    before, since = _seen.setdefault(key, (stamp, now))
    if stamp != before:
        _seen[key] = (stamp, now)
        return False
    return now - since >= LEASE


def silence(folder: Path) -> float:
    """Seconds since the lock of `folder` was touched, by this machine's clock: to show, not to decide."""
    try:
        return max(0.0, time.time() - (folder / NAME).stat().st_mtime)
    except OSError:
        return 0.0


@contextlib.contextmanager
def guarded(guard: Path) -> Iterator[bool]:
    """One process at a time; False where the file system has no such locks."""
    with guard.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            yield False
            return
        yield True  # closing the file lets go


def _create(folder: Path, me: Holder) -> bool:
    """Make the lock's file, with its content, unless there is one."""
    file, aside = folder / NAME, folder / f".{NAME}.{me.token}.tmp"
    try:
        aside.write_text(_text(me), encoding="utf-8")
        try:
            os.link(aside, file)
        except (FileExistsError, FileNotFoundError):  # or who has the lock tidied `aside` away
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                with file.open("x", encoding="utf-8") as stream:
                    stream.write(_text(me))
            except FileExistsError:
                return False
        return True
    finally:
        aside.unlink(missing_ok=True)


def _put(folder: Path, me: Holder) -> None:
    aside = folder / f".{NAME}.{me.token}.tmp"
    try:
        aside.write_text(_text(me), encoding="utf-8")
        aside.replace(folder / NAME)
    finally:
        aside.unlink(missing_ok=True)


def _text(holder: Holder) -> str:
    return json.dumps(asdict(holder))


def _machine() -> str | None:
    """What distinguishes boots of hosts, and containers of a host, from each other; None: not Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _began(pid: int) -> int | None:
    """When process `pid` of this machine began, in clock ticks since the boot; None if it is dead."""
    try:
        # The name in brackets may hold anything; after it: state, …, the 22nd field is the start.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
