"""Memory of scoring a checkpoint of billions of weights, one block at a time."""

from __future__ import annotations

import gc
import math
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mixprec.store import write_json


def blocks(layers: int) -> dict:
    """Memory that scoring a checkpoint block by block takes, at half the depth and the whole."""
    alone = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(
        1, **alone
    ) as pool:  # each in a process of its own, with its own memory
        half, whole = pool.map(_blocks, [layers // 2, layers])
    ratios = {
        f"{what} memory, {layers} blocks / bound": whole["peak"][what] / whole["bytes"]["bound"]
        for what in ("anonymous", "resident")
    }
    ratios[f"anonymous memory, {layers} / {layers // 2} blocks"] = (
        whole["peak"]["anonymous"] / half["peak"]["anonymous"]
    )
    return {
        "points": [half, whole],  # one run each
        "ratios": {key: {"median": x, "spread": [x, x]} for key, x in ratios.items()},
    }


def _blocks(layers: int) -> dict:
    """Peak bytes above the imported libraries', scoring a random Llama of so many blocks."""
    import torch
    from transformers import LlamaConfig

    from mixprec.allocate import fisher
    from mixprec.allocate.blocks import Blocks
    from mixprec.schemes import SCHEMES, Layer

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2560, intermediate_size=6912, num_attention_heads=20,
        num_key_value_heads=20, num_hidden_layers=layers, tie_word_embeddings=False,
    )  # fmt: skip
    tokens = torch.randint(5, config.vocab_size, (2, 64), generator=torch.manual_seed(0))
    schemes = [SCHEMES["mxfp4"], SCHEMES["mxfp8"]]
    memory = _Memory()
    with tempfile.TemporaryDirectory() as place:
        shapes = _write_random(config, Path(place))
        linears = [
            Layer(name.removesuffix(".weight"), *shape)
            for name, shape in shapes.items()
            if "_proj" in name
        ]
        start = time.perf_counter()
        with memory:
            checkpoint = Blocks(Path(place), torch.float32, torch.device("cpu"))
            scores = fisher.score(checkpoint, tokens, linears, schemes)
        seconds = time.perf_counter() - start
    if not (scores > 0).all():
        raise RuntimeError("a score is not positive")
    weights = sum(math.prod(shape) for shape in shapes.values())
    block = 2 * sum(layer.weights for layer in linears) // layers
    embedding = 2 * config.vocab_size * config.hidden_size
    boundaries = 4 * (layers + 1) * tokens.numel() * config.hidden_size
    return {
        "blocks": layers,
        "weights": weights,
        "tokens": list(tokens.shape),
        "options": [scheme.name for scheme in schemes],
        "seconds": seconds,
        "before": memory.before,
        "peak": {"anonymous": memory.anonymous, "resident": memory.resident},
        "bytes": {
            "checkpoint": 2 * weights,
            "block": block,
            "embedding": embedding,
            "boundaries": boundaries,
            # Two blocks and the embedding in bfloat16, boundaries in float32, 1 GB for the rest.
            "bound": 2 * block + embedding + boundaries + 10**9,
        },
    }


def _write_random(config, folder: Path) -> dict[str, tuple[int, ...]]:
    """A checkpoint of random bfloat16 weights, a file a block; returns the weights' shapes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    shapes = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{block}.safetensors", []).append(name)
    random = torch.manual_seed(0)
    for file, names in files.items():
        weights = {}
        for name in names:
            weight = torch.empty(shapes[name], dtype=torch.bfloat16)
            few = len(shapes[name]) == 1  # a norm
            weights[name] = weight.fill_(1) if few else weight.normal_(0, 0.02, generator=random)
        save_file(weights, folder / file, {"format": "pt"})
    index = {name: file for file, names in files.items() for name in names}
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    return shapes


class _Memory:
    """Peak memory in bytes above what there was when this was made, sampled every 5 ms by a thread.

    anonymous: what the process allocated; resident: with the pages of mapped files.
    """

    def __init__(self):
        gc.collect()
        self.before = dict(zip(("anonymous", "resident"), self._now(), strict=True))
        self.anonymous = self.resident = 0

    def __enter__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            anonymous, resident = self._now()
            self.anonymous = max(self.anonymous, anonymous - self.before["anonymous"])
            self.resident = max(self.resident, resident - self.before["resident"])

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = {
            key: value.split()[0]
            for key, _, value in (x.partition(":") for x in lines)
            if value.split()
        }
        return 1024 * int(kilobytes["RssAnon"]), 1024 * int(kilobytes["VmRSS"])
