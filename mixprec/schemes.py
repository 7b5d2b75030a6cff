"""Schemes (the formats a layer may take) and how many bits they cost.

This module imports neither torch nor auto-round, so a configuration can be judged before either is
loaded. `tests/test_schemes.py` holds every row below equal to auto-round's own preset.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """One format.

    name:        as written in conf/options/*.yaml and in allocation.json
    preset:      auto-round's name for it (`auto_round.schemes.PRESET_SCHEMES`)
    bits:        bits per weight, without scales
    group_size:  weights that share one scale, along the input dimension
    scale_bits:  bits of one group's scale (8: a power of two, E8M0; 16: a half float)
    zero_point_bits: bits that auto-round reserves for one group's zero point
    activations: True if activations are rounded too, to the same element format and group size
    """

    name: str
    preset: str
    bits: int
    group_size: int
    scale_bits: int
    zero_point_bits: int
    activations: bool

    @property
    def family(self) -> str:
        """What can share one model: `mx` is rounded in memory, `int` is exported and reloaded.

        `none` is BF16, which both can hold.
        """
        if self.preset == "BF16":
            return "none"
        return "mx" if self.preset.startswith("MX") else "int"


def _mx(bits: int) -> Scheme:
    # OCP Microscaling Formats v1.0, section 5.1: blocks of 32 with one E8M0 scale.
    return Scheme(f"mxfp{bits}", f"MXFP{bits}", bits, 32, 8, 0, True)


def _weight_only(bits: int, group_size: int) -> Scheme:
    preset = f"W{bits}A16" + ("" if group_size == 128 else f"G{group_size}")
    return Scheme(f"w{bits}g{group_size}", preset, bits, group_size, 16, bits, False)


BF16 = Scheme("bf16", "BF16", 16, 1, 0, 0, False)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        *(_mx(bits) for bits in (4, 6, 8)),
        *(_weight_only(bits, group_size) for bits in (2, 3, 4, 8) for group_size in (128, 64, 32)),
    )
}


@dataclass(frozen=True)
class Layer:
    """One linear that is quantized: its module name and the shape of its weight."""

    name: str
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


def layer_bits(layer: Layer, scheme: Scheme, *, count_scales: bool) -> int:
    """Bits that `layer` takes in `scheme`.

    With `count_scales`, each group of each row adds one scale and one zero point, as
    `auto_round.auto_scheme.utils.compute_layer_bits` counts them; without, it is the budget's own
    accounting (auto-round's `ignore_scale_zp_bits`).
    """
    bits = layer.weights * scheme.bits
    if count_scales:
        groups = layer.out_features * -(-layer.in_features // scheme.group_size)
        bits += groups * (scheme.scale_bits + scheme.zero_point_bits)
    return bits


def realised_bits(
    layers: list[Layer], allocation: dict[str, str], *, count_scales: bool = False
) -> float:
    """Average bits per quantized weight of `allocation` (layer name -> scheme name)."""
    total = sum(
        layer_bits(layer, scheme_named(allocation[layer.name]), count_scales=count_scales)
        for layer in layers
    )
    return total / sum(layer.weights for layer in layers)


def scheme_named(name: str) -> Scheme:
    """The scheme called `name`; `bf16` is one too. Raises KeyError for any other name."""
    return BF16 if name == BF16.name else SCHEMES[name]
