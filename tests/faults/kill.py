"""kill -9 at random moments: no partial or wrong result, and the resumed sweep's equal an undisturbed one's.

Half of the moments are uniform over the sweep's time, half over its operations on files in results/. Every
fifth trial sends SIGTERM instead, as a cluster does: the exit code then is 75.
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

from mixprec.store import PREEMPTED
from tests.faults.common import World, alive, trials, wait, writes

OPERATIONS = 190  # a few more than a sweep has: the kill then does not come


def kill_once(world: World, rng: random.Random, by: signal.Signals) -> tuple[bool, list[str]]:
    """Run the sweep and kill it: (False if it ended before that, what is wrong about its end)."""
    expected = PREEMPTED if by == signal.SIGTERM else -by
    if rng.random() < 0.5:
        pid = world.start()
        time.sleep(rng.uniform(0.02, world.seconds))  # before that it is not a sweep yet
        if not alive(pid):
            return False, []
        os.kill(pid, by)
        code = wait(pid)
    else:
        at = rng.randint(1, OPERATIONS)

        def die(number: int) -> None:
            if number == at:
                os.kill(os.getpid(), by)

        code = wait(world.start(lambda: writes(die, world.results)))
    # It may have been at its very end.
    return code == expected, [] if code in (expected, 0) else [f"exit code {code}"]


def trial(world: World, number: int) -> dict:
    """One to three kills, each of the run that goes on after the one before; then a run to the end."""
    rng = random.Random(number)
    by = signal.SIGTERM if number % 5 == 4 else signal.SIGKILL
    world.clear()
    wrong, kills = [], 0
    for _ in range(rng.choice((1, 2, 3))):
        killed, found = kill_once(world, rng, by)
        kills += killed
        wrong += found + world.wrong()
    if (code := wait(world.start())) != 0:
        wrong.append(f"the resumed sweep ended with {code}: {world.output()[-500:]}")
    wrong += world.wrong() + world.unfinished()
    return {by.name: kills, "cells resumed inside": world.resumed(), "wrong": wrong}


if __name__ == "__main__":
    world = None
    for number, note in trials("kill -9", 195):
        world = world or World(Path(tempfile.mkdtemp()))
        note(trial(world, number))
