"""AutoScheme's stored scores without the model: for the common solver, and for auto-round's own.

auto-round leaves one file an option, `scheme_<place>_<key>.json`, whose `layer_scores` has bits and loss
of every layer. Its solver, a dynamic program without a beam, is exact; where allocations tie, the order of
layers in the files decides, which is the order in which it was scored.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mixprec.schemes import BF16, Layer, Scheme, layer_bits


def read(folder: Path, layers: list[Layer], schemes: list[Scheme]) -> dict[str, list[float]] | None:
    """Layer name -> its loss in each of `schemes`, in the files' order of layers; BF16 loses nothing.

    None unless every scheme has one file with a score for each of `layers` and no other.
    """
    from auto_round.schemes import preset_name_to_scheme

    files = [
        json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("scheme_*.json"))
    ]
    columns: list[dict[str, float]] = []
    for scheme in schemes:
        if scheme is BF16:
            columns.append({layer.name: 0.0 for layer in layers})
            continue
        settings = {
            k: v for k, v in asdict(preset_name_to_scheme(scheme.preset)).items() if v is not None
        }
        found = [
            {name: loss for name, (_, loss) in file["layer_scores"].items()}
            for file in files
            if {k: v for k, v in file["scheme"].items() if v is not None} == settings
        ]
        if len(found) != 1 or found[0].keys() != {layer.name for layer in layers}:
            return None
        columns += found
    return {name: [column[name] for column in columns] for name in columns[0]}


def by_auto_round(
    folder: Path, layers: list[Layer], schemes: list[Scheme], budget: float
) -> dict[str, str] | None:
    """What AutoScheme allocates with the scores in `folder`, by its own solver; no model is loaded.

    None if they are not all there, or if layers are experts, which auto-round ties block by block.
    """
    from auto_round.auto_scheme.delta_loss import choose_bits_per_layer_with_path

    losses = read(folder, layers, schemes)
    if losses is None or any(".experts." in name or ".moe." in name for name in losses):
        return None
    by_name = {layer.name: layer for layer in layers}
    options = {
        name: [
            (place, layer_bits(by_name[name], scheme, count_scales=False), loss, [name])
            for place, (scheme, loss) in enumerate(zip(schemes, of_layer, strict=True))
        ]
        for name, of_layer in losses.items()
    }
    for end in (schemes[0].bits, schemes[-1].bits):  # as its GenScheme has it
        budget = end if abs(budget - end) < 1e-3 else budget
    allowed = int(sum(layer.weights for layer in layers) * budget)
    _, path = choose_bits_per_layer_with_path(options, allowed)
    return {name: schemes[place].name for names, place in path for name in names}


def values(losses: dict[str, list[float]], layers: list[Layer]) -> np.ndarray:
    """`read`'s losses as `knapsack.solve` takes them, [layers, options]."""
    return np.array([losses[layer.name] for layer in layers])
