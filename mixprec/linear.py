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
    """A linear for inference that multiplies with what was packed last; at first, its own weight.

    weight: its own, [out_features, in_features], whatever is packed. A parameter if it is tied to one
    that is in memory anyway; else in bfloat16, and held beside what is packed only while that is
    another: what is packed of it gives it back exactly.
    """

    def __init__(self, linear: torch.nn.Linear, *, tied: bool = False):
        torch.nn.Module.__init__(self)  # Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        if tied:
            self.weight = linear.weight
        self._own: torch.Tensor | None = None
        self._packed = pack(linear.weight.data.float())

    def __getattr__(self, name: str):
        if name == "weight" and "_packed" in self.__dict__ and name not in self._parameters:
            return self.packed.bfloat16() if self._own is None else self._own
        return super().__getattr__(name)

    def pack(self, weight: torch.Tensor | None) -> None:
        """Multiply with `weight` [out_features, in_features] from now on; None: with its own."""
        own = self.weight.data
        self._packed = pack((own if weight is None else weight).float())
        self._own = None if weight is None or "weight" in self._parameters else own

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

    see(weight, x, g, back): the linear's weight [out_features, in_features], its input
    [..., in_features], the gradient at its output [..., out_features], and the one at its input,
    g W [..., in_features].
    """

    @staticmethod
    def forward(ctx, x, module, forward, see):
        """x W, computed by `forward`, the module's own."""
        ctx.save_for_backward(x)
        ctx.module, ctx.see = module, see
        return forward(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        weight = ctx.module.weight  # now: a packed linear has to make it
        back = multiply(g.contiguous(), pack(weight.to(g.dtype).T))
        ctx.see(weight, x, g, back)
        return back, None, None, None


def can_pack(module: torch.nn.Module) -> bool:
    """True for a linear that PackedLinear can replace: on an x86 CPU, float32, of bfloat16 values."""
    return (
        isinstance(module, torch.nn.Linear)
        and packs(module.weight.device, module.weight.dtype)
        and torch.equal(module.weight.bfloat16().float(), module.weight)
    )
