"""Rounding to the MX formats in a dozen passes over memory, the same numbers as auto-round's own.

auto-round rounds with some fifty float operations on tensors of full size (`quant_mx` in
`auto_round/data_type/mxfp.py`), and inputs of linears are rounded at every call. This module gives
its results bit for bit (tests/test_rounding.py), its surprises included.
"""

from __future__ import annotations

import torch

GROUP = 32
# OCP Microscaling Formats (MX) v1.0, section 5.3. Bits -> explicit mantissa bits, exponent of the
# smallest normal number, exponent of the largest one, largest number.
FORMATS = {
    4: (1, 0, 2, 6.0),  # E2M1
    6: (3, 0, 2, 7.5),  # E2M3
    8: (3, -6, 8, 448.0),  # E4M3
}
# Groups in one go on a CPU: 1 MiB of float32 for each buffer, so that all of them stay in cache.
CHUNK = 8192

# Fields of a float32, as int32.
SIGN = -(2**31)
EXPONENT = 0x7F800000


@torch.no_grad()
def round_mx(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """`tensor` rounded to MXFP4, MXFP6 (E2M3) or MXFP8 (E4M3) and de-quantized.

    tensor: float32, bfloat16 or float16; each 32 neighbours along the last dimension share a scale.
    bits:   4, 6 or 8.

    Returns a new contiguous tensor of the same shape and dtype. The formula is section 6.3 of OCP
    Microscaling Formats (MX) v1.0: the scale is 2 to the power of floor(log2(largest magnitude))
    less the exponent of the format's largest number, and no less than 2**-127; values over that
    scale are rounded half to even and clamped. One infinity or NaN makes its whole group NaN.

    Raises ValueError if the last dimension is no multiple of 32, or for other bits or dtypes.
    """
    if bits not in FORMATS:
        raise ValueError(f"MX formats have {', '.join(map(str, FORMATS))} bits, not {bits}")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"MX rounding takes float32, bfloat16 or float16, not {tensor.dtype}")
    if tensor.dim() == 0 or tensor.shape[-1] % GROUP:
        raise ValueError(f"the last dimension of {tuple(tensor.shape)} is no multiple of {GROUP}")
    groups = tensor.contiguous().view(-1, GROUP)
    result = torch.empty_like(groups)
    step = CHUNK if tensor.device.type == "cpu" else max(len(groups), 1)
    for start in range(0, len(groups), step):
        _round(groups[start : start + step], result[start : start + step], *FORMATS[bits])
    return result.view(tensor.shape)


def _round(
    source: torch.Tensor, target: torch.Tensor, mantissa: int, low: int, high: int, largest: float
) -> None:
    """Write the rounded `source` [groups, 32] to `target`; the format is a row of FORMATS."""
    x = source.float()
    # Floats without their signs are ordered like integers, whose maximum torch finds faster.
    bits = x.view(torch.int32) & ~SIGN
    maximum = bits.amax(-1, keepdim=True).view(torch.float32)
    # log2 in float32 as in auto-round, because it rounds up to k just below 2**k. No upper clamp:
    # only infinity would meet it, and its scale must be infinite to make the group NaN below. A
    # group of zeros has log2 -inf and the smallest scale; any would do.
    scale = torch.pow(2.0, maximum.log2_().floor_().sub_(high).clamp_(min=-127))
    # The value of note (see _nudge) has 24 significant bits, all ones. A shorter dtype has none,
    # and in float32 a look is cheaper than the cure; on other devices a look would wait for them.
    nudge = source.dtype == torch.float32 and (
        x.device.type != "cpu"
        or torch.bitwise_or(x.view(torch.int32), SIGN | EXPONENT, out=bits).amax().item() == -1
    )
    y = torch.div(x, scale, out=bits.view(torch.float32))
    if nudge:
        _nudge(y, 2.0 ** (low - mantissa))
    # Each element's own power of two; its mantissa's last bit is worth power * 2**-mantissa.
    power = (y.view(torch.int32) & EXPONENT).view(torch.float32).clamp_(min=2.0**low)
    # In those units; adding to +0 turns -0 to +0, as auto-round does. It leaves -0 where a negative
    # number is rounded to zero, and so does round_.
    torch.addcdiv(y.new_zeros(()), y, power, value=2.0**mantissa, out=y)
    y.round_().mul_(power).clamp_(-largest * 2**mantissa, largest * 2**mantissa)
    target.copy_(y.mul_(scale.mul_(2.0**-mantissa)))


def _nudge(y: torch.Tensor, smallest: float) -> None:
    """Double in place what auto-round rounds away from the nearest: half of `smallest` less an ulp.

    It rounds |y| / smallest by floor(|y| / smallest + 0.5), and that sum is rounded up to 1.
    """
    below_half = smallest / 2 * (1 - 2.0**-24)
    y.copy_(torch.where(y.abs() == below_half, 2 * y, y))
