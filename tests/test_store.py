"""A result is there whole or not at all."""

import json

import pandas as pd
import pytest
from conftest import cell

from mixprec.store import Store, write, write_json


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
