"""Stored files cut off, with a flipped bit, of an older schema or edited: noticed, named, rerun only if asked."""

import json
import random
import tempfile
from pathlib import Path

from mixprec import store, sweep
from tests.faults.common import World, trials, wait

FILES = ("result.json", "result.json", "allocation.json", "correct.json")


def damaged(text: bytes, how: str, rng: random.Random) -> bytes:
    if how == "truncated":
        return text[: rng.randrange(len(text))]
    if how == "bit flipped":
        place = rng.randrange(len(text))
        return text[:place] + bytes([text[place] ^ 1 << rng.randrange(8)]) + text[place + 1 :]
    if how == "older schema":
        return text.replace(b'"schema": 1', b'"schema": 0', 1)
    value = json.loads(
        text
    )  # edited: one number or word of it becomes another, well-formed all through
    place = value
    while isinstance(place, (dict, list)) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        holder, key = place, rng.choice(keys)
        place = holder[key]
    holder[key] = place + 1 if type(place) in (int, float) else f"{place}x"
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def trial(world: World, number: int) -> dict:
    rng = random.Random(number)
    how = ("truncated", "bit flipped", "older schema", "edited")[number % 4]
    name = "result.json" if how == "older schema" else rng.choice(FILES)
    which = rng.randrange(len(world.cells))
    cell, cfg = world.cells[which], world.configs[which]
    folder = world.results / cell.path
    before = (folder / name).read_bytes()
    after = damaged(before, how, rng)
    (folder / name).write_bytes(after)
    wrong = []
    found = sweep.run_cell(cell, cfg)
    if not found.failed or name not in found.message or "force=true" not in found.message:
        wrong.append(f"{name} {how}: {found.state} {found.message}")
    if (folder / name).read_bytes() != after:
        wrong.append(f"{name} {how}: was overwritten")

    def asked() -> None:  # in a process of its own
        sweep._progress.cells = [cell]
        cfg.force = True
        world.configs = [cfg]

    if (code := wait(world.start(asked))) != 0:
        wrong.append(f"with force=true: exit code {code}: {world.output()[-500:]}")
    wrong += world.wrong() + world.unfinished()
    if store.Store(world.results).look_up(cell).state != "same":
        wrong.append("not stored after force=true")
    return {how: 1, "wrong": wrong}


if __name__ == "__main__":
    world = None
    for number, note in trials("damage", 100):
        if world is None:
            world = World(Path(tempfile.mkdtemp()), documents=5)
            assert wait(world.start()) == 0
        note(trial(world, number))
