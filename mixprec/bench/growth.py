"""Whether the evaluation's time grows linearly with what it is given."""

from __future__ import annotations

import time

from mixprec.bench.common import CACHE, OUTPUT
from mixprec.sweep import configuration


def growth() -> dict:
    """Seconds against documents, choices, length and layers, each varied alone, on random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mixprec.evaluate.shared_prefix import SharedPrefixLM
    from mixprec.models import checkpoint, load_tokenizer
    from mixprec.quantize import InMemory

    cfg = configuration()
    tokenizer = load_tokenizer(checkpoint(cfg.model, CACHE), cfg.model)

    def seconds(documents: int = 40, choices: int = 4, length: int = 100, layers: int = 6) -> dict:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1024, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                num_key_value_heads=3, num_hidden_layers=layers, max_position_embeddings=8192,
            )
        ).eval().bfloat16().float()  # fmt: skip
        InMemory(model)
        lm = SharedPrefixLM(pretrained=model, tokenizer=tokenizer)
        requests = []
        for d in range(documents):
            context = torch.randint(5, 1024, (length,)).tolist()
            for c in range(choices):
                choice = torch.randint(5, 1024, (10,)).tolist()
                requests.append(((f"{d}", f"{c}"), context, choice))
        best = float("inf")
        for _ in range(2):
            lm.tokens_run = 0
            start = time.perf_counter()
            lm._loglikelihood_tokens(requests, disable_tqdm=True)
            best = min(best, time.perf_counter() - start)
        return {"seconds": best, "tokens_run": lm.tokens_run, "work": lm.tokens_run * layers}

    varied = {
        "documents": [10, 20, 40, 80],
        "choices": [2, 4, 8, 16],
        "length": [50, 100, 200, 400, 800],
        "layers": [3, 6, 12, 24],
    }
    points = {
        what: [{what: value, **seconds(**{what: value})} for value in values]
        for what, values in varied.items()
    }
    fits = {}
    for what, of_what in points.items():
        per_work = [point["seconds"] / point["work"] for point in of_what]
        fits[f"{what}: seconds per token and layer, largest / smallest"] = {
            "median": max(per_work) / min(per_work),
            "spread": [1.0, max(per_work) / min(per_work)],
        }
    _draw(points)
    return {"points": points, "ratios": fits}


def _draw(points: dict[str, list[dict]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(points), figsize=(12, 3), layout="constrained")
    for axis, (what, of_what) in zip(axes, points.items(), strict=True):
        work = [point["work"] / 1000 for point in of_what]
        axis.plot(work, [point["seconds"] for point in of_what], "o-")
        for point, x in zip(of_what, work, strict=True):
            axis.annotate(
                f"{point[what]}", (x, point["seconds"]), xytext=(4, -10), textcoords="offset points"
            )
        axis.set(title=f"more {what}", xlabel="1000 tokens run × layers", ylim=0, xlim=0)
    axes[0].set_ylabel("seconds")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT / "growth.svg")
