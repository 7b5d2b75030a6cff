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

import torch

from mixprec import data, lock, models, paired, partial, provenance, quantize, terminal, tracking
from mixprec.allocate import Request, allocate, drops_reference
from mixprec.cell import Cell, Config, check_divides, digest
from mixprec.evaluate import harness, kl, vllm
from mixprec.models import Checkpoint
from mixprec.partial import Partial
from mixprec.profile import profile
from mixprec.schemes import BF16, Layer, realised_bits
from mixprec.store import Outcome, Preempted, Store, one_line

log = logging.getLogger(__name__)


def run(cell: Cell, cfg: Config) -> Outcome:
    """Run `cell` and store its result. A fault in it is noted and returned, never raised.

    What was finished of it before is taken over, and what is finished of it now is kept if it stops.
    """
    store = Store(Path(cfg.results))
    try:
        store.start(cell)
        place = store.partial(cell)
        result, allocation, samples = _compute(cell, Path(cfg.cache), cfg.profile, place)
        if name := result["notes"].get("scores"):
            store.keep_scores(Path(cfg.cache) / "scores" / name)
        store.finish(cell, result, allocation, samples, paired.bits(cell.hash, samples))
    except KeyboardInterrupt:
        store.fail(cell, "interrupted")
        raise
    except Preempted:
        log.warning("  preempted: what is finished of this cell is kept")
        store.preempt(cell)
        raise
    except lock.Busy as busy:
        return Outcome(cell, "elsewhere", str(busy))
    except Exception as error:
        forget()  # whatever state the model is in
        message = one_line(error)
        log.error("  failed: %s", message)
        log.debug("", exc_info=True)  # shown with hydra.verbose=true
        try:
            store.fail(cell, message)
        except OSError as second:
            log.error("  and status.json could not be written: %s", one_line(second))
        return Outcome(cell, "failed", message)
    _say(result)
    tracking.log_cell(cell, result, allocation, cfg)
    return Outcome(cell, "done")


def _compute(cell: Cell, cache: Path, profiled: bool, place: Path):
    """(result.json, allocation.json, samples) of one cell. place: of its finished stages."""
    seconds: dict[str, float] = {}
    notes: dict[str, object] = {}
    provenance.reset_peak_memory()

    @contextmanager
    def stage(name: str):
        terminal.stage(name)
        log.info("  %s", name, extra=terminal.SHOWN)
        start = time.perf_counter()
        yield
        seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - start, 2)

    with stage("load"):
        loaded = _load(cell, cache)
        model, tokenizer, layers = loaded.model, loaded.tokenizer, loaded.layers
        checkpoint, device, dtype = loaded.checkpoint, model.device, model.dtype
        for layer in layers if cell.options else ():
            check_divides(
                layer.in_features, cell.options.schemes, cell.options.name, str(cell.model.name)
            )
        loaded.in_memory.apply({layer.name: BF16.name for layer in layers})
    kept = Partial(place, _identity(cell, checkpoint, device, dtype))

    reference = None
    if cell.eval.kl.sequences:
        with stage("reference"):
            tokens = data.heldout_tokens(cell.eval, tokenizer, cell.model.bos, cache)
            key = digest([checkpoint.fingerprint, tokens.tolist(), str(model.dtype)])
            file = cache / "reference" / f"{cell.model.name}-{key[:16]}.safetensors"
            reference = kl.Reference.of(model, tokens, file)

    before = kept.read("allocate")
    if not before and drops_reference(cell.baseline, cell.model):
        loaded = model = None  # the last references: what forget() drops is freed
        forget()
    if before:
        log.info("  allocate: taken from before")
        allocation, seconds["allocate"] = before["allocation"], before["seconds"]
        notes.update(before["notes"])
    else:
        with stage("allocate"):
            allocation = allocate(
                layers, cell.schemes, cell.budget,
                Request(
                    cell.baseline, cell.seed, cell.model, cell.calibration, cache,
                    notes.__setitem__, model, cell.target_kl, cell.fused,
                ),
            )  # fmt: skip
        stored = {"allocation": allocation, "notes": notes, "seconds": seconds["allocate"]}
        kept.keep("allocate", stored)
    if cell.model.low_memory and (cell.exports or cell.tuning):
        loaded = model = None
        forget()

    tuning, tuned = _tuning(cell, tokenizer, cache), None
    if tuning and not cell.exports:
        with stage("tune"):
            tuned = quantize.tuned_weights(
                models.load_for_auto_round(checkpoint, cell.model),
                tokenizer, allocation, tuning, low_memory=cell.model.low_memory,
            )  # fmt: skip
    if loaded is None and not cell.exports:
        with stage("load"):
            loaded = _load(cell, cache)
            model = loaded.model

    folder = checkpoint.folder
    with stage("quantize"):
        if cell.exports:
            place = _place(cache)  # removed with the last reference to it
            if cell.eval.engine == "vllm" and (why_not := vllm.refusal(allocation)):
                raise RuntimeError(why_not)
            folder = quantize.export(
                models.load_for_auto_round(checkpoint, cell.model),
                tokenizer, allocation, Path(place.name), tuning, low_memory=cell.model.low_memory,
            )  # fmt: skip
            notes["exported_bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            model = quantize.reload(folder, device, dtype)
            notes["backend"] = quantize.came_back(model, allocation)
        else:
            loaded.in_memory.apply(allocation, tuned)

    divergence = None
    if reference is not None and (before := kept.read("kl")):
        log.info("  kl: taken from before")
        divergence, seconds["kl"] = before["divergence"], before["seconds"]
    elif reference is not None:
        with stage("kl"):
            divergence = kl.divergence(model, tokens, reference)
        kept.keep("kl", {"divergence": divergence, "seconds": seconds["kl"]})
    with stage("evaluate"):
        if cell.eval.engine == "vllm":
            # It loads the folder by itself and wants the GPU for itself.
            loaded = model = None
            forget()
        metrics, samples, tokens_run = harness.accuracy(
            folder if model is None else model, tokenizer, cell, cache, kept
        )
    seconds["evaluate"] = round(seconds["evaluate"] + kept.seconds, 2)

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
        "evaluated_tokens": tokens_run,
        "profile": profile(model, layers, tokens_run, seconds["evaluate"])
        if profiled and tokens_run
        else None,
        "notes": notes,
        **({"resumed": kept.taken} if kept.taken else {}),
        "seconds": seconds,
        "peak_memory_bytes": provenance.peak_memory(),
        "provenance": {
            **provenance.collect(),
            "arithmetic": str(dtype).removeprefix("torch."),
            "device": str(device),
            "model_revision": checkpoint.revision,
            "model_hash": checkpoint.fingerprint,
            "documents": harness.documents_hash(samples),
            "heldout_text": None if reference is None else digest(tokens.tolist()),
        },
    }
    allocation_json = {
        "budget": cell.budget,
        "realised_bits": bits,
        "realised_bits_with_scales": bits_with_scales,
        "layers": allocation,
    }
    return result, allocation_json, samples


def _identity(cell: Cell, checkpoint: Checkpoint, device, dtype) -> dict:
    """Whatever else decides a stage's outcome, to the last bit: see Partial."""
    made_with = provenance.collect()
    return {
        "cell": cell.hash,
        "code": partial.CODE,
        "model": checkpoint.fingerprint,
        "arithmetic": [str(device), str(dtype), torch.get_num_threads()],
        **{key: made_with[key] for key in ("python", "packages", "hardware")},
    }


@dataclass
class _Loaded:
    """The reference model of a checkpoint, kept for the next cell of the same model."""

    key: dict
    checkpoint: Checkpoint
    tokenizer: object
    model: torch.nn.Module
    layers: list[Layer]
    in_memory: quantize.InMemory


_kept: _Loaded | None = None


def _load(cell: Cell, cache: Path) -> _Loaded:
    global _kept
    checkpoint = models.checkpoint(cell.model, cache)
    plain = cell.eval.engine == "hf"  # the slow way, everything as its authors ship it
    key = {"fingerprint": checkpoint.fingerprint, "plain": plain, **cell.settings["model"]}
    if _kept is None or _kept.key != key:
        forget()  # two models need not fit side by side
        tokenizer = models.load_tokenizer(checkpoint, cell.model)
        model = models.load(checkpoint, cell.model)
        layers = models.quantized_layers(model)
        in_memory = quantize.InMemory(model, packed=not plain)
        _kept = _Loaded(key, checkpoint, tokenizer, model, layers, in_memory)
    return _kept


def forget() -> None:
    """Drop the model that is kept between cells."""
    global _kept
    _kept = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tuning(cell: Cell, tokenizer, cache: Path) -> quantize.Tuned | None:
    """What AutoRound tunes `cell`'s rounding with; None if it is to nearest."""
    if cell.tuning is None:
        return None
    texts = data.calibration_texts(cell.tuning_text, tokenizer, cache, "tuning")
    return quantize.Tuned(cell.tuning.iters, cell.tuning.batch_size, cell.tuning_text.tokens, texts)


def _place(cache: Path) -> tempfile.TemporaryDirectory:
    folder = cache / "exports"
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=folder)


def _say(result: dict) -> None:
    if result["profile"]:
        log.info("  seconds: %s", ", ".join(f"{k} {v:g}" for k, v in result["seconds"].items()))
        log.info(
            "  tokens: %(run)d run of %(asked)d asked, %(padded)d padding, %(rows)d in the head",
            result["evaluated_tokens"],
        )
        log.info(
            "  %(tokens_per_second).0f tokens/s, %(utilisation).0f %% of the machine's matrix-product "
            "peak of %(peak).0f GFLOP/s",
            {
                "tokens_per_second": result["profile"]["tokens_per_second"],
                "utilisation": 100 * result["profile"]["utilisation"],
                "peak": result["profile"]["peak_flop_per_second"] / 1e9,
            },
        )
    mean, kl = result["mean"], result["kl"]
    error = "" if mean["stderr"] is None else f" ± {mean['stderr']:.4f}"
    divergence = "" if kl is None else f", KL {abs(kl['mean']):.4f} nats/token"
    log.info(
        "  accuracy %.4f%s (n=%d)%s, %.3f bits, %.0f s",
        mean["acc"],
        error,
        mean["n"],
        divergence,
        result["realised_bits"],
        sum(result["seconds"].values()),
        extra=terminal.SHOWN,
    )
