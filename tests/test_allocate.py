"""Properties of the rules, over random architectures and budgets."""

import pytest
from conftest import cell
from hypothesis import given
from hypothesis import strategies as st

from mixprec.allocate import Request, allocate
from mixprec.schemes import SCHEMES, Layer, realised_bits

SIZES = st.sampled_from([32, 64, 96, 128, 160, 576, 1536])
LAYERS = st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=40).map(
    lambda shapes: [Layer(f"layers.{i}", *shape) for i, shape in enumerate(shapes)]
)
OPTIONS = st.sampled_from([("mxfp4", "mxfp8"), ("mxfp4", "mxfp6", "mxfp8")])
BUDGETS = st.floats(4, 8)


BASELINES = {
    name: cell(f"baseline={name}").baseline for name in ("head8", "tail8", "random", "low", "high")
}


def rule(name, layers, schemes, budget, seed=0):
    options = [SCHEMES[scheme] for scheme in schemes]
    return allocate(layers, options, budget, Request(BASELINES[name], seed=seed))


@given(LAYERS, OPTIONS, BUDGETS, st.sampled_from(["head8", "tail8", "random"]), st.integers(0, 99))
def test_bits_never_exceed_the_budget(layers, schemes, budget, name, seed):
    allocation = rule(name, layers, schemes, budget, seed)
    assert set(allocation) == {layer.name for layer in layers}
    assert realised_bits(layers, allocation) <= budget


@given(LAYERS, OPTIONS, BUDGETS)
def test_head_and_tail_mirror_each_other(layers, schemes, budget):
    assert rule("head8", layers, schemes, budget) == rule("tail8", layers[::-1], schemes, budget)


@given(LAYERS, OPTIONS, BUDGETS)
def test_a_whole_run_of_layers_is_filled_from_the_end(layers, schemes, budget):
    tail = rule("tail8", layers, schemes, budget)
    filled = [tail[layer.name] == "mxfp8" for layer in layers]
    assert filled == sorted(filled, reverse=True)
    if not all(filled):  # the next layer would not have fitted
        tail[layers[filled.index(False)].name] = "mxfp8"
        assert realised_bits(layers, tail) > budget


@given(LAYERS, BUDGETS, BUDGETS)
def test_more_budget_never_lowers_a_layer(layers, first, second):
    small, large = sorted([first, second])
    for name in ("head8", "tail8", "random"):
        low = rule(name, layers, ("mxfp4", "mxfp8"), small)
        high = rule(name, layers, ("mxfp4", "mxfp8"), large)
        assert all(high[k] == "mxfp8" for k, v in low.items() if v == "mxfp8")


@given(LAYERS)
def test_low_and_high_are_the_ends_of_the_range(layers):
    assert realised_bits(layers, rule("low", layers, ("mxfp4", "mxfp8"), None)) == 4
    assert realised_bits(layers, rule("high", layers, ("mxfp4", "mxfp8"), None)) == 8


def test_a_rule_that_takes_too_much_is_stopped(monkeypatch):
    from mixprec.allocate import ends

    layers = [Layer("a", 32, 32)]
    monkeypatch.setattr(ends, "allocate", lambda *_: {"a": "mxfp8"})
    with pytest.raises(RuntimeError, match=r"took 8\.0000 bits of 5"):
        rule("head8", layers, ("mxfp4", "mxfp8"), 5.0)
