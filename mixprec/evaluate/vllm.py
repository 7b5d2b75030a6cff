"""lm-eval's vLLM backend over a folder: an exported weight-only model, or a bf16 checkpoint.

What vLLM can load of what is exported is a table in docs/weight_only.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from mixprec.cell import Model

# vLLM's Llama, Qwen2 and Qwen3 run these linears as one, in one scheme (`packed_modules_mapping`).
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MOST_TOKENS = 4096  # of a sequence: zero-shot requests are shorter, and the KV cache stays small


def refusal(allocation: dict[str, str]) -> str | None:
    """Why vLLM cannot load a model with this allocation, in one line; or None."""
    for name, scheme in allocation.items():
        stem, _, own = name.rpartition(".")
        for group in FUSED:
            for other in group if own in group else ():
                if (second := allocation.get(f"{stem}.{other}", scheme)) != scheme:
                    return (
                        f"vLLM runs {', '.join(group)} as one layer, and {stem} has {own} in "
                        f"{scheme} but {other} in {second}; eval.engine=shared_prefix runs it"
                    )
    return None


def arguments(folder: Path, model: Model, dtype: str) -> dict:
    """What lm_eval.models.vllm_causallms.VLLM is called with. dtype: of activations and products."""
    limit = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    return {
        "pretrained": str(folder),
        "dtype": dtype,
        "trust_remote_code": model.trust_remote_code,
        "add_bos_token": model.bos,
        "max_model_len": min(limit or MOST_TOKENS, MOST_TOKENS),
        "batch_size": "auto",  # vLLM schedules all requests by itself
    }


def language_model(folder: Path, model: Model, dtype: str):
    """vLLM with the model in `folder`, as lm-eval drives it; it takes the whole GPU."""
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(**arguments(folder, model, dtype))
