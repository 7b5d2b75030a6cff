"""The packaged model through the commands of the README, on a handful of documents."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from conftest import CACHE, ROOT


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    results = tmp_path_factory.mktemp("a folder") / "results"
    where = [f"results='{results}'", f"cache='{CACHE}'"]
    small = ["eval.limit=3", "eval.tasks=[lambada_openai,hellaswag,piqa,winogrande]",
             "eval.kl.sequences=2", "eval.kl.tokens=64", "calibration.samples=1",
             "calibration.tokens=64"]  # fmt: skip
    arguments = ["run.py", "-m", "experiment=demo", *small, *where]
    return results, arguments, command(*arguments)


def test_the_demo_runs_its_five_cells(sweep):
    results, _, done = sweep
    assert done.returncode == 0, done.stderr
    assert "5 cells run, 0 were stored, 0 failed" in done.stdout
    stored = {
        file.parent.name: json.loads(file.read_text()) for file in results.rglob("result.json")
    }
    assert set(stored) == {"bf16", "low", "tail8-5", "head8-5", "ours-5"}
    kl = {name: result["kl"]["mean"] for name, result in stored.items()}
    assert kl["bf16"] < 1e-6 < kl["ours-5"] < kl["low"]
    bits = {name: result["realised_bits"] for name, result in stored.items()}
    assert bits["bf16"] == 16 and bits["low"] == 4
    assert all(4.9 < bits[name] <= 5 for name in ("tail8-5", "head8-5", "ours-5"))
    assert stored["low"]["quantized"]["weights"] == 106_168_320
    documents = {json.dumps(result["provenance"]["documents"]) for result in stored.values()}
    assert len(documents) == 1  # the same documents in every cell


def test_a_second_time_runs_nothing(sweep):
    _, arguments, _ = sweep
    again = command(*arguments)
    assert again.returncode == 0
    assert "0 cells run, 5 were stored, 0 failed" in again.stdout


def test_the_table_shows_them(sweep):
    results, _, _ = sweep
    shown = command("-m", "mixprec.tables", "--results", str(results))
    assert shown.returncode == 0, shown.stderr
    for row in ("BF16", "low (mxfp4)", "tail8 5-bit", "head8 5-bit", "ours 5-bit"):
        assert row in shown.stdout
    assert len(pd.read_csv(results / "tables/demo.csv")) == 5


def test_a_sweep_with_a_failing_cell_ends_with_1_and_a_summary(sweep):
    """A result of another configuration is in the way of one cell of two; the other runs."""
    _, arguments, _ = sweep
    done = command(
        *[a for a in arguments if "experiment" not in a], "baseline=low,high", "eval.seed=9"
    )
    assert done.returncode == 1
    assert "1 cells run, 0 were stored, 1 failed" in done.stdout
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("failed: ")]
    assert "low: another result is stored there: eval.seed: 1234 -> 9; force=true reruns it" in line
