"""Faults that take minutes to wait for: a hub that hangs later, and a real limit of memory.

python -m pytest tests/faults/test_services.py
"""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import _tiny_model
from test_model_faults import (
    assert_only_one_failed,
    cache,  # noqa: F401
    hub_of,
    sweep,
    sweep_from,
    tiny_overrides,
)


@pytest.mark.parametrize("answered", [2, 3, 4, 5])
def test_a_hub_that_hangs_later_costs_one_cell(tmp_path, cache, answered):  # noqa: F811
    """While it lists the files, says how large they are, or sends one."""
    hub = hub_of(_tiny_model("qwen3", tmp_path / "model"), "slow", "tiny")
    hub.answers["org/slow"] = answered
    done = sweep_from(hub, "org/slow,org/tiny", tmp_path, cache)
    hub.close()
    assert_only_one_failed(done, of=2, because="model.path=org/slow: the hub at 127.0.0.1:")
    assert "did not answer in 1 s" in done.failed[0] and done.seconds < 300


def with_many_words(folder, place, words: int):
    """A copy of the model with so many rows of zeros as embeddings: a file with a hole, made at once."""
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors")
    embeddings = weights.pop("model.embed_tokens.weight")
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    content = (place / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    end = len(data) + words * embeddings.shape[1] * 2
    header["model.embed_tokens.weight"] = {
        "dtype": "BF16", "shape": [words, embeddings.shape[1]], "data_offsets": [len(data), end]
    }  # fmt: skip
    text = json.dumps(header).encode()
    with (place / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
        file.truncate(8 + len(text) + end)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"vocab_size": words}))
    return place


def test_a_real_limit_of_memory_costs_one_cell(tmp_path, cache):  # noqa: F811
    """Under RLIMIT_AS, a model whose embeddings do not fit; after it, one that does."""
    tiny = _tiny_model("qwen3", tmp_path / "tiny")
    large = with_many_words(tiny, tmp_path / "large", 8_000_000)  # 1 GB, 2 GB in float32
    limit = 5 << 30  # bytes of addresses
    done = sweep(
        "model=custom", f"model.path='{large}','{tiny}'", *tiny_overrides(tiny)[2:], "baseline=low",
        results=tmp_path / "results", cache=cache,
        before=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert_only_one_failed(done, of=2, because="large-")
    assert "memory" in done.failed[0].lower()
