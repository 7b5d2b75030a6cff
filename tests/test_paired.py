"""Answers that are kept, read back, and paired in a table."""

import json

import pandas as pd

from mixprec import paired, tables


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
    assert line.count(" to ") == 2 and "Not paired" not in text
    assert any("| Tail layers 8-bit |" in one and "–" in one for one in text.splitlines())
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
