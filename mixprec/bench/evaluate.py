"""lm-eval's HFLM at its best batch size against the shared-prefix engine: seconds, memory, answers."""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from itertools import chain, islice

from mixprec.bench.common import CACHE, in_a_process, ratio
from mixprec.cell import FIVE_TASKS, Config
from mixprec.sweep import configuration


def evaluate(limit: int, repeats: int, dtype: str) -> dict:
    """BF16 and a quantized cell: HFLM at its best batch size, and the shared-prefix engine.

    Both sides compute in `dtype`: which one is faster depends on the machine, and what it does to
    an answer is not the engine's doing.
    """
    tasks = ",".join(FIVE_TASKS)
    tried = {}
    for batch in (1, 4, 16):
        settings = {"engine": "hf", "model": "bf16", "dtype": dtype, "batch": batch}
        tried[batch] = _in_a_process(**settings, limit=4, tasks=tasks)["seconds"]["cell"]
        print(f"  HFLM, batch {batch}: {tried[batch]:.1f} s", flush=True)
    batch = min(tried, key=tried.get)
    sides = {
        "bf16, HFLM": {"engine": "hf", "model": "bf16", "dtype": dtype, "batch": batch},
        "bf16, ours": {"engine": "shared_prefix", "model": "bf16", "dtype": dtype},
        "quantized, HFLM": {"engine": "hf", "model": "auto_round", "dtype": dtype, "batch": batch},
        "quantized, ours": {"engine": "shared_prefix", "model": "low", "dtype": dtype},
    }
    runs: dict[str, list] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, settings in sides.items():
            runs[side].append(_in_a_process(**settings, limit=limit, tasks=tasks))
            print(f"  {side}: {runs[side][-1]['seconds']['cell']:.1f} s", flush=True)
    useful = [r["profile"]["utilisation"] for r in runs["bf16, ours"]]
    hellaswag = {
        side: [r["seconds"]["hellaswag"] for r in of_side] for side, of_side in runs.items()
    }
    totals = {side: [r["seconds"]["cell"] for r in of_side] for side, of_side in runs.items()}
    rounding = {side: [r["quantizing"] for r in of_side] for side, of_side in runs.items()}
    memory = {side: [r["peak_memory_bytes"] for r in of_side] for side, of_side in runs.items()}
    return {
        "limit": limit,
        "dtype": dtype,
        "peer_batch_size": batch,
        "peer_seconds_by_batch_size": tried,
        "ratios": {
            "BF16 cell, HFLM / ours": ratio(totals["bf16, HFLM"], totals["bf16, ours"]),
            "quantized cell, auto-round's model under HFLM / ours": ratio(
                totals["quantized, HFLM"], totals["quantized, ours"]
            ),
            "quantized cell / BF16 cell, ours": ratio(
                totals["quantized, ours"], totals["bf16, ours"]
            ),
            "hellaswag, HFLM / ours": ratio(hellaswag["bf16, HFLM"], hellaswag["bf16, ours"]),
            "quantizing, auto-round / ours": ratio(
                rounding["quantized, HFLM"], rounding["quantized, ours"]
            ),
            "peak memory, ours / HFLM": ratio(memory["bf16, ours"], memory["bf16, HFLM"]),
            "utilisation": {
                "median": statistics.median(useful),
                "spread": [min(useful), max(useful)],
            },
        },
        "equality": compare(runs["bf16, ours"][0]["answers"], runs["bf16, HFLM"][0]["answers"]),
        "seconds": {side: [r["seconds"] for r in of_side] for side, of_side in runs.items()},
        "quantizing_seconds": rounding,
        "peak_memory_bytes": memory,
        "tokens": runs["bf16, ours"][0]["tokens"],
    }


def compare(ours: dict[str, list], theirs: dict[str, list]) -> dict:
    """Largest relative difference of a log-likelihood, and greedy answers that differ, with margins."""
    largest, differ, count = 0.0, [], 0
    for task in theirs:
        for (mine, my_greedy), (other, other_greedy) in zip(ours[task], theirs[task], strict=True):
            count += 1
            largest = max(largest, abs(mine - other) / max(abs(other), 1e-9))
            if my_greedy != other_greedy:
                differ.append({"task": task, "ours": mine, "hflm": other})
    return {"requests": count, "largest_relative_difference": largest, "greedy_differs": differ}


# --- one measurement, in its own process ------------------------------------------------------


def _in_a_process(**what) -> dict:
    return in_a_process("measure", *(x for item in what.items() for x in (f"--{item[0]}", item[1])))


def measure(what: argparse.Namespace) -> dict:
    """Seconds of a cell and of hellaswag alone, peak memory, log-likelihoods: one engine, one model."""
    from lm_eval.models.huggingface import HFLM

    from mixprec import models, provenance
    from mixprec.evaluate.shared_prefix import SharedPrefixLM
    from mixprec.profile import profile

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    cfg = configuration(f"model.limit={what.limit}", f"eval.tasks=[{','.join(what.tasks)}]")
    checkpoint = models.checkpoint(cfg.model, CACHE)
    tokenizer = models.load_tokenizer(checkpoint, cfg.model)
    model, quantizing = _model(
        what.model, what.engine, what.dtype, checkpoint, cfg.model, tokenizer
    )
    requests = _requests(cfg)
    common = {"pretrained": model, "tokenizer": tokenizer, "add_bos_token": False}
    if what.engine == "hf":
        lm = HFLM(**common, batch_size=what.batch, softmax_dtype="float32")
    else:
        lm = SharedPrefixLM(**common)
    provenance.reset_peak_memory()
    seconds = {}
    start = time.perf_counter()
    # All at once, as lm_eval.evaluate asks.
    answered = iter(lm.loglikelihood([*chain(*requests.values())], disable_tqdm=True))
    seconds["cell"] = time.perf_counter() - start
    answers = {task: list(islice(answered, len(asked))) for task, asked in requests.items()}
    tokens = {k: getattr(lm, f"tokens_{k}", 0) for k in ("asked", "run", "padded", "rows")}
    peak = provenance.peak_memory()["cpu"]
    if "hellaswag" in requests:
        start = time.perf_counter()
        lm.loglikelihood(requests["hellaswag"], disable_tqdm=True)
        seconds["hellaswag"] = time.perf_counter() - start
    layers = models.quantized_layers(model)
    return {
        "seconds": seconds,
        "quantizing": quantizing,
        "peak_memory_bytes": peak,
        "tokens": tokens,
        "profile": profile(model, layers, tokens, seconds["cell"]) if tokens["run"] else None,
        "answers": answers,
    }


def _model(name: str, engine: str, dtype: str, checkpoint, settings, tokenizer):
    """(a reference or quantized SmolLM2 as its engine is used, seconds that quantizing took)."""
    from mixprec import models, quantize

    if name == "auto_round":
        from auto_round import AutoRound, RTNConfig

        model = models.load_for_auto_round(checkpoint, settings)
        start = time.perf_counter()
        compressor = AutoRound(
            model, tokenizer, scheme="MXFP4", alg_configs=RTNConfig(disable_opt_rtn=True),
            iters=0, device_map="cpu",
        )  # fmt: skip
        model = compressor.quantize()[0]
        model = model.float() if dtype == "float32" else model.bfloat16()
        return model.eval(), time.perf_counter() - start
    model = models.load(checkpoint, settings)
    if dtype == "bfloat16":
        model.bfloat16()
    if engine == "hf":
        return model, 0.0
    layers = models.quantized_layers(model)
    in_memory = quantize.InMemory(model)
    start = time.perf_counter()
    if name == "low":
        in_memory.apply({layer.name: "mxfp4" for layer in layers})
    return model, time.perf_counter() - start


def _requests(cfg: Config) -> dict[str, list]:
    from mixprec.evaluate.tasks import tasks_of

    tasks = tasks_of(cfg.eval, CACHE)
    loaded = tasks.loaded["tasks"]
    requests: dict[str, list] = {}
    for name, leaves in tasks.leaves.items():
        requests[name] = []
        for leaf in leaves:
            loaded[leaf].build_all_requests(samples=tasks.samples.get(leaf), rank=0, world_size=1)
            requests[name] += loaded[leaf].instances
    return requests
