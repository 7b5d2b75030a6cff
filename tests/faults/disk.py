"""A disk that is full at each write of a sweep in turn: a clear error, earlier results whole, resumes after.

A tmpfs of a megabyte, which a file fills before the n-th operation on results/. Needs root, or `unshare -rm`.
"""

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from tests.faults.common import World, trials, wait, writes

OPERATIONS = 190  # more than a sweep has, so that each is tried


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as place:
        mount = ["mount", "-t", "tmpfs", "tmpfs", place]
        if subprocess.run(mount, capture_output=True).returncode:
            return False
        return subprocess.run(["umount", place]).returncode == 0


def fill(folder: Path) -> None:
    """Leave not one byte free."""
    file = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with contextlib.suppress(OSError):
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(file, b"\0" * size)
    os.close(file)


def trial(world: World, at: int) -> dict:
    """Fill the disk before operation `at`; then make space and go on."""
    world.clear()
    (disk := world.results.parent / "disk").mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    world.results.symlink_to(disk)
    try:
        reached = world.folder / "reached"
        reached.unlink(missing_ok=True)

        def full(number: int) -> None:
            if number == at:
                reached.touch()
                fill(disk)

        code = wait(world.start(lambda: writes(full, world.results)))
        wrong, text = world.wrong(), world.output()
        if reached.exists() and code == 0 and "failed: " in text:
            wrong.append("a failed cell, and exit code 0")
        if code not in (0, 1):
            wrong.append(f"exit code {code}: {text[-500:]}")
        if code == 1 and "No space left on device" not in text:
            wrong.append(f"no clear error: {text[-500:]}")
        if "Traceback" in text:
            wrong.append(f"a traceback: {text[-800:]}")
        (disk / "filler").unlink(missing_ok=True)
        if (code := wait(world.start())) != 0:
            wrong.append(f"with space again: exit code {code}: {world.output()[-500:]}")
        wrong += world.wrong() + world.unfinished()
        return {"full": int(reached.exists()), "wrong": wrong}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        world.results.unlink()


if __name__ == "__main__":
    world = None
    for number, note in trials("disk full", OPERATIONS):
        world = world or World(Path(tempfile.mkdtemp()), documents=5)
        note(trial(world, number + 1))
