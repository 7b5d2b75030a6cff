"""An allocation becomes a quantized model: MX formats in memory, weight-only ones through a real export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from mixprec.models import release
from mixprec.rounding import round_mx
from mixprec.schemes import BF16, Scheme, scheme_named

# The kernel for exported models by device type (auto-round's name for it); None: auto-round chooses.
# On a CPU its plain torch kernel is 30 times slower than `ark` from auto-round-lib.
BACKENDS = {"cpu": "ark", "cuda": None}


class InMemory:
    """A model whose linears are rounded in place, to one MX allocation after another.

    The reference weights of layers that were rounded are kept beside the model, in bfloat16 on the
    CPU, so that the next allocation rounds only the layers whose scheme changes.

    The numbers are those of `AutoRound(..., iters=0, disable_opt_rtn=True).quantize()` for the same
    allocation (tests/test_quantize.py), without its passes over calibration data.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self._modules = dict(model.named_modules())
        self._reference: dict[str, torch.Tensor] = {}
        self._scheme: dict[str, str] = {}
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._input: torch.Tensor | None = None  # the last one that was rounded
        self._version = 0
        self._by_bits: dict[int, torch.Tensor] = {}

    def apply(self, allocation: dict[str, str]) -> None:
        """Round weights now and inputs at every call; layers in bf16 get their reference back."""
        for name, scheme_name in allocation.items():
            if scheme_name != self._scheme.get(name, BF16.name):
                self._set(name, scheme_named(scheme_name))

    def _set(self, name: str, scheme: Scheme) -> None:
        module = self._modules[name]
        if name not in self._reference:
            self._reference[name] = module.weight.data.to("cpu", torch.bfloat16, copy=True)
        if name in self._hooks:
            self._hooks.pop(name).remove()
        # The checkpoint's weights are bfloat16; an MX value of a bfloat16 group is one again.
        weight = self._reference[name].to(module.weight.device)
        module.weight.data.copy_(weight if scheme is BF16 else round_mx(weight, scheme.bits))
        if scheme.activations:
            self._hooks[name] = module.register_forward_pre_hook(
                lambda _, inputs: (self._rounded(inputs[0], scheme.bits), *inputs[1:])
            )
        self._scheme[name] = scheme.name

    def _rounded(self, tensor: torch.Tensor, bits: int) -> torch.Tensor:
        """Rounded input of a linear; q, k and v, or gate and up, have the same and share it."""
        if tensor is not self._input or tensor._version != self._version:
            self._input, self._version, self._by_bits = tensor, tensor._version, {}
        if bits not in self._by_bits:
            self._by_bits[bits] = round_mx(tensor, bits)
        return self._by_bits[bits]


def export(
    model: torch.nn.Module,
    tokenizer,
    allocation: dict[str, str],
    folder: Path,
    *,
    low_memory: bool = False,
) -> Path:
    """Write `model` to disk with real integer weights in auto-round's own format, safetensors.

    model: the reference, in bfloat16; it is consumed. low_memory: one block at a time on the GPU.
    Returns the folder with the checkpoint.
    """
    from auto_round import AutoRound, RTNConfig

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
        alg_configs=RTNConfig(disable_opt_rtn=True),  # to nearest: no search for scales
        iters=0,
        low_gpu_mem_usage=low_memory,
        enable_torch_compile=False,
    )
    compressor.quantize_and_save(str(folder), format="auto_round")
    release(model)
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
