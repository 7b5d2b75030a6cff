"""How much do AutoScheme's changes since the report move its allocation, and for better or worse?

    python experiments/fidelity/changes.py

Undoes them in the installed auto-round, scores again, counts the layers that get another scheme, and
measures KL to BF16 of both allocations, rounded in the same way. Each change is explained, with its
source, in docs/fidelity.md.
"""

import mixprec.environment  # noqa: F401, I001 - first, as in run.py

import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from compare import ROOT, cell

from mixprec import data, models, quantize
from mixprec.allocate import Request, autoscheme
from mixprec.evaluate import kl
from mixprec.store import write_json

BUDGETS = (4.5, 5, 6)
NOW = "as installed"


@contextmanager
def activations_only():
    """Score MX schemes by their activations' error alone, as auto-round did before 0.15.0.

    From then on the pass that scores computes linears with rounded weights and unrounded inputs, and
    scores the weights' error alone. This lets it take the base class's way, with both rounded, and
    drops the weights' part.
    """
    from auto_round.auto_scheme.delta_loss import AutoSchemeWrapperLinear as Wrapper

    Wrapper.weight_score = property(lambda self: 0.0, lambda self, value: None)
    Wrapper._custom_score_forward = property(lambda self: False, lambda self, value: None)
    try:
        yield
    finally:
        del Wrapper.weight_score, Wrapper._custom_score_forward


@contextmanager
def activation_scales_up():
    """Round activations as MXFP4_RCEIL and MXFP8_RCEIL do; the weights are rounded already."""
    from auto_round.data_type.mxfp import quant_mx_rceil

    down = quantize.round_mx
    quantize.round_mx = lambda tensor, bits: quant_mx_rceil(
        tensor, bits=bits, group_size=32, data_type=f"mx_fp{bits}"
    )[0]
    try:
        yield
    finally:
        quantize.round_mx = down


def main() -> None:
    cache = ROOT / ".cache"
    asked = cell(BUDGETS[0], [])
    checkpoint = models.checkpoint(asked.model, cache)
    tokenizer = models.load_tokenizer(checkpoint, asked.model)
    texts = data.calibration_texts(asked.calibration, tokenizer, cache)
    request = Request(asked.baseline, None, asked.model, asked.calibration, cache)
    names = {scheme.bits: scheme.name for scheme in asked.schemes}

    def allocations(schemes) -> dict[float, dict[str, str]]:
        """budget -> layer -> scheme name, scored in a folder of its own."""
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "calibration" / "texts.json"
            file.parent.mkdir()
            write_json(file, [{"text": text} for text in texts])
            return {
                budget: {
                    name: names[chosen["bits"]]
                    for name, chosen in autoscheme._autoscheme(
                        checkpoint, tokenizer, schemes, budget, request, file
                    ).items()
                }
                for budget in BUDGETS
            }

    rceil = [replace(scheme, preset=f"{scheme.preset}_RCEIL") for scheme in asked.schemes]
    variants = {NOW: allocations(asked.schemes)}
    with activations_only():
        variants["scores of activations only"] = allocations(asked.schemes)
        variants["scores of activations only, their scales rounded up"] = allocations(rceil)

    model = models.load(checkpoint, asked.model)
    tokens = data.heldout_tokens(asked.eval, tokenizer, asked.model.bos, cache)
    rounded = quantize.InMemory(model)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        reference = kl.Reference.of(model, tokens, Path(place) / "reference.safetensors")

        def measure(name: str, budget: float, allocation: dict[str, str], scales: str) -> None:
            rounded.apply(allocation)  # weights now, activations as the model runs
            with activation_scales_up() if scales == "up" else nullcontext():
                divergence = kl.divergence(model, tokens, reference)
            now = variants[NOW].get(budget, allocation)
            rows.append(
                {
                    "scores": name,
                    "budget": budget,
                    "activation_scales": scales,
                    "layers": len(allocation),
                    "other_scheme": sum(allocation[layer] != now[layer] for layer in now),
                    "in_highest": sum(s == asked.schemes[-1].name for s in allocation.values()),
                    "kl": divergence["mean"],
                    "kl_stderr": divergence["stderr"],
                    "kl_tokens": divergence["tokens"],
                    "kl_per_sequence": divergence["per_sequence"],
                }
            )
            print({k: v for k, v in rows[-1].items() if k != "kl_per_sequence"}, flush=True)

        for name, variant in variants.items():
            for budget, allocation in variant.items():
                measure(name, budget, allocation, "down")
        low = dict.fromkeys(variants[NOW][BUDGETS[0]], asked.schemes[0].name)
        measure("none: all in the lowest option", asked.schemes[0].bits, low, "down")
        measure("none: all in the lowest option", asked.schemes[0].bits, low, "up")
        for name, variant in variants.items():
            measure(name, 5, variant[5], "up")
    write_json(
        Path(__file__).parent / f"{asked.model.name}-changes.json",
        {"auto-round": version("auto-round"), "model": asked.model.name, "rows": rows},
    )


if __name__ == "__main__":
    main()
