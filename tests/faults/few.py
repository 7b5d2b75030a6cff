"""A few of each fault, for `make test`: the whole counts are `make test-faults`."""

import os
import random
import tempfile
from pathlib import Path

from tests.faults import damage, disk, kill, runners
from tests.faults.common import World, trials, wait

if __name__ == "__main__":
    world = World(Path(tempfile.mkdtemp()), documents=5)
    todo = [lambda number=number: kill.trial(world, number) for number in (0, 4)]
    todo += [lambda: runners.trial(world, 3, False, random.Random(0))]
    if os.geteuid() == 0 and disk.can_mount():
        todo += [lambda number=number: disk.trial(world, number) for number in (25,)]

    def broken(number: int) -> dict:
        world.clear()
        assert wait(world.start()) == 0
        return damage.trial(world, number)

    todo += [lambda number=number: broken(number) for number in (1,)]
    for number, note in trials("few", len(todo)):
        note(todo[number]())
