"""One scheme for all layers: bf16, the lowest option or the highest."""

from __future__ import annotations

from mixprec.schemes import BF16


def allocate(layers, schemes, budget, request) -> dict[str, str]:
    scheme = {"bf16": lambda: BF16, "low": lambda: schemes[0], "high": lambda: schemes[-1]}[
        request.baseline.name
    ]()
    return {layer.name: scheme.name for layer in layers}
