"""Two to eight runners on the same cells: each computed once, none twice, none missing.

In every fifth round one of them is killed: then each cell is stored once, by whoever it may be.
"""

import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from mixprec import runner, store, sweep
from tests.faults.common import World, alive, trials, wait


def note_work(file: Path) -> None:
    """Let this process write a line into `file` for every cell that it begins and that it stores."""
    sweep.POLL = 0.1
    compute, finish = runner._compute, store.Store.finish

    def line(text: str) -> None:
        with file.open("a") as stream:
            stream.write(f"{text}\n")

    def noted_compute(cell, *rest):
        line(f"begun {cell}")
        return compute(cell, *rest)

    def noted_finish(self, cell, *rest):
        line(f"stored {cell}")
        return finish(self, cell, *rest)

    runner._compute, store.Store.finish = noted_compute, noted_finish


def trial(world: World, runners: int, kill: bool, rng: random.Random) -> dict:
    world.clear()
    work = world.folder / "work"
    work.unlink(missing_ok=True)
    work.touch()
    pids = [world.start(lambda: note_work(work)) for _ in range(runners)]
    killed = 0
    if kill:
        victim = pids.pop(0)
        time.sleep(rng.uniform(0, world.seconds))
        killed = alive(victim)
        if killed:
            os.kill(victim, signal.SIGKILL)
            wait(victim)
    codes = [wait(pid) for pid in pids]
    wrong = [f"exit codes {codes}: {world.output()[-500:]}"] if any(codes) else []
    done = Counter(work.read_text().splitlines())
    for cell in world.cells:
        if done[f"stored {cell}"] != 1 or (not killed and done[f"begun {cell}"] != 1):
            wrong.append(f"{cell}: begun {done[f'begun {cell}']}, stored {done[f'stored {cell}']}")
    wrong += world.wrong() + world.unfinished()
    return {"runners": runners, "killed": int(killed), "wrong": wrong}


if __name__ == "__main__":
    world = None
    for number, note in trials("runners", 60):
        world = world or World(Path(tempfile.mkdtemp()))
        kill = number % 6 == 5
        note(trial(world, 2 + number % 7, kill, random.Random(number)))
