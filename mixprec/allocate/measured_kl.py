"""measured_kl: the KL to BF16 with one layer in one option and all others in BF16, measured.

What the other signals approximate, layer by layer, and what a sum over layers still leaves out: how
errors of several layers act together. It takes a forward pass over the calibration tokens for every
option of every layer, so it is a yardstick for small models and not a way to allocate large ones.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mixprec.allocate import scores
from mixprec.allocate.backward import round_weight
from mixprec.evaluate import kl
from mixprec.quantize import InMemory
from mixprec.schemes import BF16, Layer, Scheme


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    return scores.minimise(layers, schemes, budget, request, "measured_kl", score, nats=True)


def score(
    model: torch.nn.Module, tokens: torch.Tensor, layers: list[Layer], schemes: list[Scheme]
) -> np.ndarray:
    """Measured KL in nats per token, float64 [sequences, layers, options]: each sequence's mean.

    `model` is left as it was. A KL near the arithmetic's rounding errors may come out below 0.
    """
    samples = np.empty((len(tokens), len(layers), len(schemes)))
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(layers) * len(schemes), desc="measured KL", leave=False) as bar,
    ):
        reference = kl.Reference.of(model, tokens, Path(folder) / "reference.safetensors")
        for place, layer in enumerate(layers):
            in_memory = InMemory(model, packed=False)  # a new one holds one layer's reference
            weight = model.get_submodule(layer.name).weight.detach().clone()
            try:
                for option, scheme in enumerate(schemes):
                    # As given, because InMemory itself rounds to MX formats only.
                    rounded = {layer.name: round_weight(weight, scheme)}
                    in_memory.apply({layer.name: scheme.name}, rounded)
                    divergence = kl.divergence(model, tokens, reference)
                    samples[:, place, option] = divergence["per_sequence"]
                    bar.update()
            finally:
                in_memory.apply({layer.name: BF16.name})
    return samples
