"""weight_error: how far the weights move, ‖Q(W) − W‖². It needs no text and sees no activations."""

from __future__ import annotations

import numpy as np
import torch

from mixprec.allocate import scores
from mixprec.allocate.backward import round_weight
from mixprec.allocate.blocks import Blocks
from mixprec.schemes import Layer, Scheme


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    return scores.minimise(layers, schemes, budget, request, "weight_error", score)


def score(
    model: torch.nn.Module | Blocks,
    tokens: torch.Tensor,
    layers: list[Layer],
    schemes: list[Scheme],
) -> np.ndarray:
    """‖Q(W) − W‖², float64 [1, layers, options]."""
    sums = np.empty((1, len(layers), len(schemes)))
    for place, layer in enumerate(layers):
        if isinstance(model, Blocks):
            weight = model.weight(layer.name)
        else:
            weight = model.get_submodule(layer.name).weight
        for option, scheme in enumerate(schemes):
            error = round_weight(weight, scheme) - weight.float()
            sums[0, place, option] = error.double().square().sum().item()
    return sums
