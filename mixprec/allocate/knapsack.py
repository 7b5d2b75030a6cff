"""The one solver that all signals share: which option each layer takes, under a budget of bits or
for a sum of scores that is to be reached.

A multiple-choice knapsack, solved to optimality by HiGHS (`scipy.optimize.milp`).
"""

from __future__ import annotations

import ctypes
import math
import os
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


def solve(scores: np.ndarray, weights: list[int], bits: list[int], budget: float) -> list[int]:
    """The option of each layer that minimises the sum of scores within the budget.

    scores:  [layers, options], lower is better
    weights: how many weights each layer has
    bits:    of each option, per weight
    budget:  average bits per weight that may be used, of the whole

    Returns an option's index for each layer. To fix one option for several layers, give them as
    one: their scores and weights summed. Raises ValueError for scores that are not finite or for a
    budget that nothing meets.
    """
    scores, extra, unit, least = _whole_numbers(scores, weights, bits)
    # In whole numbers: 5.0 bits means exactly 5, and a float never decides a tie.
    allowed = math.floor(Fraction(budget) * sum(weights))
    while (allowed + 1) / sum(weights) <= budget:  # 16/3 as a float is less than 16/3
        allowed += 1
    if allowed < least:
        raise ValueError(
            f"budget={budget:g}: accepted: {least / sum(weights):g} bits or more, the lowest options'"
        )
    return _choose(scores, extra, (allowed - least) // unit)


def fewest_bits(
    scores: np.ndarray, weights: list[int], bits: list[int], target: float
) -> list[int]:
    """The option of each layer that takes the fewest bits with a sum of scores of at most `target`.

    Of allocations with as many bits, the one with the smallest sum. The arguments are those of
    `solve`, and it is the same knapsack: its smallest sum never rises with the bits that may be used,
    so the fewest that reach the target are found by bisection. Raises ValueError for a target that
    nothing reaches.
    """
    scores, extra, _, _ = _whole_numbers(scores, weights, bits)
    layers = np.arange(len(scores))
    best = scores.argmin(1)
    if (smallest := scores[layers, best].sum()) > target:
        raise ValueError(
            f"target={target:g}: accepted: {smallest:g} or more, the best options' sum"
        )
    enough, too_few = extra[layers, best].sum(), -1
    while enough - too_few > 1:
        room = int((enough + too_few) // 2)
        chosen = _choose(scores, extra, room, target)
        if scores[layers, chosen].sum() <= target:
            enough = extra[layers, chosen].sum()
        else:
            too_few = room
    return _choose(scores, extra, int(enough))


def _whole_numbers(
    scores: np.ndarray, weights: list[int], bits: list[int]
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(scores, bits above each layer's lowest in units [layers, options], the unit, lowest bits)."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(weights), len(bits)):
        raise ValueError(f"scores {scores.shape} are not of {len(weights)} layers × {len(bits)}")
    if not np.isfinite(scores).all():
        layer, option = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(f"the score of layer {layer} with option {option} is not finite")
    costs = [[weight * option for option in bits] for weight in weights]
    extra = [[cost - min(row) for cost in row] for row in costs]
    unit = math.gcd(*(cost for row in extra for cost in row)) or 1
    units = np.array([[cost // unit for cost in row] for row in extra], dtype=np.float64)
    return scores, units, unit, sum(min(row) for row in costs)


def _choose(
    scores: np.ndarray, extra: np.ndarray, room: int, target: float | None = None
) -> list[int]:
    """The best option of each layer; extra, room: whole numbers [layers, options].

    With a target it need only be good enough to see if a sum of scores of at most that is possible.
    """
    layers = np.arange(len(scores))
    loss = scores - scores.min(1, keepdims=True)
    price = _price(loss, extra, room)
    priced = loss + price * extra
    reduced = priced - priced.min(1, keepdims=True)
    bound = priced.min(1).sum() - price * room
    chosen = _greedy(reduced, loss, extra, room)
    rounding = 1e-12 * loss.sum()
    gap = loss[layers, chosen].sum() - bound + rounding
    if target is not None:
        left_over = target - scores.min(1).sum()
        if scores[layers, chosen].sum() <= target or bound - rounding > left_over:
            return chosen.tolist()  # known without HiGHS, either way
    # An option whose reduced cost is above the gap is in no allocation that is better (the core of
    # Balas and Zemel 1980). Of thousands of layers, a few dozen remain for HiGHS to choose for.
    open_to = reduced <= gap
    core = np.flatnonzero(open_to.sum(1) > 1)
    fixed = np.where(open_to, 0, np.inf).argmin(1)
    if len(core) == 0:
        return chosen.tolist()
    left = room - extra[layers, fixed].sum() + extra[core, fixed[core]].sum()
    found = fixed.copy()
    found[core] = _highs(loss[core], extra[core], open_to[core], left)
    better = loss[layers, found].sum() < loss[layers, chosen].sum()
    return (found if better and extra[layers, found].sum() <= room else chosen).tolist()


def _price(loss: np.ndarray, extra: np.ndarray, room: int) -> float:
    """The smallest price of a unit at which the layers, each on its own, stay within the room."""

    def used(price: float) -> float:
        priced = loss + price * extra
        tied = priced <= priced.min(1, keepdims=True)
        return np.where(tied, extra, np.inf).min(1).sum()

    if used(0.0) <= room:
        return 0.0
    low, high = 0.0, loss.max()  # a unit is at least 1, so at this price none is bought
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if used(middle) <= room else (middle, high)
    return high


def _greedy(reduced: np.ndarray, loss: np.ndarray, extra: np.ndarray, room: int) -> np.ndarray:
    """An allocation within the room: each layer's best at the price, then what else fits."""
    layers = np.arange(len(loss))
    chosen = np.where(reduced <= 0, extra, np.inf).argmin(1)
    left = room - extra[layers, chosen].sum()
    for place in np.argsort(reduced, axis=None, kind="stable"):
        layer, option = divmod(int(place), loss.shape[1])
        more = extra[layer, option] - extra[layer, chosen[layer]]
        if loss[layer, option] < loss[layer, chosen[layer]] and more <= left:
            chosen[layer], left = option, left - more
    return chosen


def _highs(loss: np.ndarray, extra: np.ndarray, open_to: np.ndarray, room: float) -> np.ndarray:
    layers, options = loss.shape
    one_each = csr_array(
        (np.ones(loss.size), (np.repeat(np.arange(layers), options), np.arange(loss.size)))
    )
    with _silenced():
        solution = milp(
            # HiGHS stops at an absolute gap of 1e-6: on this scale that is nothing.
            loss.ravel() / (loss.mean() or 1.0),
            integrality=np.ones(loss.size),
            bounds=Bounds(0, open_to.ravel().astype(float)),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                # Its tolerance is absolute too: below half a unit.
                LinearConstraint(csr_array(extra.reshape(1, -1)), -np.inf, room + 0.25),
            ],
            options={"mip_rel_gap": 0, "presolve": False},
        )
    if solution.x is None:
        raise RuntimeError(f"HiGHS found no allocation: {solution.message}")
    return solution.x.reshape(layers, options).argmax(1)


@contextmanager
def _silenced():
    """HiGHS writes a debugging line straight to the process's standard output, whatever it is told."""
    flush, before, nowhere = ctypes.CDLL(None).fflush, os.dup(1), os.open(os.devnull, os.O_WRONLY)
    flush(None)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)  # the line may still be in C's own buffer
        os.dup2(before, 1)
        os.close(before)
        os.close(nowhere)
