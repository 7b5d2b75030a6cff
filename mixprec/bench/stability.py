"""How far `fisher` moves with what it is calibrated on: five draws of the text, 1 to 64 sequences.

Every allocation is judged by KL on the text that nothing is calibrated on, and compared with the
other draws' of as many sequences: the share of weights that two draws put into the same option.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from mixprec.bench.common import CACHE, OUTPUT
from mixprec.store import write_json

SEEDS = (42, 43, 44, 45, 46)  # 42 is conf/calibration/default.yaml's
SEQUENCES = (1, 4, 16, 64)  # of 256 tokens
BUDGET = 5.0


def stability() -> dict:
    """`fisher` over draws and sizes of the calibration text; goes on where it was stopped."""
    kept = CACHE / "bench" / "stability.json"
    done = json.loads(kept.read_text()) if kept.is_file() else []
    lines, weights = measure(CACHE, done, lambda lines: write_json(kept, lines))
    found = summary(lines, weights)
    draw(lines, found, OUTPUT / "stability.svg")
    kept.unlink()
    return {"ratios": {}, "summary": found, "lines": lines}


def measure(cache: Path, done: list[dict], keep) -> tuple[list[dict], dict[str, int]]:
    """(a line for each seed and number of sequences, weights of each layer).

    keep(lines) is called after each, to go on from `done` another time.
    """
    from mixprec import data, models, quantize
    from mixprec.allocate import Request, allocate
    from mixprec.cell import cell_of
    from mixprec.evaluate import kl
    from mixprec.sweep import configuration

    first = cell_of(configuration("baseline=fisher", f"budget={BUDGET}"))
    checkpoint = models.checkpoint(first.model, cache)
    tokenizer = models.load_tokenizer(checkpoint, first.model)
    model = models.load(checkpoint, first.model)
    layers = models.quantized_layers(model)
    in_memory = quantize.InMemory(model)
    tokens = data.heldout_tokens(first.eval, tokenizer, first.model.bos, cache)
    lines = list(done)
    with tempfile.TemporaryDirectory() as place:
        reference = kl.Reference.of(model, tokens, Path(place) / "reference.safetensors")
        for sequences, seed in itertools.product(SEQUENCES, SEEDS):
            if any((line["sequences"], line["seed"]) == (sequences, seed) for line in lines):
                continue
            ask = [f"calibration.samples={sequences}", f"calibration.seed={seed}"]
            cell = cell_of(configuration("baseline=fisher", f"budget={BUDGET}", *ask))
            notes = {}
            request = Request(
                cell.baseline, None, cell.model, cell.calibration, cache, notes.__setitem__, model
            )
            allocation = allocate(layers, cell.schemes, BUDGET, request)
            in_memory.apply(allocation)
            found = kl.divergence(model, tokens, reference)
            in_memory.apply({layer.name: "bf16" for layer in layers})
            lines.append(
                {
                    "sequences": sequences, "seed": seed,
                    "predicted_kl": notes["predicted_kl"],
                    "predicted_kl_stderr": notes["predicted_kl_stderr"],
                    "kl": found["mean"], "per_sequence": found["per_sequence"],
                    "layers": allocation,
                }
            )  # fmt: skip
            keep(lines)
            print(f"  {sequences} sequences, seed {seed}: KL {found['mean']:.4f}", flush=True)
    return lines, {layer.name: layer.weights for layer in layers}


def summary(lines: list[dict], weights: dict[str, int]) -> dict:
    """Per number of sequences: KL over seeds, predicted / measured, agreement of pairs of seeds."""
    whole, found = sum(weights.values()), {}
    for sequences in SEQUENCES:
        of = [line for line in lines if line["sequences"] == sequences]
        kls = [line["kl"] for line in of]
        same = [
            sum(weights[name] for name in weights if a["layers"][name] == b["layers"][name]) / whole
            for a, b in itertools.combinations(of, 2)
        ]
        ratios = [line["predicted_kl"] / line["kl"] for line in of]
        found[str(sequences)] = {
            "seeds": len(of),
            "kl": {"mean": statistics.mean(kls), "sd": statistics.stdev(kls),
                   "least": min(kls), "greatest": max(kls)},
            "predicted / measured": {"mean": statistics.mean(ratios), "sd": statistics.stdev(ratios)},
            "same option, share of weights": {"mean": statistics.mean(same), "least": min(same)},
        }  # fmt: skip
    return found


def draw(lines: list[dict], found: dict, file: Path) -> None:
    """Measured and predicted KL of each draw, and how alike the allocations are."""
    from mixprec import predicted
    from mixprec.store import write

    figure, axes = predicted.axes(f"fisher at {BUDGET:g} bits, {len(SEEDS)} draws of the text")
    shift = np.linspace(-0.06, 0.06, len(SEEDS))
    for name, key, style in (
        ("measured on other text", "kl", {"marker": "o", "color": predicted.COLOURS[0]}),
        ("predicted", "predicted_kl", {"marker": "x", "color": predicted.COLOURS[1]}),
    ):
        x = [line["sequences"] * 2 ** shift[SEEDS.index(line["seed"])] for line in lines]
        axes.scatter(x, [line[key] for line in lines], label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SEQUENCES, [str(n) for n in SEQUENCES])
    axes.set_xlabel("calibration sequences of 256 tokens")
    axes.set_ylabel("KL to BF16, nats per token")
    alike = axes.twinx()
    alike.plot(
        SEQUENCES,
        [100 * found[str(n)]["same option, share of weights"]["mean"] for n in SEQUENCES],
        "s--", color=predicted.COLOURS[2], label="weights in the same option, two draws (right)",
    )  # fmt: skip
    alike.set_ylim(0, 100)
    alike.set_ylabel("% of weights")
    handles = [*axes.get_legend_handles_labels()[0], *alike.get_legend_handles_labels()[0]]
    axes.legend(handles, [handle.get_label() for handle in handles], loc="upper right")
    write(file, lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))
