"""W&B offline, read back with W&B's own reader; runs made of stored cells; and W&B that fails or hangs."""

import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import CACHE, ROOT, cell, configuration, tiny_overrides

from mixprec import runner, tables, tracking
from mixprec.cell import Tracking, cell_of

KEY = "k" * 40
OFFLINE = Tracking("offline", "mixprec")


def runs(results: Path) -> list[Path]:
    return sorted((results / "wandb").glob("offline-run-*"))


def records(run: Path) -> dict[str, list]:
    lines = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "leet", "inspect", str(run), "--json"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    found: dict[str, list] = {}
    for record in map(json.loads, lines):
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


@pytest.fixture(autouse=True)
def not_given_up(monkeypatch):
    monkeypatch.setattr(tracking, "_given_up", False)


@pytest.fixture
def tracked(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    cfg = configuration(
        *tiny_overrides(tiny["llama"]), "baseline=tail8", "experiment=demo", "eval.limit=2",
        f"results='{tmp_path}'", f"cache='{CACHE}'", "tracking=offline",
    )  # fmt: skip
    one = cell_of(cfg)
    assert runner.run(one, cfg).state == "done"
    return one, tmp_path


@pytest.fixture
def stored(tmp_path):
    """Results with three committed cells of table 1."""
    names = ("mxfp4_mxfp8/fisher-5", "mxfp4_mxfp8/ours-5", "none/bf16")
    for name in names:
        place = f"five-250/smollm2_135m/{name}"
        (tmp_path / place).mkdir(parents=True)
        for file in ("result.json", "allocation.json"):
            shutil.copy(ROOT / "results" / place / file, tmp_path / place)
    return tmp_path


@pytest.fixture
def hanging(monkeypatch, tmp_path_factory):
    """A server that takes connections and never answers, as W&B's; a planted key; a home of its own."""
    home = tmp_path_factory.mktemp("home")
    server = socket.create_server(("127.0.0.1", 0))
    taken = []

    def take():
        while True:
            try:
                taken.append(server.accept())
            except OSError:
                return

    threading.Thread(target=take, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(home))
    yield taken, home
    server.close()
    for connection, _ in taken:
        connection.close()


def test_a_cell_is_a_run_that_can_be_read_back(tracked):
    one, results = tracked
    (folder,) = runs(results)
    found = records(folder)
    (run,) = found["run"]
    assert run["run_id"] == f"cell-{one.hash[:16]}" and run["display_name"] == one.path
    assert (run["run_group"], run["job_type"]) == ("demo", "tail8")
    assert run["tags"] == [one.model.name, "mxfp4_mxfp8", "five-2"]
    assert run["config"]["update"]["baseline"]["name"] == "tail8"
    result = json.loads((results / one.path / "result.json").read_text())
    logged = found["history"][0]["item"]
    for key, value in tracking.scalars(result).items():
        assert logged[key] == pytest.approx(value), key
    assert logged["allocation/heat_map._type"] == "image-file"
    assert logged["allocation/layers.nrows"] == result["quantized"]["layers"]
    assert "artifact" in found


def test_nothing_secret_is_written(tracked):
    _, results = tracked
    import getpass

    for file in results.rglob("*"):
        if file.is_file() and file.name not in ("status.json",):
            content = file.read_bytes()
            assert KEY.encode() not in content and b"hf_planted" not in content, file
            if file.suffix == ".wandb":
                assert socket.gethostname().encode() not in content or len(socket.gethostname()) < 5
                assert f'"{getpass.getuser()}"'.encode() not in content


def test_the_layers_of_a_cell_are_a_table_of_all_of_them():
    place = ROOT / "results/five-250/smollm2_135m/mxfp4_mxfp8/fisher-5"
    allocation = json.loads((place / "allocation.json").read_text())
    rows = tracking.layer_table(allocation)
    assert [row["layer"] for row in rows] == list(allocation["layers"])
    assert {row["block"] for row in rows} == set(range(30))
    assert len({(row["block"], row["linear"]) for row in rows}) == len(rows) == 210
    assert {row["scheme"]: row["bits"] for row in rows} == {"mxfp4": 4, "mxfp8": 8}


def test_the_tables_are_one_run_however_often(tmp_path):
    for value in (1, 1, 2):
        tracking.log_tables({"demo": pd.DataFrame({"a": [value]})}, OFFLINE, str(tmp_path))
    assert len(runs(tmp_path)) == 2  # the same content is not written again
    for run in runs(tmp_path):
        (record,) = records(run)["run"]
        assert (record["run_id"], record["job_type"]) == ("tables", "tables")
    assert tracking.pending(tmp_path) == runs(tmp_path)[1:]  # the newer one, which replaces it


def test_stored_cells_are_logged_after_the_fact_and_once(stored):
    assert tracking.track(stored, OFFLINE) == (3, 3)
    assert tracking.track(stored, OFFLINE) == (0, 3)
    hashes = [json.loads(f.read_text())["hash"] for f in stored.rglob("result.json")]
    read = [records(run) for run in runs(stored)]
    assert {run["run"][0]["run_id"] for run in read} == {f"cell-{h[:16]}" for h in hashes}
    (fisher,) = [run for run in read if run["run"][0]["job_type"] == "fisher"]
    assert fisher["history"][0]["item"]["kl/predicted"] == pytest.approx(
        json.loads(next(stored.rglob("fisher-5/result.json")).read_text())["notes"]["predicted_kl"]
    )


def test_a_run_that_was_cut_short_is_written_again(stored):
    tracking.track(stored, OFFLINE)
    (runs(stored)[0] / tracking.DONE).unlink()
    assert tracking.track(stored, OFFLINE) == (1, 3)


def test_an_experiments_cells_alone(stored, capsys):
    assert tracking.main(["track", "--results", str(stored), "--only", "table1"]) == 0
    assert "2 runs written" in capsys.readouterr().out  # bf16 and ours: fisher is none of its rows
    assert {records(run)["run"][0]["run_group"] for run in runs(stored)} == {"table1"}
    assert tracking.main(["track", "--results", str(stored), "--only", "nothing"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: only=nothing: accepted: table1") and error.count("\n") == 1


def test_what_is_uploaded_is_never_uploaded_again(stored, monkeypatch):
    """An upload that is interrupted after its first run goes on with the others."""
    tracking.track(stored, OFFLINE)
    asked = []

    def upload_one(command, seconds, **_):
        asked.append([Path(path).name for path in command[command.index("sync") + 1 :]])
        run = Path(command[-1])
        (file,) = run.glob("*.wandb")
        file.with_suffix(".wandb.synced").touch()  # as `wandb sync` marks it
        if len(asked) == 1:
            raise KeyboardInterrupt
        for run in command[command.index("sync") + 1 :]:
            next(Path(run).glob("*.wandb")).with_suffix(".wandb.synced").touch()
        return ""

    monkeypatch.setattr(tracking, "limited", upload_one)
    with pytest.raises(KeyboardInterrupt):
        tracking.sync(stored)
    assert tracking.sync(stored) == (2, 1)
    assert len(asked[0]) == 3 and set(asked[1]) == set(asked[0][:-1])
    assert tracking.sync(stored) == (0, 3) and len(asked) == 2


def test_of_two_runs_of_one_cell_the_newest_is_uploaded_and_none_that_is_being_written(tmp_path):
    for name in ("20250101_000000-cell-a", "20250102_000000-cell-a", "20250101_000000-cell-b"):
        folder = tmp_path / "wandb" / f"offline-run-{name}"
        folder.mkdir(parents=True)
        (folder / f"run-{name[16:]}.wandb").touch()
        if name.endswith("a"):
            (folder / tracking.DONE).touch()
    assert [run.name for run in tracking.pending(tmp_path)] == [
        "offline-run-20250102_000000-cell-a"
    ]


def test_a_server_that_never_answers_costs_one_time_out_a_process(
    stored, hanging, monkeypatch, caplog
):
    taken, home = hanging
    assert tracking.UPLOAD_SECONDS <= 25  # and killing takes no time: below 30 s in all
    monkeypatch.setattr(tracking, "UPLOAD_SECONDS", 4)
    cfg = configuration("tracking=online", f"results='{stored}'")
    start = time.monotonic()
    with caplog.at_level(logging.INFO):
        for file in sorted(stored.rglob("result.json")):
            allocation = json.loads((file.parent / "allocation.json").read_text())
            tracking.log_cell(cell("baseline=low"), json.loads(file.read_text()), allocation, cfg)
    assert time.monotonic() - start < 15
    assert taken  # it was asked
    (line,) = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert "did not answer within 4 s" in line and "\n" not in line and "make track" in line
    assert len(runs(stored)) == 1 and not list(stored.rglob("*.synced"))  # written, not lost
    for folder in (stored, home):
        for file in folder.rglob("*"):
            assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in caplog.text


def test_without_a_key_sync_says_so_in_one_line(stored, monkeypatch, capsys, tmp_path_factory):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    tracking.track(stored, OFFLINE)
    assert tracking.main(["sync", "--results", str(stored)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No API key configured" in error


def test_wandb_failing_costs_no_cell(tiny, tmp_path, monkeypatch, caplog):
    import wandb

    asked = []

    def down(*_, **__):
        asked.append(1)
        raise wandb.errors.CommError(f"no\nserver for {KEY}")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb, "init", down)
    overrides = [*tiny_overrides(tiny["llama"]), f"results='{tmp_path}'", f"cache='{CACHE}'"]
    for baseline in ("low", "high"):
        cfg = configuration(*overrides, f"baseline={baseline}")
        assert runner.run(cell_of(cfg), cfg).state == "done"
    assert caplog.text.count("W&B: CommError: no server for …; results are stored") == 1
    assert len(asked) == 1 and KEY not in caplog.text


def test_off_is_off(tmp_path):
    tracking.log_tables(
        {"demo": pd.DataFrame({"a": [1]})}, Tracking("off", "mixprec"), str(tmp_path)
    )
    cfg = configuration("tracking=off", f"results='{tmp_path}'")
    tracking.log_cell(cell(), {}, {}, cfg)
    assert list(tmp_path.iterdir()) == []
    assert tables.main(["--results", str(tmp_path)]) == 1
