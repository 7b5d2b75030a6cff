"""modelopt: the gradient signal of NVIDIA ModelOpt's `auto_quantize`, with this project's solver.

Its `AutoQuantizeGradientSearcher` (modelopt/torch/quantization/algorithms.py) sums (∂loss/∂y)² (y' − y)²
over a linear's outputs y and tokens, the loss being that of the text's own next tokens. It differs
from `fisher` in two ways: labels are given and not drawn from the model, and errors of different
outputs are taken to be independent. ModelOpt itself also groups layers and has other constraints.
"""

from __future__ import annotations

import numpy as np
import torch

from mixprec.allocate import scores
from mixprec.allocate.backward import totals
from mixprec.allocate.blocks import Blocks
from mixprec.schemes import Layer, Scheme


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    return scores.minimise(layers, schemes, budget, request, "modelopt", score)


def score(
    model: torch.nn.Module | Blocks,
    tokens: torch.Tensor,
    layers: list[Layer],
    schemes: list[Scheme],
) -> np.ndarray:
    """Mean over tokens of Σ g² (y' − y)², float64 [sequences, layers, options]."""

    def gradient(logits: torch.Tensor, sequence: int, start: int) -> torch.Tensor:
        sent = torch.softmax(logits, -1)
        labels = tokens[sequence, start + 1 : start + 1 + len(sent)].to(sent.device)
        sent[torch.arange(len(labels)), labels] -= 1
        sent[len(labels) :] = 0  # the last token has no next one
        return sent

    def squared(error, g, back):
        return (g.float() * error.output().float()).square().sum(-1)

    return totals(model, tokens, layers, schemes, gradient, squared) / tokens.shape[1]
