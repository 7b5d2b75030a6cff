"""Rules that decide which scheme each layer gets; one file a rule, named in conf/baseline/*.yaml.

Each has one function,

    allocate(layers, schemes, budget, request) -> {layer name: scheme name}

layers:  the quantized linears, in the order in which the network applies them
schemes: the options, lowest bits first
budget:  average bits per weight that the allocation may use, scales not counted; None if unbudgeted
         or if request.target_kl takes its place
request: what else a rule may need
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixprec.cell import Baseline, Calibration, Model
from mixprec.schemes import Layer, Scheme, layer_bits, realised_bits

if TYPE_CHECKING:
    import torch

Allocation = dict[str, str]


@dataclass(frozen=True)
class Request:
    """The baseline as configured, and what rules that look at the model need."""

    baseline: Baseline
    seed: int | None = None
    model: Model | None = None
    calibration: Calibration | None = None
    cache: Path | None = None
    note: Callable[[str, object], None] = lambda key, value: None  # into result.json's `notes`
    reference: torch.nn.Module | None = None  # None if drops_reference
    target_kl: float | None = None  # predicted, in nats per token, to be reached; None: a budget
    fused: bool = False  # linears that kernels fuse get one scheme


def allocate(
    layers: list[Layer], schemes: list[Scheme], budget: float | None, request: Request
) -> Allocation:
    """The allocation that `request.baseline` makes; never above the budget."""
    allocation = _rule(request.baseline).allocate(layers, schemes, budget, request)
    if set(allocation) != {layer.name for layer in layers}:
        raise RuntimeError(f"{request.baseline.name} allocated other layers than it was given")
    if budget is not None and (bits := realised_bits(layers, allocation)) > budget:
        raise RuntimeError(f"{request.baseline.name} took {bits:.4f} bits of {budget:g}")
    return allocation


def loads_a_copy(baseline: Baseline) -> bool:
    """True if the rule loads the model's weights once more; False if it needs the reference, if any."""
    return getattr(_rule(baseline), "LOADS_A_COPY", False)


def drops_reference(baseline: Baseline, model: Model) -> bool:
    """True if the reference is dropped while the rule reads the model's weights by itself.

    With low_memory: a rule that loads a copy, or one with scores, which then come from the
    checkpoint's files, one block at a time in memory (blocks.py).
    """
    return model.low_memory and (loads_a_copy(baseline) or hasattr(_rule(baseline), "score"))


def _rule(baseline: Baseline):
    return importlib.import_module(f"mixprec.allocate.{baseline.rule}")


def fill(layers: list[Layer], lowest: Scheme, higher: Scheme, budget: float) -> Allocation:
    """`higher` for whole layers from the first on, as long as the average stays within `budget`."""
    allocation = {layer.name: lowest.name for layer in layers}
    bits = sum(layer_bits(layer, lowest, count_scales=False) for layer in layers)
    allowed = budget * sum(layer.weights for layer in layers)
    for layer in layers:
        bits += layer.weights * (higher.bits - lowest.bits)
        if bits > allowed:
            break
        allocation[layer.name] = higher.name
    return allocation
