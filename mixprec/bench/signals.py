"""Rules of allocation side by side: KL on other text, seconds and memory of scoring.

One model, one calibration text, one judge; what differs is the rule. Each measurement is a process of
its own with an empty cache but for the checkpoint and the documents.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from mixprec.bench.common import CACHE, OUTPUT, in_a_process, ratio

BUDGETS = (4.5, 5.0, 6.0)
# (name, what `run.py` would be asked); measured_kl in full would take half an hour.
SIDES = {
    "ours": ["baseline=ours"],
    "fisher": ["baseline=fisher"],
    "fisher, 8 samples": ["baseline=fisher", "calibration.samples=8"],
    "fisher, 4 samples": ["baseline=fisher", "calibration.samples=4"],
    "modelopt": ["baseline=modelopt"],
    "output_error": ["baseline=output_error"],
    "weight_error": ["baseline=weight_error"],
    "measured_kl, 2 samples": ["baseline=measured_kl", "calibration.samples=2"],
    "head8": ["baseline=head8"],
    "tail8": ["baseline=tail8"],
    "random": ["baseline=random"],
}
FOUR = "options=mxfp4_mxfp6_mxfp8_bf16"
TIMED = (
    "ours",
    "fisher",
    "fisher, 8 samples",
    "fisher, 4 samples",
)  # several times; the others once


def _in_a_process(ask: list[str], budgets) -> dict:
    return in_a_process("signal", "--ask", *ask, "--budgets", *budgets)


def measure(what: argparse.Namespace, cache: Path = CACHE) -> dict:
    """Seconds and peak bytes of one rule's scoring, and KL at what.budgets, by sequence.

    What `fisher` and `measured_kl` take to correct their prediction, which no allocation under a
    budget needs and no other rule has, is apart, in correction_seconds.
    """
    from mixprec import data, models, provenance, quantize
    from mixprec.allocate import Request, allocate, loads_a_copy
    from mixprec.cell import cell_of
    from mixprec.evaluate import kl
    from mixprec.sweep import configuration

    first = cell_of(configuration(*what.ask, f"budget={BUDGETS[0]}"))
    with tempfile.TemporaryDirectory() as place:
        for name in ("models", "documents", "datasets", "hashes.json"):
            (Path(place) / name).symlink_to((cache / name).resolve())
        checkpoint = models.checkpoint(first.model, Path(place))
        tokenizer = models.load_tokenizer(checkpoint, first.model)
        model = models.load(checkpoint, first.model)
        layers = models.quantized_layers(model)
        if alone := loads_a_copy(first.baseline):
            del model  # as with low_memory: the memory that is measured is the rule's own
        else:
            in_memory = quantize.InMemory(model)
        gc.collect()
        provenance.reset_peak_memory()

        def at(budget: float) -> dict[str, str]:
            request = Request(
                first.baseline, first.seed, first.model, first.calibration, Path(place),
                reference=None if alone else model,
            )  # fmt: skip
            return allocate(layers, first.schemes, budget, request)

        start = time.perf_counter()
        allocations = {BUDGETS[0]: at(BUDGETS[0])}
        seconds = time.perf_counter() - start
        peak = provenance.peak_memory()["cpu"]
        abouts = [json.loads(file.read_text()) for file in Path(place).glob("scores/*/about.json")]
        correction = sum(about["seconds"].get("lowest_kl", 0) for about in abouts)
        allocations |= {budget: at(budget) for budget in what.budgets[1:]}
        if alone and what.budgets:
            model = models.load(checkpoint, first.model)
            in_memory = quantize.InMemory(model)
        divergences = {}
        if what.budgets:
            tokens = data.heldout_tokens(first.eval, tokenizer, first.model.bos, Path(place))
            reference = kl.Reference.of(model, tokens, Path(place) / "reference.safetensors")
        for budget in what.budgets:
            in_memory.apply(allocations[budget])
            divergences[budget] = kl.divergence(model, tokens, reference)["per_sequence"]
    return {
        "seconds": seconds - correction, "correction_seconds": correction,
        "peak_memory_bytes": peak, "kl": divergences,
    }  # fmt: skip


def compare(repeats: int) -> dict:
    """Rules of allocation: KL, seconds and memory of scoring, each in a process of its own."""
    runs: dict[str, list[dict]] = {}
    for turn in range(repeats):
        for side, ask in SIDES.items():
            if turn == 0 or side in TIMED:
                runs.setdefault(side, []).append(_in_a_process(ask, BUDGETS if turn == 0 else ()))
                print(f"  {side}: {runs[side][-1]['seconds']:.1f} s", flush=True)
        for name in ("ours", "fisher", "fisher, 8 samples"):
            side = f"{name}, 4 options"
            runs.setdefault(side, []).append(_in_a_process([*SIDES[name], FOUR], ()))
            print(f"  {side}: {runs[side][-1]['seconds']:.1f} s", flush=True)
    seconds = {side: [run["seconds"] for run in of_side] for side, of_side in runs.items()}
    memory = {side: [run["peak_memory_bytes"] for run in of_side] for side, of_side in runs.items()}
    divergences = {side: of_side[0]["kl"] for side, of_side in runs.items() if of_side[0]["kl"]}
    ratios = {}
    for side in TIMED[1:]:
        ratios[f"scoring seconds, ours / {side}"] = ratio(seconds["ours"], seconds[side])
        ratios[f"peak memory, {side} / ours"] = ratio(memory[side], memory["ours"])
        if f"{side}, 4 options" in runs:
            ratios[f"scoring seconds, ours / {side}, 4 options"] = ratio(
                seconds["ours, 4 options"], seconds[f"{side}, 4 options"]
            )
    for side in (*TIMED[1:], "modelopt"):
        for budget, ours in divergences["ours"].items():
            ratios[f"KL at {budget} bits, {side} / ours"] = _of_means(
                divergences[side][budget], ours
            )
    found = {
        "repeats": repeats,
        "ratios": ratios,
        "kl": {
            side: {
                budget: {
                    "mean": statistics.mean(of), "stderr": _stderr(of),
                    "minus_ours": statistics.mean(of) - statistics.mean(divergences["ours"][budget]),
                    "minus_ours_stderr": _stderr(np.subtract(of, divergences["ours"][budget])),
                    "per_sequence": of,
                }
                for budget, of in by_budget.items()
            }
            for side, by_budget in divergences.items()
        },
        "seconds": seconds,
        "correction_seconds": {
            side: [run["correction_seconds"] for run in of_side] for side, of_side in runs.items()
        },
        "peak_memory_bytes": memory,
    }  # fmt: skip
    draw(found, OUTPUT / "signals.svg")
    return found


def draw(result: dict, file: Path) -> None:
    """KL against bits, a line a rule, and KL at 5 bits against seconds of scoring."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for place, (side, by_budget) in enumerate(result["kl"].items()):
        style = {
            "marker": "osD^v<>PX*h"[place],
            "color": pyplot.get_cmap("tab20")(2 * place % 20 + place // 10),
        }
        means, errors = ([v[key] for v in by_budget.values()] for key in ("mean", "stderr"))
        axes[0].errorbar(
            [float(b) for b in by_budget], means, errors, capsize=2, label=side, **style
        )
        seconds = max(0.1, statistics.median(result["seconds"][side]))  # 0 is on no log axis
        middle = by_budget["5.0"]
        axes[1].errorbar(seconds, middle["mean"], middle["stderr"], capsize=2, **style)
    axes[0].set(xlabel="bits per weight", ylabel="KL to BF16, nats per token", yscale="log")
    axes[1].set(xlabel="seconds of scoring (none: 0.1)", title="at 5 bits", xscale="log")
    ticks = [0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5]
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].minorticks_off()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)


def _of_means(ours: list[float], theirs: list[float]) -> dict:
    """Ratio of two means over the same sequences, ± one standard error (delta method, paired)."""
    a, b = np.array(ours), np.array(theirs)
    r = a.mean() / b.mean()
    error = _stderr(a - r * b) / b.mean()
    return {"median": r, "spread": [r - error, r + error]}


def _stderr(values) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
