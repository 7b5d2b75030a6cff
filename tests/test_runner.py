"""Cells from start to end on tiny models: stored, resumed, failed, forced; one scoring for all budgets."""

import json
import re
import shutil
import threading

import pandas as pd
import pytest
from conftest import ARCHITECTURES, CACHE, ROOT, cell, run, tiny_overrides

from mixprec import models, runner
from mixprec.allocate import Request, allocate


def result_of(results, one):
    return json.loads((results / one.cell.path / "result.json").read_text())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cell_has_everything_it_promises(architecture, tiny, tmp_path):
    done = run(tmp_path, *tiny_overrides(tiny[architecture]), "baseline=tail8", "budget=5")
    assert done.state == "done"
    result = result_of(tmp_path, done)
    assert result["hash"] == done.cell.hash and result["config"] == done.cell.settings
    assert result["schema"] == 1
    assert set(result["metrics"]) == {"piqa", "winogrande"}
    assert all(set(m) == {"acc", "stderr", "n"} and m["n"] == 2 for m in result["metrics"].values())
    assert result["kl"]["mean"] > 0 and result["kl"]["tokens"] == 128
    assert 4 < result["realised_bits"] <= 5
    assert result["realised_bits_with_scales"] == pytest.approx(result["realised_bits"] + 0.25)
    assert result["quantized"]["kept_in_bf16"] == "lm_head and embeddings"
    assert set(result["seconds"]) == {"load", "reference", "allocate", "quantize", "kl", "evaluate"}
    assert result["peak_memory_bytes"]["cpu"] > 1e8
    assert result["provenance"]["packages"]["torch"] and result["provenance"]["model_hash"]
    assert set(result["provenance"]["documents"]) == {"piqa", "winogrande"}

    allocation = json.loads((tmp_path / done.cell.path / "allocation.json").read_text())
    assert allocation["budget"] == 5 and allocation["realised_bits"] == result["realised_bits"]
    assert set(allocation["layers"].values()) == {"mxfp4", "mxfp8"}
    samples = pd.read_parquet(tmp_path / done.cell.path / "samples.parquet")
    assert len(samples) == 4 and samples.correct.dtype == bool
    text = (tmp_path / done.cell.path / "result.json").read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text.replace(str(tiny[architecture]), "")


def test_a_profile_says_where_the_time_goes(tiny, tmp_path, caplog):
    with caplog.at_level("INFO", "mixprec"):
        done = run(tmp_path, *tiny_overrides(tiny["llama"]), "baseline=low", "profile=true")
    result = result_of(tmp_path, done)
    tokens, found = result["evaluated_tokens"], result["profile"]
    assert 0 < tokens["run"] < tokens["asked"] and 0 < tokens["rows"] <= tokens["run"]
    assert found["tokens_saved"] == tokens["asked"] - tokens["run"]
    weights, head = result["quantized"]["weights"], 64 * 259
    assert found["useful_flop"] == 2 * (weights * tokens["run"] + head * tokens["rows"])
    assert 0 < found["utilisation"] < 1
    assert "of the machine's matrix-product peak" in caplog.text and "seconds: load" in caplog.text


def test_one_bar_shows_how_far_an_evaluation_is(tiny, tmp_path, capfd):
    run(tmp_path, *tiny_overrides(tiny["llama"]), "baseline=bf16", "eval.kl.sequences=0")
    bars = [
        line
        for line in re.split(r"[\r\n]", capfd.readouterr().err)
        if "it/s]" in line or "tok" in line
    ]
    assert any("log-likelihoods" in bar for bar in bars)
    assert not any(bar.strip().startswith(("0%", "100%")) for bar in bars)  # without a name


def test_bf16_is_a_cell_like_any_other(tiny, tmp_path):
    done = run(tmp_path, *tiny_overrides(tiny["llama"]), "baseline=bf16")
    result = result_of(tmp_path, done)
    assert result["kl"]["mean"] == pytest.approx(0, abs=1e-6) and result["kl"]["top1"] == 1
    assert result["realised_bits"] == result["realised_bits_with_scales"] == 16
    assert result["recovery"]["reference"] == done.cell.path


def test_a_stored_cell_is_not_run_again(tiny, tmp_path, monkeypatch):
    overrides = [*tiny_overrides(tiny["llama"]), "baseline=low"]
    first = run(tmp_path, *overrides)
    before = (tmp_path / first.cell.path / "result.json").read_bytes()
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("a model was loaded"))
    assert run(tmp_path, *overrides).state == "stored"
    assert run(tmp_path, *overrides, "budget=6").state == "stored"  # low knows no budget

    other = run(tmp_path, *overrides, "eval.seed=5")
    assert other.failed
    assert "eval.seed: 1234 -> 5" in other.message and "force=true" in other.message
    assert (tmp_path / first.cell.path / "result.json").read_bytes() == before
    assert json.loads((tmp_path / first.cell.path / "status.json").read_text())["state"] == "done"


def test_the_model_is_loaded_once_for_many_cells(tiny, tmp_path, monkeypatch):
    original, loads = models.load, []
    monkeypatch.setattr(models, "load", lambda *a: loads.append(1) or original(*a))
    overrides = tiny_overrides(tiny["llama"])
    together = [
        result_of(tmp_path / "together", run(tmp_path / "together", *overrides, f"baseline={name}"))
        for name in ("low", "bf16", "tail8", "high")
    ]
    assert len(loads) == 1
    for name, result in zip(("low", "bf16", "tail8", "high"), together, strict=True):
        runner.forget()
        alone = result_of(
            tmp_path / "alone", run(tmp_path / "alone", *overrides, f"baseline={name}")
        )
        assert (alone["metrics"], alone["kl"]) == (result["metrics"], result["kl"])


def test_force_runs_it_again_with_the_same_result(tiny, tmp_path):
    overrides = [*tiny_overrides(tiny["qwen3"]), "baseline=random", "seed=3"]
    first = result_of(tmp_path, run(tmp_path, *overrides))
    again = result_of(tmp_path, run(tmp_path, *overrides, "force=true"))
    for result in (first, again):
        for key in ("seconds", "peak_memory_bytes", "content_hash"):
            del result[key]
    assert first == again


def test_a_failing_cell_says_why_and_costs_no_other(tiny, tmp_path, monkeypatch):
    overrides = tiny_overrides(tiny["llama"])
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", lambda *_: 1 / 0)
        failed = run(tmp_path, *overrides, "baseline=low")
    assert failed.failed and failed.message == "ZeroDivisionError: division by zero"
    status = json.loads((tmp_path / failed.cell.path / "status.json").read_text())
    assert status["state"] == "failed" and status["error"] == failed.message
    assert not (tmp_path / failed.cell.path / "result.json").exists()
    assert run(tmp_path, *overrides, "baseline=bf16").state == "done"
    assert run(tmp_path, *overrides, "baseline=low").state == "done"
    status = json.loads((tmp_path / failed.cell.path / "status.json").read_text())
    assert status["state"] == "done" and "error" not in status


def test_an_interrupted_cell_is_marked_and_the_sweep_stops(tiny, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *tiny_overrides(tiny["llama"]), "baseline=low")
    (status,) = tmp_path.rglob("status.json")
    assert json.loads(status.read_text())["error"] == "interrupted"


def test_weight_only_cells_are_real_exports(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(
        tmp_path, *tiny_overrides(tiny["llama"]), "baseline=tail8", "budget=6",
        "options.name=w4g32_w8g32", "options.schemes=[w4g32,w8g32]",
    )  # fmt: skip
    result = result_of(tmp_path, done)
    assert result["notes"]["exported_bytes"] > 0 and result["notes"]["backend"] == "ark"
    assert 0 < result["kl"]["mean"] < 2
    assert result["realised_bits_with_scales"] > result["realised_bits"] + 0.5


# --- ours -------------------------------------------------------------------------------------


def request(folder, cache, notes=None, samples=2):
    one = cell(*tiny_overrides(folder), f"calibration.samples={samples}")
    note = (notes if notes is not None else {}).__setitem__
    return Request(one.baseline, None, one.model, one.calibration, cache, note)


@pytest.fixture
def scoring(tiny, tmp_path, monkeypatch):
    """A cache of its own (documents shared), and how many schemes auto-round has scored in it."""
    from auto_round.auto_scheme import delta_loss

    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "documents").symlink_to(CACHE / "documents")
    counted = []
    original = delta_loss.get_score_for_scheme
    monkeypatch.setattr(
        delta_loss, "get_score_for_scheme", lambda *a, **k: counted.append(1) or original(*a, **k)
    )
    return cache, counted


def layers_and_schemes(folder):
    one = cell(*tiny_overrides(folder))
    model = models.load(models.checkpoint(one.model, CACHE), one.model)
    return models.quantized_layers(model), one.schemes


def test_scores_are_made_once_and_serve_every_budget(tiny, scoring):
    cache, counted = scoring
    layers, schemes = layers_and_schemes(tiny["llama"])
    notes = {}
    first = allocate(layers, schemes, 5.0, request(tiny["llama"], cache, notes))
    assert len(counted) == 2 and not notes["autoscheme_scores_stored"]
    high = {k for k, v in first.items() if v == "mxfp8"}
    assert 0 < len(high) < len(layers)
    for budget in (4.0, 4.5, 6.0, 8.0):
        allocate(layers, schemes, budget, request(tiny["llama"], cache, notes))
    assert len(counted) == 2 and notes["autoscheme_scores_stored"]
    assert first == allocate(layers, schemes, 5.0, request(tiny["llama"], cache))


def test_two_models_in_folders_of_one_name_share_no_scores(tiny, scoring, tmp_path):
    cache, counted = scoring
    folders = []
    for parent, architecture in (("a", "llama"), ("b", "qwen3")):
        folder = tmp_path / parent / "model"
        shutil.copytree(tiny[architecture], folder)
        folders.append(folder)
    for folder in folders:
        layers, schemes = layers_and_schemes(folder)
        allocate(layers, schemes, 5.0, request(folder, cache))
    assert len(counted) == 4
    assert len(list((cache / "autoscheme").glob("*/scheme_*.json"))) == 4


def test_other_calibration_is_scored_anew(tiny, scoring):
    cache, counted = scoring
    layers, schemes = layers_and_schemes(tiny["llama"])
    allocate(layers, schemes, 5.0, request(tiny["llama"], cache))
    allocate(layers, schemes, 5.0, request(tiny["llama"], cache, samples=3))
    assert len(counted) == 4


def test_two_that_want_scores_at_once_make_them_once(tiny, tmp_path):
    """Two processes, one scoring: the second waits for the first and reads."""
    import subprocess
    import sys

    program = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from conftest import *; from test_runner import *\n"
        "folder, cache, budget = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])\n"
        "notes = {}; layers, schemes = layers_and_schemes(folder)\n"
        "allocate(layers, schemes, budget, request(folder, cache, notes))\n"
        "print('stored:', notes['autoscheme_scores_stored'])\n"
    )
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "documents").symlink_to(CACHE / "documents")
    outputs = []

    def start(budget):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tiny["llama"]), str(cache), budget],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        outputs.append(
            done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr
        )

    threads = [threading.Thread(target=start, args=(budget,)) for budget in ("4.5", "5")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outputs) == ["stored: False", "stored: True"]
