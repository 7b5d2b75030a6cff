"""The one solver that all signals share: which option each layer takes, under a budget of bits.

A multiple-choice knapsack, solved to optimality by HiGHS (`scipy.optimize.milp`).
"""

from __future__ import annotations

import math
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
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(weights), len(bits)):
        raise ValueError(f"scores {scores.shape} are not of {len(weights)} layers × {len(bits)}")
    if not np.isfinite(scores).all():
        layer, option = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(f"the score of layer {layer} with option {option} is not finite")
    costs = [[weight * option for option in bits] for weight in weights]
    least = sum(min(row) for row in costs)
    # In whole numbers from here on: 5.0 bits means exactly 5, and a float never decides a tie.
    room = math.floor(Fraction(budget) * sum(weights)) - least
    if room < 0:
        raise ValueError(
            f"budget={budget:g}: accepted: {least / sum(weights):g} bits or more, the lowest options'"
        )
    extra = [[cost - min(row) for cost in row] for row in costs]
    unit = math.gcd(*(cost for row in extra for cost in row)) or 1
    extra = np.array([[cost // unit for cost in row] for row in extra], dtype=np.float64)
    return _choose(scores, extra, room // unit)


def _choose(scores: np.ndarray, extra: np.ndarray, room: int) -> list[int]:
    layers, options = scores.shape
    # HiGHS stops at an absolute gap of 1e-6, so losses are put on a scale where that is nothing.
    loss = scores - scores.min(1, keepdims=True)
    loss /= loss.mean() or 1.0
    one_each = csr_array(
        (
            np.ones(layers * options),
            (np.repeat(np.arange(layers), options), np.arange(layers * options)),
        )
    )
    capacity = room
    while True:
        solution = milp(
            loss.ravel(),
            integrality=np.ones(layers * options),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(extra.reshape(1, -1)), -np.inf, capacity),
            ],
            options={"mip_rel_gap": 0},
        )
        if solution.x is None:
            raise RuntimeError(f"HiGHS found no allocation: {solution.message}")
        chosen = solution.x.reshape(layers, options).argmax(1)
        over = int(extra[np.arange(layers), chosen].sum()) - room
        if over <= 0:
            return chosen.tolist()
        capacity -= over  # HiGHS keeps a constraint to a relative tolerance only
