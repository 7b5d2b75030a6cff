"""The frontier of stored scores, and predictions against measurements; no model is loaded for either."""

import dataclasses
import math
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from conftest import CACHE, ROOT, cell, run, tiny_overrides

from mixprec import frontier, models, predicted
from mixprec.allocate import scores
from mixprec.store import Store, write_json


def cache_of(results):
    return results.with_name(f"{results.name}-cache")


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    """(results/ of six cells of a tiny model, the scores of fisher for it)."""
    results = tmp_path_factory.mktemp("results")
    cache = cache_of(results)  # other tests score the same model
    cache.mkdir()
    for name in ("documents", "datasets"):
        (cache / name).symlink_to(CACHE / name)
    for cells in (
        ["baseline=low"],
        ["baseline=tail8", "budget=5"],
        ["baseline=fisher", "budget=5"],
        ["baseline=fisher", "budget=6"],
        ["baseline=fisher", "budget=5", "fused=true"],
        ["baseline=fisher", "budget=9", "options=mxfp4_mxfp8_bf16"],
    ):
        outcome = run(results, *tiny_overrides(tiny["llama"]), *cells, f"cache='{cache}'")
        assert outcome.state == "done", outcome.message
    of_model = frontier.stored_scores(results)
    (scored,) = of_model
    return results, scored


def test_a_frontier_is_exact_falls_and_is_nearly_convex(stored):
    """Nearly: the solver takes whole layers, so it is above its hull by less than one layer's step."""
    scored = dataclasses.replace(stored[1], lowest_kl=None)  # sums as they are
    curve = frontier.solved(scored, ["mxfp4", "mxfp8"])
    assert len(curve) == 81 and (curve.bits <= curve.budget).all() and (curve.stderr > 0).all()
    assert (curve.kl.diff().dropna() <= 1e-12).all()
    by_layer = scored.table.score.to_numpy().reshape(-1, 2)
    assert curve.kl.iloc[0] == pytest.approx(by_layer[:, 0].sum())
    assert curve.kl.iloc[-1] == pytest.approx(by_layer.min(1).sum())
    step = (by_layer[:, 0] - by_layer[:, 1]).max()
    budget, kl = curve.budget.to_numpy(), curve.kl.to_numpy()
    for place in range(len(curve)):
        lines = [
            kl[i] + (kl[j] - kl[i]) * (budget[place] - budget[i]) / (budget[j] - budget[i])
            for i in range(place)
            for j in range(place + 1, len(curve))
        ]
        assert kl[place] <= min(lines, default=math.inf) + step
    assert kl[20] < (kl[0] + kl[40]) / 2  # and it bends the right way


def test_a_frontier_starts_at_what_was_measured_of_the_lowest_option(stored, monkeypatch):
    _, scored = stored
    monkeypatch.setattr(frontier, "STEP", 1)
    curve = frontier.solved(scored, ["mxfp4", "mxfp8"])
    assert curve.kl.iloc[0] == pytest.approx(np.mean(scored.lowest_kl))
    sums = frontier.solved(dataclasses.replace(scored, lowest_kl=None), ["mxfp4", "mxfp8"])
    assert (curve.bits == sums.bits).all() and (curve.kl.diff().dropna() < 0).all()


def test_fused_layers_cost_and_bf16_does_not_harm(stored, monkeypatch):
    _, scored = stored
    monkeypatch.setattr(frontier, "STEP", 0.25)
    plain = frontier.solved(scored, ["mxfp4", "mxfp8"])
    tied = frontier.solved(scored, ["mxfp4", "mxfp8"], tied=True)
    more = frontier.solved(scored, ["mxfp4", "mxfp8", "bf16"])
    assert (tied.kl >= plain.kl - 1e-12).all() and (tied.kl > plain.kl + 1e-6).any()
    assert len(more) == 49 and more.kl.iloc[-1] == 0
    assert (more.kl[:17] <= plain.kl + 1e-12).all()


def test_it_writes_a_figure_and_its_numbers_without_a_model(stored, monkeypatch, capsys):
    results, scored = stored
    monkeypatch.setattr(frontier, "STEP", 0.5)
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setattr(scores, "stored", None)
    assert frontier.main(["--results", str(results)]) == 0
    printed = capsys.readouterr().out
    figures = {file.name for file in (results / "figures").iterdir()}
    name = f"frontier-{scored.model}-mxfp4_mxfp8"
    assert figures == {
        f"{stem}.{kind}"
        for stem in (name, f"{name}_bf16", f"predicted-{scored.model}")
        for kind in ("svg", "csv")
    }
    table = pd.read_csv(results / f"figures/{name}.csv")
    points = table[table.kind == "measured"]
    assert set(points.name) == {"low", "tail8", "fisher", "fisher, fused"}
    assert len(points) == 5 and (points.kl > 0).all() and (points.stderr > 0).all()
    assert set(table[table.kind == "predicted"].name) == {scored.label, scored.label + ", fused"}
    ElementTree.parse(results / f"figures/{name}.svg")
    assert "fisher, fused" in printed and "ratio: predicted / measured" in printed


def test_the_same_numbers_are_the_same_figure(tmp_path):
    curve = pd.DataFrame({"bits": [4.0, 6.0, 16.0], "kl": [1.0, 0.1, 0.0]})
    points = pd.DataFrame(
        [["ours", 5, 5.0, 0.5, 0.1], ["low", None, 4.0, 1.1, None]],
        columns=["name", "budget", "bits", "kl", "stderr"],
    )
    for name in ("one.svg", "two.svg"):
        frontier.figure({"fisher": curve, "fisher, fused": curve}, points, "x", tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_every_baseline_has_a_look_of_its_own():
    names = [file.stem for file in sorted((ROOT / "conf/baseline").glob("*.yaml"))]
    looks = [predicted.style(name) for name in names]
    assert len({look["fmt"] for look in looks}) == len(names)
    fused = predicted.style("fisher, fused (five-50)")
    assert fused != predicted.style("fisher") and fused["fmt"] == predicted.style("fisher")["fmt"]
    assert set(names) == set(predicted.tables.ORDER)


@pytest.mark.parametrize("what", ["nothing", "scores alone", "results alone"])
def test_without_scores_it_says_so_in_one_line(stored, tmp_path, capsys, what):
    results, _ = stored
    for part in {"nothing": (), "scores alone": ("scores",), "results alone": ("five-2",)}[what]:
        shutil.copytree(results / part, tmp_path / part)
    before = sorted(tmp_path.rglob("*"))
    assert frontier.main(["--results", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert "accepted: those of baseline=fisher, measured_kl" in output.err
    assert sorted(tmp_path.rglob("*")) == before


def put(root, overrides, prediction, kl):
    one = cell(*overrides)
    write_json(
        Store(root).folder(one) / "result.json",
        {
            "hash": one.hash, "config": one.settings, "realised_bits": 5.0,
            "notes": {"predicted_kl": prediction[0], "predicted_kl_stderr": prediction[1]},
            "kl": {"mean": kl[0], "stderr": kl[1], "tokens": 4096},
            "provenance": {"heldout_text": "x"}, "metrics": {},
        },
    )  # fmt: skip


def test_the_ratios_error_is_that_of_two_independent_means(tmp_path):
    put(tmp_path, ["baseline=fisher", "budget=5"], (0.4, 0.02), (0.5, 0.03))
    (line,) = predicted.cells(list(predicted.tables.read(tmp_path)[0].values())).itertuples()
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.4, 0.02, 10**6) / rng.normal(0.5, 0.03, 10**6)
    assert line.ratio == pytest.approx(0.8)
    assert line.ratio_stderr == pytest.approx(drawn.std(), rel=0.02)


@pytest.mark.parametrize(("power", "correlation"), [(1, 1), (0.5, 1), (-1, -1)])
def test_slope_and_rank_correlation(tmp_path, power, correlation):
    for budget in (4.5, 5, 6, 7):
        value = 1 / budget
        put(
            tmp_path,
            ["baseline=fisher", f"budget={budget}"],
            (value, 0.01),
            (2 * value**power, 0.01),
        )
    put(tmp_path, ["baseline=fisher", "budget=5", "tuning.iters=2"], (9, 0.1), (0.01, 0.01))
    put(
        tmp_path,
        ["baseline=fisher", "budget=null", "target.kl=0.3"],
        (0.3, 0.1),
        (2 * 0.3**power, 0.1),
    )
    frame = predicted.cells(list(predicted.tables.read(tmp_path)[0].values()))
    (line,) = predicted.summary(frame).itertuples()
    assert line.n == 5  # what is predicted is rounding to nearest: not the tuned one
    assert (line.slope, line.spearman) == pytest.approx((power, correlation))
    assert "KL ≤ 0.3" in set(frame.budget)
    assert f"{power:.2f} ± 0.00" in predicted.text(frame)


def test_one_cell_has_no_slope(tmp_path):
    put(tmp_path, ["baseline=fisher", "budget=5"], (0.4, None), (0.5, None))
    text, files = predicted.render(tmp_path)
    assert "0.4000" in text and "—" in text and "nan" not in text and len(files) == 2
