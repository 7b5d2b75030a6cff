"""fisher: the layers' predicted KL to BF16, from one backward pass of the unquantized model.

An error Δ = Q(W) Q(x) − W x at the output of one linear changes the next-token distributions by

    KL ≈ ½ Δᵀ F Δ,   F = E[g gᵀ],

g being the gradient of log p(label) at that output and the label drawn from the model's own p: F is
the Fisher information (Kunstner, Balles and Hennig 2019, arXiv:1905.12558, on why it must be drawn
so). So, with one g for each token t,

    score(layer, option) = ½ mean_t (g_t · Δ_t)²      [nats per token]

Labels need not be drawn: at the logits, F is diag(p) − p pᵀ, and v = √p∘ξ − p (√p·ξ) with random
signs ξ has this covariance and lighter tails. docs/allocation.md derives it and says what it leaves out.
"""

from __future__ import annotations

import numpy as np
import torch

from mixprec.allocate import scores
from mixprec.allocate.backward import totals
from mixprec.allocate.blocks import Blocks
from mixprec.schemes import Layer, Scheme

SEED = 0  # of the signs


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    return scores.minimise(layers, schemes, budget, request, "fisher", score, nats=True)


def score(
    model: torch.nn.Module | Blocks,
    tokens: torch.Tensor,
    layers: list[Layer],
    schemes: list[Scheme],
) -> np.ndarray:
    """Predicted KL in nats per token, float64 [sequences, layers, options]: each sequence's mean."""

    def gradient(logits: torch.Tensor, sequence: int, start: int) -> torch.Tensor:
        return signed(logits, signs(logits.shape, [SEED, sequence, start]))

    def along(error, g, back):
        return error.along(g, back).square()

    return 0.5 * totals(model, tokens, layers, schemes, gradient, along) / tokens.shape[1]


def signed(logits: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """√p∘ξ − p (√p·ξ) for logits and signs ξ [tokens, words]: of mean 0, covariance diag(p) − p pᵀ."""
    root = torch.softmax(logits, -1).sqrt_()
    noise = signs.to(root.device).mul_(root)
    return noise.addcmul_(root.square_(), noise.sum(-1, keepdim=True), value=-1)


def signs(shape: tuple[int, int], seed: list[int]) -> torch.Tensor:
    """Random ±1, float32, the same on every machine and device."""
    tokens, words = shape
    bits = np.random.default_rng(seed).bytes(tokens * -(-words // 8))
    bits = np.frombuffer(bits, np.uint8).reshape(tokens, -1)
    return torch.from_numpy(np.unpackbits(bits, axis=1)[:, :words]).float().mul_(2).sub_(1)
