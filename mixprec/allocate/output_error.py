"""output_error: how far each linear's own output moves, ‖Q(W) Q(x) − W x‖², and nothing behind it."""

from __future__ import annotations

import numpy as np
import torch

from mixprec.allocate import scores
from mixprec.allocate.backward import Error, Inputs, Sums, forward
from mixprec.allocate.blocks import Blocks
from mixprec.schemes import Layer, Scheme


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    return scores.minimise(layers, schemes, budget, request, "output_error", score)


def score(
    model: torch.nn.Module | Blocks,
    tokens: torch.Tensor,
    layers: list[Layer],
    schemes: list[Scheme],
) -> np.ndarray:
    """Mean over tokens of ‖y' − y‖², float64 [sequences, layers, options]. One forward pass."""
    sums, rounded = Sums(tokens, layers, len(schemes)), Inputs()

    def see(name, weight, sequences, x):
        x = x.reshape(-1, x.shape[-1])
        for option, scheme in enumerate(schemes):
            output = Error(weight, scheme, rounded, x).output()
            sums.add(name, option, sequences, output.double().square().sum(-1))

    forward(model, tokens, [layer.name for layer in layers], see)
    return sums.of_all() / tokens.shape[1]
