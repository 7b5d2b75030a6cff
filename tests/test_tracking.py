"""W&B offline, read back with W&B's own reader; and W&B that fails."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import CACHE, cell, configuration, tiny_overrides

from mixprec import runner, tables, tracking
from mixprec.cell import Tracking


def records(results: Path) -> dict[str, list]:
    (run,) = (results / "wandb").glob("offline-run-*")
    lines = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "leet", "inspect", str(run), "--json"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    found: dict[str, list] = {}
    for record in map(json.loads, lines):
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


@pytest.fixture
def tracked(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    cfg = configuration(
        *tiny_overrides(tiny["llama"]), "baseline=tail8", "experiment=demo", "eval.limit=2",
        f"results='{tmp_path}'", f"cache='{CACHE}'", "tracking=offline",
    )  # fmt: skip
    from mixprec.cell import cell_of

    one = cell_of(cfg)
    assert runner.run(one, cfg).state == "done"
    return one, tmp_path


def test_a_cell_is_a_run_that_can_be_read_back(tracked):
    one, results = tracked
    found = records(results)
    (run,) = found["run"]
    assert run["run_id"] == f"cell-{one.hash[:16]}" and run["display_name"] == one.path
    assert (run["run_group"], run["job_type"]) == ("demo", "tail8")
    assert run["tags"] == [one.model.name, "mxfp4_mxfp8", "five-2"]
    assert run["config"]["update"]["baseline"]["name"] == "tail8"
    result = json.loads((results / one.path / "result.json").read_text())
    logged = found["history"][0]["item"]
    for key, value in tracking.scalars(result).items():
        assert logged[key] == pytest.approx(value), key
    assert "artifact" in found


def test_nothing_secret_is_written(tracked):
    _, results = tracked
    import getpass
    import socket

    for file in results.rglob("*"):
        if file.is_file() and file.name not in ("status.json",):
            content = file.read_bytes()
            assert b"k" * 40 not in content and b"hf_planted" not in content, file
            if file.suffix == ".wandb":
                assert socket.gethostname().encode() not in content or len(socket.gethostname()) < 5
                assert f'"{getpass.getuser()}"'.encode() not in content


def test_the_tables_are_a_run(tmp_path):
    tracking.log_tables(
        {"demo": pd.DataFrame({"a": [1]})}, Tracking("offline", "mixprec"), str(tmp_path)
    )
    assert records(tmp_path)["run"][0]["job_type"] == "tables"


def test_wandb_failing_costs_no_cell(tiny, tmp_path, monkeypatch, caplog):
    import wandb

    def down(*_, **__):
        raise wandb.errors.CommError("no\nserver")

    monkeypatch.setattr(wandb, "init", down)
    cfg = configuration(
        *tiny_overrides(tiny["llama"]), "baseline=low", f"results='{tmp_path}'", f"cache='{CACHE}'"
    )
    from mixprec.cell import cell_of

    assert runner.run(cell_of(cfg), cfg).state == "done"
    assert "W&B: CommError: no server; the result is stored all the same" in caplog.text


def test_off_is_off(tmp_path):
    tracking.log_tables(
        {"demo": pd.DataFrame({"a": [1]})}, Tracking("off", "mixprec"), str(tmp_path)
    )
    cfg = configuration("tracking=off", f"results='{tmp_path}'")
    tracking.log_cell(cell(), {}, {}, cfg)
    assert list(tmp_path.iterdir()) == []
    assert tables.main(["--results", str(tmp_path)]) == 1
