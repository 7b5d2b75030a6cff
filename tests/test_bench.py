"""The arithmetic of the benchmark; the measurements themselves are not tests."""

import time

import torch

from mixprec import bench


def test_a_ratio_is_of_medians_with_its_extremes():
    found = bench.ratio([10.0, 12.0, 20.0], [5.0, 4.0, 8.0])
    assert found == {"median": 2.4, "spread": [10 / 8, 20 / 4]}


def test_answers_are_compared_request_by_request():
    theirs = {"piqa": [[-10.0, False], [-4.0, True]]}
    ours = {"piqa": [[-10.001, False], [-4.0, False]]}
    found = bench.compare(ours, theirs)
    assert found["requests"] == 2
    assert abs(found["largest_relative_difference"] - 1e-4) < 1e-9
    assert found["greedy_differs"] == [{"task": "piqa", "ours": -4.0, "hflm": -4.0}]


def test_memory_is_what_is_allocated_meanwhile():
    memory = bench._Memory()
    before = torch.ones(25_000_000)
    with memory:
        more = torch.ones(25_000_000)
        time.sleep(0.1)
    assert 2e8 <= memory.anonymous < 2.5e8 and memory.resident >= 2e8
    assert before.sum() == more.sum()
