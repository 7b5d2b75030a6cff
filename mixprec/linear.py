"""Linears whose float32 products on an x86 CPU are oneDNN's, from weights that are packed once.

torch gives float32 products to MKL, which uses AVX-512 on Intel's processors only. oneDNN, which
torch is built with too, uses it wherever it is: SmolLM2's layers run at 530 instead of 220 GFLOP/s
on two cores of an AMD Zen 5. Products and sums are float32 as before; their order is another.
"""

from __future__ import annotations

import ctypes
import platform
import sys

import torch

_HAS_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
)


# Of mallopt(3): parameters, and the values that `keep_memory` gives them.
_MALLOPT = {
    "M_TRIM_THRESHOLD": (-1, 1 << 30),
    "M_TOP_PAD": (-2, 1 << 28),
    "M_MMAP_THRESHOLD": (-3, 1 << 30),
}


def keep_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    By default a freed block of some megabytes, such as a layer's output, goes back to Linux, and the
    next layer waits for the same pages to be given again and cleared: 6 to 9% of a cell's time.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        for parameter, value in _MALLOPT.values():
            ctypes.CDLL(None).mallopt(parameter, value)


class PackedLinear(torch.nn.Linear):
    """A linear for inference that multiplies with what was packed last; at first, its weight.

    weight: [out_features, in_features] as the linear had it, in bfloat16, or, if it is tied to
    another module's and in memory anyway, in float32; packing changes it not.
    """

    def __init__(self, linear: torch.nn.Linear, *, tied: bool = False):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight = linear.weight
        if not tied:
            self.weight = torch.nn.Parameter(linear.weight.data.bfloat16(), requires_grad=False)
        self.bias = linear.bias
        self.pack(self.weight.data)

    def pack(self, weight: torch.Tensor) -> None:
        """Multiply with `weight` [out_features, in_features] from now on."""
        self._packed = pack(weight.float())

    @property
    def packed(self) -> torch.Tensor:
        """What is multiplied with: float32 [out_features, in_features], a copy."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [..., in_features]; returns float32 [..., out_features]."""
        return multiply(x, self._packed, self.bias)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """True where products of weights that were packed are faster."""
    return dtype == torch.float32 and device.type == "cpu" and _HAS_ONEDNN


def pack(weight: torch.Tensor) -> torch.Tensor:
    """What `multiply` takes for `weight` [out_features, in_features]: packed if that is faster."""
    if packs(weight.device, weight.dtype):
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return weight


def multiply(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x: [..., in_features]; returns x Wᵀ + bias, [..., out_features], in x's dtype. No gradients."""
    if packed.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return torch.nn.functional.linear(x, packed, bias)


class Seen(torch.autograd.Function):
    """A linear for a backward pass through activations alone, in which `see` is called once.

    see(x, g, back): the linear's input [..., in_features], the gradient at its output
    [..., out_features], and the one at its input, g W [..., in_features].
    """

    @staticmethod
    def forward(ctx, x, linear, weight, see):
        """x W, computed by `linear`; weight: [out_features, in_features]."""
        ctx.save_for_backward(x)
        ctx.weight, ctx.see = weight, see
        return linear(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        back = multiply(g.contiguous(), pack(ctx.weight.to(g.dtype).T))
        ctx.see(x, g, back)
        return back, None, None, None


def can_pack(module: torch.nn.Module) -> bool:
    """True for a linear that PackedLinear can replace: on an x86 CPU, float32, of bfloat16 values."""
    return (
        isinstance(module, torch.nn.Linear)
        and packs(module.weight.device, module.weight.dtype)
        and torch.equal(module.weight.bfloat16().float(), module.weight)
    )
