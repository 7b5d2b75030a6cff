"""The solver: against every allocation of small problems, and properties of large ones."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixprec.allocate.knapsack import fewest_bits, solve

BITS = ([4, 8], [4, 6, 8], [2, 3, 4, 8])


@st.composite
def problems(draw, most_layers=6):
    bits = draw(st.sampled_from(BITS))
    layers = draw(st.integers(1, most_layers))
    weights = [
        draw(st.sampled_from([32, 96, 331776, 110592, 884736, 2**22])) * draw(st.integers(1, 3))
        for _ in range(layers)
    ]
    size = draw(st.sampled_from([1e-6, 1.0, 1e3]))  # nats per token, or sums of squares
    score = st.floats(0, 1, allow_subnormal=False)
    scores = [[size * draw(score) for _ in bits] for _ in weights]
    return np.array(scores), weights, bits


def total(scores, chosen):
    return scores[np.arange(len(chosen)), chosen].sum()


def used(weights, bits, chosen):
    return sum(weight * bits[option] for weight, option in zip(weights, chosen, strict=True))


@settings(deadline=None)
@given(problems(), st.floats(0, 1))
def test_no_allocation_within_the_budget_is_better(problem, where):
    scores, weights, bits = problem
    budget = bits[0] + where * (bits[-1] - bits[0])
    chosen = solve(scores, weights, bits, budget)
    assert used(weights, bits, chosen) / sum(weights) <= budget
    best = min(
        total(scores, each)
        for each in itertools.product(range(len(bits)), repeat=len(weights))
        if used(weights, bits, each) / sum(weights) <= budget
    )
    assert total(scores, chosen) <= best + 1e-9 * scores.sum()


@settings(deadline=None, max_examples=30)
@given(problems(40), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_budget_never_predicts_more(problem, first, second):
    scores, weights, bits = problem
    low, high = (bits[0] + x * (bits[-1] - bits[0]) for x in sorted([first, second]))
    less, more = (solve(scores, weights, bits, budget) for budget in (low, high))
    assert used(weights, bits, less) / sum(weights) <= low
    assert total(scores, more) <= total(scores, less) + 1e-9 * scores.sum()


@settings(deadline=None)
@given(problems(), st.floats(0, 1))
def test_no_allocation_that_reaches_the_target_takes_fewer_bits(problem, where):
    scores, weights, bits = problem
    smallest, largest = scores.min(1).sum(), scores.max(1).sum()
    target = smallest + where * (largest - smallest) + 1e-9 * scores.sum()
    chosen = fewest_bits(scores, weights, bits, target)
    assert total(scores, chosen) <= target
    slack = 1e-9 * scores.sum()  # a sum that equals the target may come out on either side
    reaching = [
        each
        for each in itertools.product(range(len(bits)), repeat=len(weights))
        if total(scores, each) <= target - slack
    ]
    fewest = min((used(weights, bits, each) for each in reaching), default=np.inf)
    assert used(weights, bits, chosen) <= fewest
    for each in reaching:  # and of those with as many bits it has the smallest sum
        if used(weights, bits, each) == used(weights, bits, chosen):
            assert total(scores, chosen) <= total(scores, each) + slack


@settings(deadline=None, max_examples=30)
@given(problems(40), st.floats(0, 1))
def test_a_target_and_its_budget_are_each_others_answer(problem, where):
    """What a budget reaches is reached with no more bits, and a target's bits reach it."""
    scores, weights, bits = problem
    budget = bits[0] + where * (bits[-1] - bits[0])
    of_budget = solve(scores, weights, bits, budget)
    of_target = fewest_bits(scores, weights, bits, total(scores, of_budget))
    assert used(weights, bits, of_target) <= used(weights, bits, of_budget)
    assert total(scores, of_target) <= total(scores, of_budget)


def test_a_target_that_nothing_reaches_is_refused():
    scores = np.array([[4.0, 1.0], [3.0, 0.5]])
    with pytest.raises(ValueError, match=r"target=1\.4: accepted: 1\.5 or more"):
        fewest_bits(scores, [32, 64], [4, 8], 1.4)
    assert fewest_bits(scores, [32, 64], [4, 8], 1.5) == [1, 1]
    assert fewest_bits(scores, [32, 64], [4, 8], 7.0) == [0, 0]


def test_a_budget_that_can_be_met_exactly_is():
    """Four equal layers at 5 bits: one of them takes 8. As floats the weights would sum to a bit more."""
    scores = np.array([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    for weights in ([32] * 4, [3 * 10**11] * 4):
        assert solve(scores, weights, [4, 8], 5.0) == [1, 0, 0, 0]
        assert solve(scores, weights, [4, 8], np.nextafter(5.0, 0)) == [0, 0, 0, 0]


@pytest.mark.parametrize(("layers", "seconds"), [(210, 0.5), (10_000, 10)])
def test_large_problems_take_little_time(layers, seconds):
    rng = np.random.default_rng(0)
    bits = [2, 3, 4, 8]
    weights = [32 * int(n) for n in rng.integers(1000, 100_000, layers)]
    scores = np.sort(rng.lognormal(size=(layers, 4)), 1)[:, ::-1] * np.array(weights)[:, None]
    start = time.process_time()
    chosen = solve(scores, weights, bits, 4.5)
    assert time.process_time() - start < seconds
    assert used(weights, bits, chosen) / sum(weights) <= 4.5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="score of layer 1 with option 0 is not finite"):
        solve(np.array([[1, 0], [bad, 0]]), [32, 32], [4, 8], 5.0)


def test_a_budget_that_nothing_meets_is_refused():
    with pytest.raises(ValueError, match=r"budget=3\.9: accepted: 4 bits or more"):
        solve(np.zeros((2, 2)), [32, 64], [4, 8], 3.9)
