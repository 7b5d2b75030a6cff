"""A result is there whole or not at all."""

import dataclasses
import errno
import fcntl
import json
import os
import random
import time

import pandas as pd
import pytest
from conftest import cell

from mixprec import lock
from mixprec.cell import SCHEMA
from mixprec.store import Store, sealed, write, write_json


@pytest.fixture
def stored(tmp_path):
    one, store = cell("baseline=low"), Store(tmp_path)
    store.start(one)
    store.finish(
        one, {"hash": one.hash, "config": one.settings}, {"layers": {}}, pd.DataFrame({"a": [1]})
    )
    return one, store, store.folder(one)


def test_a_finished_cell_is_found_again(stored):
    one, store, folder = stored
    assert store.look_up(one).state == "same"
    assert {p.name for p in folder.iterdir()} == {
        "result.json", "allocation.json", "samples.parquet", "status.json",
    }  # fmt: skip
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "done" and status["pid"] and status["host"]
    assert status["started"] <= status["finished"]


def test_what_differs_is_named(stored):
    one, store, _ = stored
    other = cell("baseline=low", "eval.seed=7", "model.bos=true")
    assert other.path == one.path
    found = store.look_up(other)
    assert found.state == "other"
    assert found.why == "eval.seed: 1234 -> 7; model.bos: False -> True"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"hash": 1}', "\x00\xff"])
def test_a_damaged_result_is_noticed(stored, text):
    one, store, folder = stored
    (folder / "result.json").write_text(text)
    found = store.look_up(one)
    assert found.state == "other" and "cannot be read" in found.why


def test_a_cell_without_result_is_missing(stored):
    one, store, folder = stored
    (folder / "result.json").unlink()
    assert store.look_up(one).state == "missing"


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})

    def breaks(path):
        path.write_text('{"x":')
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(file, breaks)
    assert json.loads(file.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_never_stored_and_does_not_cost_the_old_result(stored):
    one, store, folder = stored
    with pytest.raises(ValueError):
        store.finish(one, {"hash": one.hash, "acc": float("nan")}, {}, pd.DataFrame())
    assert store.look_up(one).state == "same"
    assert json.loads((folder / "result.json").read_text())["config"] == one.settings


def test_a_plan_keeps_every_cell_once(tmp_path):
    store = Store(tmp_path)
    store.add_to_plan("x", [cell("baseline=low"), cell("baseline=bf16")])
    store.add_to_plan("x", [cell("baseline=low"), cell("baseline=high")])
    plan = json.loads((tmp_path / "plans/x.json").read_text())
    assert [c["path"].split("/")[-1] for c in plan["cells"]] == ["low", "bf16", "high"]


# --- what is stored is what was stored --------------------------------------------------------


@pytest.fixture
def whole(tmp_path):
    one, store = cell("baseline=low"), Store(tmp_path)
    finish(store, one, acc=0.25)
    return one, store, store.folder(one)


def finish(store, one, acc):
    result = {"schema": SCHEMA, "hash": one.hash, "config": one.settings, "acc": acc}
    samples = pd.DataFrame({"correct": [True]})
    with store.claim(one):
        store.start(one)
        store.finish(one, result, {"layers": {"a": "mxfp4"}, "acc": acc}, samples, {"tasks": {}})


@pytest.mark.parametrize("name", ["result.json", "allocation.json", "correct.json"])
@pytest.mark.parametrize("how", ["cut off", "bit flipped"])
def test_every_damage_is_noticed_named_and_left_alone(whole, name, how):
    one, store, folder = whole
    file = folder / name
    text, rng = file.read_bytes(), random.Random(0)
    for _ in range(60):
        place = rng.randrange(len(text))
        flipped = bytes([text[place] ^ 1 << rng.randrange(8)])
        changed = text[:place] if how == "cut off" else text[:place] + flipped + text[place + 1 :]
        file.write_bytes(changed)
        found = store.settled(one)
        assert found.failed and name in found.message and "force=true" in found.message
        assert file.read_bytes() == changed
    file.write_bytes(text)
    assert store.settled(one).state == "stored"


def test_a_missing_file_is_noticed_but_for_samples(whole):
    one, store, folder = whole
    (folder / "samples.parquet").unlink()  # it is not committed
    assert store.look_up(one).state == "same"
    (folder / "allocation.json").unlink()
    assert store.look_up(one).why == "allocation.json is missing"


def test_an_older_schema_is_named(whole):
    one, store, folder = whole
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", sealed({**result, "schema": 0}, result["files"]))
    assert store.look_up(one).why == f"result.json has schema 0, and this version reads {SCHEMA}"


def test_a_result_without_hashes_says_how_to_get_them(whole):
    one, store, folder = whole
    result = json.loads((folder / "result.json").read_text())
    del result["content_hash"]
    write_json(folder / "result.json", result)
    found = store.look_up(one)
    assert found.state == "other" and "python -m mixprec.verify --migrate" in found.why


def test_a_full_disk_never_costs_what_is_stored(whole, monkeypatch):
    one, store, folder = whole
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    original, left = os.fsync, [0]

    def full(file):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return original(file)

    tried = 0
    while tried < 20:
        left[0] = tried + 2  # the status that it is running takes two
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                finish(store, one, acc=0.5)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                break
        if json.loads((folder / "result.json").read_text())["acc"] == 0.5:
            break  # it was in place, and the status alone was not written
        now = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert {k: v for k, v in now.items() if k != "status.json"} == {
            k: v for k, v in before.items() if k != "status.json"
        }
        assert store.look_up(one).state == "same"
        tried += 1
    assert tried == 4  # allocation, samples, correct, result
    assert store.look_up(one).state == "same"


def test_a_plan_that_has_its_cells_is_not_written_again(tmp_path):
    store = Store(tmp_path)
    store.add_to_plan("x", [cell("baseline=low"), cell("baseline=bf16")])
    (tmp_path / "plans").chmod(0o500)
    before = (tmp_path / "plans/x.json").stat().st_mtime_ns
    store.add_to_plan("x", [cell("baseline=low")])
    assert (tmp_path / "plans/x.json").stat().st_mtime_ns == before


# --- who computes a cell ----------------------------------------------------------------------


@pytest.fixture
def free(tmp_path):
    return cell("baseline=low"), Store(tmp_path)


def in_child(act) -> int:
    """Fork, do it there, and end at once: what is held stays held. The exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            code = act() or 0
        except BaseException:
            code = 99
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_cell_is_computed_by_one_process_which_the_others_name(free):
    one, store = free
    with store.claim(one) as mine:
        with pytest.raises(lock.Busy, match=f"pid {os.getpid()} on .* since 20"):
            store.claim(one)
        assert store.state(one) == ("running", str(mine.holder))
    store.claim(one).let_go()
    assert store.state(one)[0] == "missing"


def test_the_lock_of_a_dead_process_is_taken_over(free):
    one, store = free
    assert in_child(lambda: store.claim(one) and store.start(one)) == 0
    assert store.state(one)[0] == "stale" and "died" in store.state(one)[1]
    with store.claim(one):
        assert store.state(one)[0] == "running"


def test_a_process_that_is_not_reaped_yet_is_dead(free):
    one, store = free
    pid = os.fork()
    if pid == 0:
        store.claim(one)
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    store.claim(one).let_go()
    os.waitpid(pid, 0)


def left_by(store, one, **changes):
    """A lock as this process would have made it, but for `changes`."""
    mine = store.claim(one)
    mine.let_go()
    file = store.folder(one) / lock.NAME
    file.write_text(json.dumps({**dataclasses.asdict(mine.holder), "token": "other", **changes}))
    return file


def test_another_process_with_the_same_id_is_not_the_holder(free):
    one, store = free
    left_by(store, one, began=1)
    store.claim(one).let_go()


@pytest.mark.parametrize("clock", [0, 10**9, -(10**9)])
def test_another_machines_lock_holds_until_it_was_silent_for_long(free, monkeypatch, clock):
    """By the waiting process's own monotonic clock: whatever the time stamps say."""
    one, store = free
    file = left_by(store, one, machine="another boot", host="far")
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def touched(at):
        os.utime(file, (time.time() + clock + at,) * 2)

    def busy():
        with pytest.raises(lock.Busy, match="on far since"):
            store.claim(one)
        return True

    touched(0)
    assert busy()
    now[0] += lock.LEASE - 1
    assert busy()
    touched(-30)  # its clock was set back between two touches: it lives all the same
    now[0] += 2
    assert busy()
    now[0] += lock.LEASE - 1
    assert busy()
    now[0] += 1
    store.claim(one).let_go()


def test_a_silent_lock_of_another_machine_is_shown_as_stale(free):
    one, store = free
    file = left_by(store, one, machine="another boot", host="far")
    assert store.state(one)[0] == "running"
    os.utime(file, (time.time() - 2 * lock.LEASE,) * 2)
    state, why = store.state(one)
    assert state == "stale" and "on far" in why and "has been silent for 30" in why


def test_of_many_that_find_a_dead_lock_one_takes_it(free):
    one, store = free

    def attempt() -> int:
        try:
            store.claim(one)
        except lock.Busy:
            return 1
        time.sleep(0.3)  # the holder lives while the others try
        return 0

    for _ in range(5):
        left_by(store, one, began=1)
        pids = []
        for _ in range(6):
            pid = os.fork()
            if pid == 0:
                os._exit(attempt())
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert sorted(codes) == [0, 1, 1, 1, 1, 1]


def test_without_locks_of_the_file_system_a_dead_lock_is_named_and_left(free, monkeypatch):
    one, store = free
    file = left_by(store, one, began=1)

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(lock.Busy, match=f"remove {file}"):
        store.claim(one)


def test_a_result_is_not_stored_by_who_has_lost_the_lock(free):
    one, store = free
    mine = store.claim(one)
    store.start(one)
    holder = dataclasses.replace(mine.holder, host="far", machine="another boot", token="other")
    (store.folder(one) / lock.NAME).write_text(json.dumps(dataclasses.asdict(holder)))
    with pytest.raises(lock.Busy, match=r"stood still; now being computed by pid .* on far"):
        store.finish(one, {"hash": one.hash}, {}, pd.DataFrame({"a": [1]}))
    mine.let_go()
    assert lock.read(store.folder(one)) == holder
    assert not (store.folder(one) / "result.json").exists()


def test_what_was_left_beside_a_whole_result_is_tidied(whole):
    one, store, folder = whole

    def die() -> None:  # between its result and its status
        store.claim(one)
        store.start(one)
        (folder / "partial").mkdir()
        (folder / ".result.json.1-a.tmp").touch()

    in_child(die)
    store.tidy(one)
    assert {file.name for file in folder.iterdir()} == {
        "result.json", "allocation.json", "correct.json", "samples.parquet", "status.json",
    }  # fmt: skip
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
