"""One scheme for all layers: bf16, the lowest option or the highest."""

from __future__ import annotations

from mixprec.schemes import BF16


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    name = request.baseline.name
    scheme = BF16 if name == "bf16" else schemes[0 if name == "low" else -1]
    return {layer.name: scheme.name for layer in layers}
