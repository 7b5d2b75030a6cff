"""Linears whose float32 products on an x86 CPU are oneDNN's, from weights that are packed once.

torch gives float32 products to MKL, which uses AVX-512 on Intel's processors only. oneDNN, which
torch is built with too, uses it wherever it is: SmolLM2's layers run at 530 instead of 220 GFLOP/s
on two cores of an AMD Zen 5. Products and sums are float32 as before; their order is another.
"""

from __future__ import annotations

import platform

import torch


class PackedLinear(torch.nn.Linear):
    """A linear for inference that multiplies with what was packed last; at first, its weight.

    weight: bfloat16 [out_features, in_features], as the linear had it; packing changes it not.
    """

    def __init__(self, linear: torch.nn.Linear):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight = torch.nn.Parameter(linear.weight.data.bfloat16(), requires_grad=False)
        self.bias = linear.bias
        self.pack(self.weight.data)

    def pack(self, weight: torch.Tensor) -> None:
        """Multiply with `weight` [out_features, in_features] from now on."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.float())

    @property
    def packed(self) -> torch.Tensor:
        """What is multiplied with: float32 [out_features, in_features], a copy."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [..., in_features]; returns float32 [..., out_features]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def can_pack(module: torch.nn.Module) -> bool:
    """True for a linear that PackedLinear can replace: on an x86 CPU, float32, of bfloat16 values."""
    return (
        isinstance(module, torch.nn.Linear)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and torch.equal(module.weight.bfloat16().float(), module.weight)
    )
