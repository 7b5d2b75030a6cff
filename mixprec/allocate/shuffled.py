"""random: the highest scheme for layers in random order. What chance achieves with the same budget."""

from __future__ import annotations

import numpy as np

from mixprec.allocate import fill


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    order = np.random.default_rng(request.seed).permutation(len(layers))
    return fill([layers[i] for i in order], schemes[0], schemes[-1], budget)
