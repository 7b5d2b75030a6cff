"""The packaged model through the commands of the README, on a handful of documents."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from conftest import CACHE, ROOT, configuration


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


def test_bf16s_answers_are_those_of_plain_lm_eval(sweep):
    """The same documents, the model loaded by lm-eval itself, its `hf` model with its own settings."""
    import lm_eval

    from mixprec.evaluate.tasks import tasks_of

    results, arguments, _ = sweep
    one = configuration(*[a for a in arguments[2:] if "experiment" not in a])
    tasks = tasks_of(one.eval, CACHE)
    plain = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(CACHE / "models/smollm2_135m"), "dtype": "float32"},
        device="cpu", batch_size=8, tasks=tasks.specs, task_manager=tasks.manager,
        samples=tasks.documents, bootstrap_iters=0,
    )  # fmt: skip
    stored = pd.read_parquet(next(results.rglob("bf16/samples.parquet")))
    assert len(stored) == 12
    for row in stored.itertuples():
        (theirs,) = [s for s in plain["samples"][row.leaf] if s["doc_id"] == row.doc_id]
        assert theirs["doc_hash"] == row.doc_hash
        expected = [response[0] for response in theirs["filtered_resps"]]
        assert list(row.loglikelihoods) == pytest.approx(expected, rel=1e-4)
        assert bool(theirs["acc"]) == row.correct
