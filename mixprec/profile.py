"""Where the time of a cell goes: tokens run and saved, and the share of the machine's own peak."""

from __future__ import annotations

import time

import torch

from mixprec.linear import PackedLinear, can_pack
from mixprec.schemes import Layer


def matrix_product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this machine, measured: the best of some products of square matrices.

    Of torch's own product and, on a CPU, of oneDNN's (mixprec/linear.py): whichever is faster.
    """
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    linear = torch.nn.Linear(size, size, bias=False, device=device, dtype=dtype)
    linear.weight.data = linear.weight.data.bfloat16().to(dtype)
    products = [lambda: a @ a]
    if can_pack(linear):
        packed = PackedLinear(linear)
        products.append(lambda: packed(a))
    best = float("inf")
    with torch.no_grad():
        for product in products * 8:
            start = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def profile(
    model: torch.nn.Module, layers: list[Layer], tokens: dict[str, int], seconds: float
) -> dict:
    """How well the evaluation of `tokens` (asked, run, padded, rows) used the machine.

    Useful FLOP are two for each weight of a linear and token that was run, and two for each weight
    of the output head and row; padding, attention and rounding count as nothing. `seconds` is the
    whole stage, with tokenizing, task definitions and metrics.
    """
    head = model.get_output_embeddings().weight.numel()
    weights = sum(layer.weights for layer in layers)
    flop = 2 * (weights * tokens["run"] + head * tokens["rows"])
    peak = matrix_product_peak(model.device, model.dtype)
    return {
        "tokens_saved": tokens["asked"] - tokens["run"],
        "tokens_per_second": tokens["run"] / seconds,
        "useful_flop": flop,
        "peak_flop_per_second": peak,
        "utilisation": flop / seconds / peak,
    }
