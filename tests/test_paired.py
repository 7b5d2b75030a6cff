"""Paired differences: against direct computation, on answers that are kept and read back."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from conftest import run, tiny_overrides
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mixprec import paired, tables
from mixprec.paired import Answers

TASKS = {"piqa": 7, "mmlu": 21, "winogrande": 16}


def answers(seed: int, p: float = 0.5) -> Answers:
    rng = np.random.default_rng(seed)
    return Answers(
        {task: f"hash of {task}" for task in TASKS},
        {task: rng.random(n) < p for task, n in TASKS.items()},
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_difference_is_that_of_the_means_and_its_error_that_of_a_paired_t_test(a, b):
    one, other = answers(a), answers(b, 0.7)
    estimate = paired.difference(one, other)
    mean = [np.mean([right.mean() for right in x.correct.values()]) for x in (one, other)]
    assert estimate.value == pytest.approx(mean[0] - mean[1], abs=1e-12)
    errors = []
    for task in TASKS:
        x, y = one.correct[task].astype(float), other.correct[task].astype(float)
        test = stats.ttest_rel(x, y)  # its statistic is mean/se
        errors.append((x - y).mean() / test.statistic if (x - y).mean() else stats.sem(x - y))
    assert estimate.stderr == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / len(errors))
    back = paired.difference(other, one)
    assert (back.value, back.stderr) == (pytest.approx(-estimate.value), estimate.stderr)


def test_the_same_answers_differ_by_nothing_and_recover_everything():
    one = answers(1)
    assert paired.difference(one, one) == paired.Estimate(0.0, 0.0)
    assert paired.recovery(one, one) == paired.Estimate(1.0, 0.0)
    assert not paired.difference(one, one).clear


def test_recovery_has_the_error_of_a_bootstrap():
    """Resampling documents, both cells' answers together, spreads as far as the delta method says."""
    rng = np.random.default_rng(0)
    n = 400
    easy = {task: rng.random(n) for task in ("piqa", "mmlu")}
    documents = dict.fromkeys(easy, "x")
    whole = Answers(documents, {t: e < 0.6 for t, e in easy.items()})
    part = Answers(documents, {t: e + rng.normal(0, 0.1, n) < 0.5 for t, e in easy.items()})
    estimate = paired.recovery(part, whole)
    ratios = []
    for _ in range(2000):
        rows = {task: rng.integers(0, n, n) for task in easy}
        means = [np.mean([x.correct[t][rows[t]].mean() for t in easy]) for x in (part, whole)]
        ratios.append(means[0] / means[1])
    assert estimate.stderr == pytest.approx(np.std(ratios), rel=0.1)
    unpaired = math.sqrt(sum(x.correct[t].var() / n for x in (part, whole) for t in easy)) / 2
    assert estimate.stderr < unpaired / 0.6


def test_other_documents_are_refused_in_one_line():
    one = answers(1)
    other = Answers(one.documents | {"mmlu": "others"}, one.correct)
    with pytest.raises(ValueError, match=r"^not paired: other documents of mmlu$"):
        paired.difference(one, other)
    fewer = Answers({"piqa": one.documents["piqa"]}, {"piqa": one.correct["piqa"]})
    with pytest.raises(ValueError, match="mmlu, winogrande"):
        paired.difference(one, fewer)


def test_kl_is_paired_by_sequence():
    def result(rows, text="same"):
        return {"kl": {"per_sequence": rows}, "provenance": {"heldout_text": text}}

    estimate = paired.kl_difference(result([1.0, 2.0, 4.0]), result([0.5, 1.5, 3.5]))
    assert (estimate.value, estimate.stderr) == (0.5, 0.0)  # alone, either has an error of 0.9
    for other in (result([1.0, 2.0, 3.0], "other"), result([1.0]), {"kl": None}):
        with pytest.raises(ValueError, match=r"^not paired"):
            paired.kl_difference(result([1.0, 2.0, 4.0]), other)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Three real cells of a tiny model."""
    root = tmp_path_factory.mktemp("results")
    overrides = [*tiny_overrides(tiny["llama"], bos=True), "model.name=tiny", "model.limit=6"]
    for baseline in ("bf16", "low", "tail8"):
        outcome = run(root, *overrides, f"baseline={baseline}")
        assert outcome.state == "done", outcome.message
    return root


def test_answers_are_kept_from_real_samples_and_read_back(finished):
    paired.keep(finished)
    files = sorted(finished.glob("*/tiny/*/*/correct.json"))
    assert len(files) == 3
    for file in files:
        assert file.stat().st_size < 1000
        result = json.loads((file.parent / "result.json").read_text())
        samples = pd.read_parquet(file.with_name("samples.parquet"))
        kept = paired.read(file.parent, result)
        for task, rows in samples.groupby("task"):
            assert kept.correct[task].tolist() == rows.correct.tolist()
        assert kept.documents == result["provenance"]["documents"]


def test_a_table_shows_paired_differences_without_the_samples(finished, tmp_path):
    """As on a fresh clone: correct.json is committed, samples.parquet is not."""
    paired.keep(finished)
    for file in finished.glob("*/*/*/*/*.json"):
        copy = tmp_path / file.relative_to(finished)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    tables.render(tmp_path)
    text = (tmp_path / "tables/table2.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| Tail layers 8-bit − BF16"))
    assert line.count("±") == 2 and "Not paired" not in text
    assert any("| Tail layers 8-bit |" in one and one.count("±") >= 4 for one in text.splitlines())
    for file in tmp_path.glob("*/tiny/mxfp4_mxfp8/*/correct.json"):
        file.unlink()
    tables.render(tmp_path)
    text = " ".join((tmp_path / "tables/table2.md").read_text().split())
    assert "Accuracy not paired: no correct.json." in text


def test_answers_of_another_result_are_not_used(finished, tmp_path, capsys):
    paired.keep(finished)
    folder = next(finished.glob("*/tiny/mxfp4_mxfp8/low"))
    result = json.loads((folder / "result.json").read_text())
    for change in ("hash", "acc", "n"):
        other = json.loads(json.dumps(result))
        if change == "hash":
            other["hash"] = "0"
        else:
            other["metrics"]["piqa"][change] += 1
        assert paired.read(folder, other) is None
        assert "correct.json is of another result" in capsys.readouterr().err
    (tmp_path / "correct.json").write_text("{")
    assert paired.read(tmp_path, result) is None
    assert "cannot be read" in capsys.readouterr().err


def test_samples_that_are_not_of_the_result_are_named_and_not_kept(finished, tmp_path, capsys):
    source = next(finished.glob("*/tiny/mxfp4_mxfp8/low"))
    folder = tmp_path / "five-6/tiny/mxfp4_mxfp8/low"
    folder.mkdir(parents=True)
    (folder / "result.json").write_bytes((source / "result.json").read_bytes())
    samples = pd.read_parquet(source / "samples.parquet")
    samples.assign(correct=~samples.correct).to_parquet(folder / "samples.parquet")
    paired.keep(tmp_path)
    assert not (folder / "correct.json").exists()
    assert "are not of one run" in capsys.readouterr().err
