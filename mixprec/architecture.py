"""A model's architecture from its configuration alone: no weights, no network.

Its own config.json counts, where the checkpoint is a folder or lies in the hub's cache. Otherwise
`architectures/<owner>--<name>.json` does: what decides shapes and sizes, from the config.json that the
model's authors published. tests/test_plan.py holds the parameter counts equal to the published ones.
"""

from __future__ import annotations

import json
from pathlib import Path

_SHIPPED = Path(__file__).parent / "architectures"


def config_of(path: str, revision: str | None = None) -> dict | None:
    """config.json of the model at `path` (`packaged`, a hub id or a folder); None if unknown."""
    file = _own(path, revision)
    if file is None or not file.is_file():
        file = _SHIPPED / f"{path.replace('/', '--')}.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def in_features(config: dict | None) -> list[int]:
    """Input dimensions of the linears; [] where the configuration does not say."""
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        inner = {config["intermediate_size"], config.get("moe_intermediate_size")} - {None}
        return sorted({hidden, heads * head, *inner})
    except (KeyError, TypeError):
        return []  # an architecture with other names: its layers are checked once they are known


def _own(path: str, revision: str | None) -> Path | None:
    if path == "packaged":
        return None
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(cached) if isinstance(cached, str) else None
