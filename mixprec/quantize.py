"""An allocation becomes a quantized model: MX formats in memory, weight-only ones through a real export."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from mixprec.schemes import Scheme, scheme_named

# The kernel for exported models by device type (auto-round's name for it); None: auto-round chooses.
# On a CPU its plain torch kernel is 30 times slower than `ark` from auto-round-lib.
BACKENDS = {"cpu": "ark", "cuda": None}


@functools.cache
def rounding(scheme: Scheme) -> Callable[[torch.Tensor], torch.Tensor]:
    """auto-round's own rounding to nearest in `scheme`: a tensor to its de-quantized self.

    Groups lie along the last dimension, whose length the group size must divide. The result has the
    input's shape and dtype.
    """
    from auto_round.data_type.utils import get_quant_func
    from auto_round.schemes import preset_name_to_scheme

    preset = preset_name_to_scheme(scheme.preset)
    function, data_type = get_quant_func(preset.data_type, preset.bits, preset.sym, True)

    @torch.no_grad()
    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return function(
            tensor, bits=preset.bits, group_size=preset.group_size, data_type=data_type
        )[0]

    return rounded


def quantize_in_memory(model: torch.nn.Module, allocation: dict[str, str]) -> None:
    """Round the weights of `model`'s linears in place and their inputs at every call (MX schemes).

    The same numbers as `AutoRound(..., iters=0, disable_opt_rtn=True).quantize()` for the same
    allocation (tests/test_quantize.py), without its passes over calibration data.
    """
    modules = dict(model.named_modules())
    for name, scheme_name in allocation.items():
        scheme = scheme_named(scheme_name)
        if scheme.name == "bf16":
            continue
        round_to = rounding(scheme)
        weight = modules[name].weight
        # The checkpoint's weights are bfloat16; an MX value of a bfloat16 group is one again.
        weight.data.copy_(round_to(weight.data.to(torch.bfloat16)))
        if scheme.activations:
            modules[name].register_forward_pre_hook(
                lambda _, inputs, round_to=round_to: (round_to(inputs[0]), *inputs[1:])
            )


def export(model: torch.nn.Module, tokenizer, allocation: dict[str, str], folder: Path) -> Path:
    """Write `model` to disk with real integer weights in auto-round's own format, safetensors.

    model: the reference, in bfloat16; it is consumed. Returns the folder with the checkpoint.
    """
    from auto_round import AutoRound

    lowest = min({scheme_named(name) for name in allocation.values()}, key=lambda s: s.bits)
    others = {
        layer: _layer_settings(scheme_named(name))
        for layer, name in allocation.items()
        if name != lowest.name
    }
    compressor = AutoRound(
        model,
        tokenizer,
        scheme=lowest.preset,
        layer_config=others,
        iters=0,
        disable_opt_rtn=True,  # rounding to nearest, without auto-round's search for scales
        enable_torch_compile=False,
    )
    compressor.quantize_and_save(str(folder), format="auto_round")
    return next(path.parent for path in sorted(folder.rglob("config.json")))


def reload(folder: Path, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The exported model, loaded from disk with the kernels of BACKENDS."""
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    backend = BACKENDS.get(device.type)
    kernels = {"quantization_config": AutoRoundConfig(backend=backend)} if backend else {}
    return (
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, device_map=str(device), **kernels
        )
        .eval()
        .requires_grad_(False)
    )


def _layer_settings(scheme: Scheme) -> dict:
    from auto_round.schemes import preset_name_to_scheme

    return {k: v for k, v in asdict(preset_name_to_scheme(scheme.preset)).items() if v is not None}
