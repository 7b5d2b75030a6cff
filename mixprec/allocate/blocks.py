"""A checkpoint of which one decoder block at a time is in memory, read from its safetensors.

The modules, rotary embeddings and masks are transformers' own: a skeleton of the model is built on the
meta device, and a copy of one of its blocks gets the weights that the files hold under its names.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open

from mixprec import experts
from mixprec.cell import ConfigError, check_by_block
from mixprec.linear import PackedLinear, packs


class Blocks:
    """What signals see instead of the reference model where that must not be in memory.

    Weights are rounded to bfloat16 first, as in `models.load`. Raises ConfigError for an architecture
    that is not in `cell.BY_BLOCK`, and, once it is read, for a weight that the files do not have.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        """dtype, device: of the arithmetic, `models.arithmetic`."""
        from transformers import AutoConfig, AutoModelForCausalLM

        self.dtype, self.device = dtype, device
        config = AutoConfig.from_pretrained(folder)
        check_by_block(config.model_type)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self._skeleton = experts.separate(model).eval().requires_grad_(False)
        self._base = self._skeleton.base_model
        # Nothing of this is in the files: it is computed from the configuration.
        self._base.rotary_emb = type(self._base.rotary_emb)(config).to(device)
        self._files = _files(folder)
        self._embeddings = self._name_of(self._skeleton.get_input_embeddings())
        self._head = self._name_of(self._skeleton.get_output_embeddings())
        self._arguments: dict[tuple[int, ...], list[dict]] = {}  # of inputs of one shape, by block

    def __len__(self) -> int:
        return len(self._base.layers)

    def name(self, place: int) -> str:
        """The name of block `place` in the model, such as `model.layers.3`."""
        return self._name_of(self._base.layers[place])

    def block(self, place: int) -> torch.nn.Module:
        """Block `place` with its weights; they are freed with the last reference to it."""
        return self._filled(self._base.layers[place])

    def norm(self) -> torch.nn.Module:
        """What is between the last block and the output head."""
        return self._filled(self._base.norm)

    def head(self) -> torch.nn.Module:
        """The output head, [hidden size] -> [words], not packed: its weight is there once."""
        head = copy.deepcopy(self._skeleton.get_output_embeddings())
        tied = self._skeleton.config.tie_word_embeddings
        weight = self._read(f"{self._embeddings if tied else self._head}.weight")
        head.weight = torch.nn.Parameter(weight.to(self.device, self.dtype), requires_grad=False)
        return head

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first block's inputs [sequences, tokens, hidden size], on the CPU."""
        weight = self._read(f"{self._embeddings}.weight")
        return torch.nn.functional.embedding(tokens, weight).to(self.dtype)

    def weight(self, name: str) -> torch.Tensor:
        """The weight of the linear `name`, [out_features, in_features], bfloat16."""
        return self._read(f"{name}.weight").to(self.device)

    def run(self, place: int, block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What block `place` makes of its inputs [sequences, tokens, hidden size]; the same shape."""
        shape = hidden.shape
        if shape not in self._arguments:
            self._arguments[shape] = self._arguments_for(hidden.detach())
        return block(hidden, **self._arguments[shape][place])

    def _arguments_for(self, hidden: torch.Tensor) -> list[dict]:
        """What the model gives each block beside its input: positions, masks. Of hidden, the shape counts."""
        given: list[dict] = []

        def note(hidden, **arguments):
            given.append(arguments)
            return hidden

        blocks, norm = list(self._base.layers), self._base.norm
        for block in blocks:
            block.forward = note
        norm.forward = lambda hidden: hidden
        with torch.no_grad():
            self._base(inputs_embeds=hidden, use_cache=False)
        for module in (*blocks, norm):
            del module.forward
        return given

    def _name_of(self, module: torch.nn.Module) -> str:
        return next(name for name, each in self._skeleton.named_modules() if each is module)

    def _filled(self, module: torch.nn.Module) -> torch.nn.Module:
        """A copy of a module of the skeleton, with weights; linears packed where that is faster."""
        prefix, filled = self._name_of(module), copy.deepcopy(module)
        packed = packs(self.device, self.dtype)
        linears = {n for n, each in filled.named_modules() if type(each) is torch.nn.Linear}
        for name, _ in list(filled.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            values = self._read(f"{prefix}.{name}")
            # A packed linear keeps its weight in bfloat16: on the CPU that is the file itself.
            keep = packed and owner in linears and attribute == "weight"
            values = values if keep else values.to(self.device, self.dtype)
            setattr(
                filled.get_submodule(owner),
                attribute,
                torch.nn.Parameter(values, requires_grad=False),
            )
        for name in linears if packed else ():
            filled.set_submodule(name, PackedLinear(filled.get_submodule(name)))
        return filled

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise ConfigError(f"{name}: no such weight in the model's safetensors")
        # Opened for one weight: the file's pages are unmapped with the weight, and not at the end.
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name).bfloat16()


def _files(folder: Path) -> dict[str, Path]:
    """weight -> the file that holds it; the files that transformers would take."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not whole.is_file() and index.is_file():
        of = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in of.items()}
    found = {}
    for file in [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found
