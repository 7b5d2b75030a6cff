"""The arithmetic of the benchmark; the measurements themselves are not tests."""

import multiprocessing
import time

import numpy as np
import pytest
import torch
from conftest import cell

from mixprec.bench import blocks, common, evaluate, signals


def test_a_ratio_is_of_medians_with_its_extremes():
    found = common.ratio([10.0, 12.0, 20.0], [5.0, 4.0, 8.0])
    assert found == {"median": 2.4, "spread": [10 / 8, 20 / 4]}


def test_answers_are_compared_request_by_request():
    theirs = {"piqa": [[-10.0, False], [-4.0, True]]}
    ours = {"piqa": [[-10.001, False], [-4.0, False]]}
    found = evaluate.compare(ours, theirs)
    assert found["requests"] == 2
    assert abs(found["largest_relative_difference"] - 1e-4) < 1e-9
    assert found["greedy_differs"] == [{"task": "piqa", "ours": -4.0, "hflm": -4.0}]


def test_memory_is_what_is_allocated_meanwhile():
    """In a process of its own, as there: one that keeps freed memory would take it from there."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(allocate_meanwhile)


def allocate_meanwhile():
    memory = blocks._Memory()
    before = torch.ones(25_000_000)
    with memory:
        more = torch.ones(25_000_000)
        time.sleep(0.1)
    assert 2e8 <= memory.anonymous < 2.5e8 and memory.resident >= 2e8
    assert before.sum() == more.sum()


def test_a_ratio_of_kl_is_paired_by_sequence():
    ours, theirs = [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]
    exact = signals._of_means(ours, theirs)
    assert exact["median"] == 0.5 and exact["spread"] == pytest.approx([0.5, 0.5])
    low, high = signals._of_means([2.0, 1.0, 4.0, 3.0], theirs)["spread"]
    assert low < 0.5 < high
    # as many resamples of pairs say it, to a fifth
    rng, a, b = np.random.default_rng(0), np.array([2.0, 1.0, 4.0, 3.0] * 8), np.array(theirs * 8)
    draws = rng.integers(0, 32, (4000, 32))
    spread = (a[draws].mean(1) / b[draws].mean(1)).std()
    low, high = signals._of_means(a, b)["spread"]
    assert (high - low) / 2 == pytest.approx(spread, rel=0.2)


def test_every_side_of_the_comparison_is_a_configuration():
    for ask in signals.SIDES.values():
        cell(*ask, "budget=4.5")
    assert len(cell("baseline=fisher", signals.FOUR).schemes) == 4
