"""An allocation becomes a quantized model: MX formats in memory, weight-only ones through a real export."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mixprec.linear import PackedLinear, can_pack, keep_memory
from mixprec.models import release_from_auto_round
from mixprec.rounding import round_mx
from mixprec.schemes import BF16, Scheme, scheme_named

# The kernel for exported models by device type (auto-round's name for it); None: auto-round chooses.
# On a CPU its plain torch kernel is 30 times slower than `ark` from auto-round-lib.
BACKENDS = {"cpu": "ark", "cuda": None}


class InMemory:
    """A model whose linears are rounded in place, to one MX allocation after another.

    The reference weights of layers that were rounded are kept, in bfloat16 on the CPU (a packed
    linear keeps its own), so that the next allocation rounds only the layers whose scheme changes.

    The numbers are those of `AutoRound(..., iters=0, disable_opt_rtn=True).quantize()` for the same
    allocation (tests/test_quantize.py), without its passes over calibration data.
    """

    def __init__(self, model: torch.nn.Module, *, packed: bool = True):
        """packed: let oneDNN multiply the linears, the output head too, where it can."""
        self.model = model
        if packed:
            keep_memory()
            embeddings = model.get_input_embeddings().weight
            for name in [name for name, _ in model.named_modules()]:  # one at a time in memory
                if can_pack(module := model.get_submodule(name)):
                    tied = module.weight is embeddings
                    model.set_submodule(name, PackedLinear(module, tied=tied))
        self._modules = dict(model.named_modules())
        self._reference: dict[str, torch.Tensor] = {}
        self._scheme: dict[str, str] = {}
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._input: torch.Tensor | None = None  # the last one that was rounded
        self._version = 0
        self._by_bits: dict[int, torch.Tensor] = {}

    def apply(
        self, allocation: dict[str, str], tuned: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Round weights now and inputs at every call; layers in bf16 get their reference back.

        tuned: weights that take the place of those rounded to nearest, as of `tuned_weights`.
        """
        for name, scheme_name in allocation.items():
            if tuned is not None:
                self._set(name, scheme_named(scheme_name), tuned[name])
            elif scheme_name != self._scheme.get(name, BF16.name):
                self._set(name, scheme_named(scheme_name))

    def _set(self, name: str, scheme: Scheme, tuned: torch.Tensor | None = None) -> None:
        module = self._modules[name]
        if name in self._hooks:
            self._hooks.pop(name).remove()
        packed = isinstance(module, PackedLinear)
        if packed:
            reference = module.weight
        else:
            if name not in self._reference:
                self._reference[name] = module.weight.data.to("cpu", torch.bfloat16, copy=True)
            reference = self._reference[name]
        # The checkpoint's weights are bfloat16; an MX value of a bfloat16 group is one again.
        if tuned is not None:
            weight = tuned
        elif scheme is BF16:
            weight = reference
        else:
            device = reference.device if packed else module.weight.device
            weight = round_mx(reference.to(device), scheme.bits)
        if packed:
            module.pack(None if tuned is None and scheme is BF16 else weight)
        else:
            module.weight.data.copy_(weight)
        if scheme.activations:
            self._hooks[name] = module.register_forward_pre_hook(
                lambda _, inputs: (self._rounded(inputs[0], scheme.bits), *inputs[1:])
            )
        # A tuned layer is in no scheme that is asked for, so the next allocation sets it again.
        self._scheme[name] = scheme.name if tuned is None else f"tuned {scheme.name}"

    def _rounded(self, tensor: torch.Tensor, bits: int) -> torch.Tensor:
        """Rounded input of a linear; q, k and v, or gate and up, have the same and share it."""
        if tensor is not self._input or tensor._version != self._version:
            self._input, self._version, self._by_bits = tensor, tensor._version, {}
        if bits not in self._by_bits:
            self._by_bits[bits] = round_mx(tensor, bits)
        return self._by_bits[bits]


@dataclass(frozen=True)
class Tuned:
    """AutoRound's tuning instead of rounding to nearest: what it takes.

    iters: steps a block; batch_size: samples a step; texts: samples of at least `tokens` tokens.
    """

    iters: int
    batch_size: int
    tokens: int
    texts: list[str]


def tuned_weights(
    model: torch.nn.Module,
    tokenizer,
    allocation: dict[str, str],
    tuning: Tuned,
    *,
    low_memory: bool = False,
) -> dict[str, torch.Tensor]:
    """AutoRound's tuned weights of every MX layer, already on their grid, bfloat16 on the CPU.

    model: the reference, in bfloat16; it is consumed. low_memory: one block at a time on the GPU.
    AutoRound tunes the weights' rounding and scales alone: activations are rounded as without tuning, so these weights are the whole of it.
    """
    with _auto_round(model, tokenizer, allocation, tuning, low_memory) as compressor:
        quantized, _ = compressor.quantize()
    modules = {name: quantized.get_submodule(name) for name in allocation}
    return {  # a layer in bf16 is not wrapped
        name: getattr(module, "orig_layer", module).weight.data.to("cpu", torch.bfloat16)
        for name, module in modules.items()
    }


def export(
    model: torch.nn.Module,
    tokenizer,
    allocation: dict[str, str],
    folder: Path,
    tuning: Tuned | None = None,
    *,
    low_memory: bool = False,
) -> Path:
    """Write `model` to disk with real integer weights in auto-round's own format, safetensors.

    model: the reference, in bfloat16; it is consumed. low_memory: one block at a time on the GPU.
    Returns the folder with the checkpoint.
    """
    with _auto_round(model, tokenizer, allocation, tuning, low_memory) as compressor:
        compressor.quantize_and_save(str(folder), format="auto_round")
    return next(path.parent for path in sorted(folder.rglob("config.json")))


@contextmanager
def _auto_round(
    model: torch.nn.Module,
    tokenizer,
    allocation: dict[str, str],
    tuning: Tuned | None,
    low_memory: bool,
) -> Iterator:
    """AutoRound set up to quantize `model` as allocated; to nearest without `tuning`."""
    from auto_round import AutoRound, RTNConfig, SignRoundConfig

    lowest = min({scheme_named(name) for name in allocation.values()}, key=lambda s: s.bits)
    others = {
        layer: _layer_settings(scheme_named(name))
        for layer, name in allocation.items()
        if name != lowest.name
    }
    settings = {
        "scheme": lowest.preset,
        "layer_config": others,
        "low_gpu_mem_usage": low_memory,
        "enable_torch_compile": False,
    }
    # To nearest: no search for scales either.
    how = {"alg_configs": RTNConfig(disable_opt_rtn=True), "iters": 0}
    with tempfile.TemporaryDirectory() as place:
        if tuning is not None:
            file = Path(place) / "texts.json"  # auto-round reads text from the hub or from a file
            rows = [{"text": text} for text in tuning.texts]
            file.write_text(json.dumps(rows), encoding="utf-8")
            how = {
                "alg_configs": SignRoundConfig(iters=tuning.iters),
                "nsamples": len(tuning.texts),
                "seqlen": tuning.tokens,
                "batch_size": tuning.batch_size,
                "dataset": str(file),
                "device_map": "cuda" if torch.cuda.is_available() else "cpu",
            }
        yield AutoRound(model, tokenizer, **how, **settings)
    release_from_auto_round()


def reload(folder: Path, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The exported model, loaded from disk with the kernels of BACKENDS."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoRoundConfig

    backend = BACKENDS.get(device.type)
    kernels = {"quantization_config": AutoRoundConfig(backend=backend)} if backend else {}
    with _merging_kept(AutoConfig.from_pretrained(folder).model_type):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, device_map=str(device), **kernels
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _merging_kept(architecture: str) -> Iterator[None]:
    """Undo what auto-round does to transformers when it reads a model: experts are no longer merged.

    It stays so for the whole process, and the next reference would have random experts.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    mapping = get_checkpoint_conversion_mapping(architecture)
    try:
        yield
    finally:
        if mapping is not None:
            register_checkpoint_conversion_mapping(architecture, mapping, overwrite=True)


def came_back(model: torch.nn.Module, allocation: dict[str, str]) -> str:
    """The kernels that a reloaded model's layers really have, such as `ark`, by their own name.

    Raises RuntimeError in one line if a layer has other bits or another group size than allocated.
    """
    kernels = set()
    for name, scheme_name in allocation.items():
        module, scheme = model.get_submodule(name), scheme_named(scheme_name)
        if scheme is BF16 and type(module) is torch.nn.Linear:
            continue
        found = getattr(module, "bits", None), getattr(module, "group_size", None)
        if found != (scheme.bits, scheme.group_size):
            raise RuntimeError(
                f"{name} was reloaded as {type(module).__name__} of {found[0]} bits in groups of "
                f"{found[1]}; allocated: {scheme.bits} bits in groups of {scheme.group_size}"
            )
        # auto-round's classes name their kernel and its packing: `ark_gptq_nozp`, `torch`, …
        kernels.add(getattr(module, "QUANT_TYPE", type(module).__module__).split("_")[0])
    return ", ".join(sorted(kernels))


def _layer_settings(scheme: Scheme) -> dict:
    from auto_round.schemes import preset_name_to_scheme

    return {k: v for k, v in asdict(preset_name_to_scheme(scheme.preset)).items() if v is not None}
