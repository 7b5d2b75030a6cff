"""output_error: how far each linear's own output moves, ‖Q(W) Q(x) − W x‖², and nothing behind it."""

from __future__ import annotations

import numpy as np
import torch

from mixprec.allocate import scores
from mixprec.allocate.backward import Error, Inputs, batches
from mixprec.schemes import Layer, Scheme


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    return scores.minimise(layers, schemes, budget, request, "output_error", score)[0]


@torch.no_grad()
def score(
    model: torch.nn.Module, tokens: torch.Tensor, layers: list[Layer], schemes: list[Scheme]
) -> np.ndarray:
    """Mean over tokens of ‖y' − y‖², float64 [sequences, layers, options]. One forward pass."""
    sums = np.zeros((len(tokens), len(layers), len(schemes)))
    inputs, rows = Inputs(), slice(0)

    def note(place: int):
        def hook(module, arguments):
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            for option, scheme in enumerate(schemes):
                squares = Error(module.weight, scheme, inputs, x).output().double().square()
                each = squares.view(rows.stop - rows.start, -1).sum(1)
                sums[rows, place, option] += each.cpu().numpy()

        return hook

    hooks = [
        model.get_submodule(layer.name).register_forward_pre_hook(note(place))
        for place, layer in enumerate(layers)
    ]
    try:
        for rows in batches(tokens):
            model.base_model(input_ids=tokens[rows].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sums / tokens.shape[1]
