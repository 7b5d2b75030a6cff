"""One cell from start to end: the only file that knows all the others."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixprec.cell import Cell, Config, check_divides
from mixprec.store import Store, one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: `done`, `stored` (it was there already) or `failed` (and why)."""

    cell: Cell
    state: str
    message: str = ""

    @property
    def failed(self) -> bool:
        return self.state == "failed"


def run(cell: Cell, cfg: Config) -> Outcome:
    """Run `cell` unless it is stored. A fault in it is noted and returned, never raised."""
    store = Store(Path(cfg.results))
    stored = store.look_up(cell)
    if not cfg.force:
        if stored.state == "same":
            log.info("  stored already")
            return Outcome(cell, "stored")
        if stored.state == "other":
            message = f"another result is stored there: {stored.why}; force=true reruns it"
            log.error("  %s", message)
            return Outcome(cell, "failed", message)
    try:
        store.start(cell)
        result, allocation, samples = _compute(cell, Path(cfg.cache))
        store.finish(cell, result, allocation, samples)
    except KeyboardInterrupt:
        store.fail(cell, "interrupted")
        raise
    except Exception as error:
        message = one_line(error)
        log.error("  failed: %s", message)
        log.debug("", exc_info=True)  # shown with hydra.verbose=true
        try:
            store.fail(cell, message)
        except OSError as second:
            log.error("  and status.json could not be written: %s", one_line(second))
        return Outcome(cell, "failed", message)
    _say(result)
    from mixprec import tracking

    tracking.log_cell(cell, result, allocation, cfg)
    return Outcome(cell, "done")


def _compute(cell: Cell, cache: Path):
    """(result.json, allocation.json, samples) of one cell."""
    from mixprec import data, models, provenance, quantize
    from mixprec.allocate import Request, allocate
    from mixprec.cell import digest
    from mixprec.evaluate import harness, kl
    from mixprec.schemes import realised_bits

    seconds: dict[str, float] = {}
    notes: dict[str, object] = {}
    provenance.reset_peak_memory()

    @contextmanager
    def stage(name: str):
        log.info("  %s", name)
        start = time.perf_counter()
        yield
        seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - start, 2)

    with stage("load"):
        checkpoint = models.checkpoint(cell.model, cache)
        tokenizer = models.load_tokenizer(checkpoint, cell.model)
        model = models.load(checkpoint, cell.model)
        layers = models.quantized_layers(model)
        for layer in layers if cell.options else ():
            check_divides(
                layer.in_features, cell.options.schemes, cell.options.name, str(cell.model.name)
            )

    reference = None
    if cell.eval.kl.sequences:
        with stage("reference"):
            tokens = data.heldout_tokens(cell.eval, tokenizer, cell.model.bos, cache)
            key = digest([checkpoint.fingerprint, tokens.tolist(), str(model.dtype)])
            file = cache / "reference" / f"{cell.model.name}-{key[:16]}.safetensors"
            reference = kl.Reference.of(model, tokens, file)

    with stage("allocate"):
        request = Request(
            cell.baseline, cell.seed, cell.model, cell.calibration, cache, notes.__setitem__
        )
        allocation = allocate(layers, cell.schemes, cell.budget, request)

    with stage("quantize"), tempfile.TemporaryDirectory(dir=_made(cache / "exports")) as folder:
        if cell.options is None:
            pass
        elif cell.schemes[0].family == "mx":
            quantize.quantize_in_memory(model, allocation)
        else:
            device, dtype = model.device, model.dtype
            exported = quantize.export(model.cpu().bfloat16(), tokenizer, allocation, Path(folder))
            del model
            gc.collect()
            notes["exported_bytes"] = sum(f.stat().st_size for f in exported.glob("*.safetensors"))
            notes["backend"] = quantize.BACKENDS.get(device.type) or "auto"
            model = quantize.reload(exported, device, dtype)

    divergence = None
    if reference is not None:
        with stage("kl"):
            divergence = kl.divergence(model, tokens, reference)
    with stage("evaluate"):
        metrics, samples = harness.accuracy(model, tokenizer, cell, cache)

    bits = realised_bits(layers, allocation)
    bits_with_scales = realised_bits(layers, allocation, count_scales=True)
    result = {
        "schema": cell.settings["schema"],
        "hash": cell.hash,
        "config": cell.settings,
        "metrics": metrics,
        "mean": harness.mean(metrics),
        "recovery": {"reference": cell.reference_path},
        "kl": divergence,
        "realised_bits": bits,
        "realised_bits_with_scales": bits_with_scales,
        "quantized": {
            "layers": len(layers),
            "weights": sum(layer.weights for layer in layers),
            "layers_by_scheme": dict(sorted(Counter(allocation.values()).items())),
            "kept_in_bf16": "lm_head and embeddings" if cell.options else "everything",
        },
        "notes": notes,
        "seconds": seconds,
        "peak_memory_bytes": provenance.peak_memory(),
        "provenance": {
            **provenance.collect(),
            "arithmetic": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "model_revision": checkpoint.revision,
            "model_hash": checkpoint.fingerprint,
            "documents": harness.documents_hash(samples),
        },
    }
    allocation_json = {
        "budget": cell.budget,
        "realised_bits": bits,
        "realised_bits_with_scales": bits_with_scales,
        "layers": allocation,
    }
    return result, allocation_json, samples


def _say(result: dict) -> None:
    mean, kl = result["mean"], result["kl"]
    error = "" if mean["stderr"] is None else f" ± {mean['stderr']:.4f}"
    divergence = "" if kl is None else f", KL {kl['mean']:.4f} nats/token"
    log.info(
        "  accuracy %.4f%s (n=%d)%s, %.3f bits, %.0f s",
        mean["acc"],
        error,
        mean["n"],
        divergence,
        result["realised_bits"],
        sum(result["seconds"].values()),
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
