"""Scores on disk, one folder for each model's contents, options, calibration and signal; any budget.

A signal is a function

    score(model, tokens, layers, schemes) -> float64 [samples, layers, options]

of the unquantized model, in memory or as `Blocks`, and token ids [sequences, tokens]: how much an
option of a layer loses, by one or more samples of it. `scores.parquet` holds them, their mean and its
standard error; `about.json`, of what they are, for whoever reads them without the model.

Scores in nats per token add up to a prediction of KL. Errors of many layers do not quite add up: each
is amplified by the noise of the others. How much is measured where it is most, with every layer in the
lowest option on the calibration text, and the sum S is corrected by it (`corrected`).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from filelock import FileLock

from mixprec import data, models
from mixprec.allocate import knapsack
from mixprec.allocate.backward import divergences
from mixprec.allocate.blocks import Blocks
from mixprec.cell import ConfigError, digest
from mixprec.evaluate.vllm import FUSED
from mixprec.experts import expert_of
from mixprec.schemes import BF16, Layer, Scheme
from mixprec.store import write, write_json

log = logging.getLogger(__name__)

VERSION = 2  # raised whenever a signal means something else than before


MEASURED = 8  # sequences of the calibration text on which the lowest option's KL is measured


def minimise(
    layers, schemes, budget, request, signal: str, score: Callable, *, nats: bool = False
) -> dict[str, str]:
    """The allocation of `best`, by scores that are made now if they are not stored.

    nats: the scores are nats per token; the KL that they predict is noted.
    """
    # BF16 loses nothing, so it is not scored, and options with and without it share their scores.
    scored = [scheme for scheme in schemes if scheme is not BF16]
    table, lowest_kl = stored(layers, scored, request, signal, score, nats=nats)
    _check_unreached(table, layers, request)
    allocation, kl, stderr = best(
        layers, schemes, table, budget, request.target_kl, tied=request.fused, lowest_kl=lowest_kl
    )
    if nats:
        request.note("predicted_kl", kl)
        request.note("predicted_kl_stderr", stderr)
    return allocation


def best(
    layers: list[Layer],
    schemes: list[Scheme],
    table: pd.DataFrame,
    budget: float | None,
    target: float | None = None,
    *,
    tied: bool = False,
    lowest_kl: list[float] | None = None,
) -> tuple[dict[str, str], float, float | None]:
    """The allocation with the smallest sum of scores within the budget, that sum, its standard error.

    With a target in the budget's place: that of the fewest bits whose sum is at most the target. Raises
    ConfigError if none reaches it.

    table: as of `stored`, of all `schemes` but BF16. tied: fused layers get one scheme.
    lowest_kl: measured with every layer in the lowest option, of the first sequences; the sum and the
    target are then of KL, `corrected`. The standard error is the jackknife's over sequences.
    Experts that no token reached get the lowest option: any better one is scored as the worst of all.
    """
    samples = np.stack(table.per_sequence).reshape(len(layers), -1, len(table.per_sequence[0]))
    of_layers = table.score.to_numpy().reshape(samples.shape[:2])
    unreached = np.isnan(of_layers).all(1)
    samples, of_layers = np.nan_to_num(samples), of_layers.copy()
    of_layers[unreached, 0], of_layers[unreached, 1:] = 0, np.nanmax(of_layers, initial=1.0)
    lossless = ((0, 0), (0, len(schemes) - samples.shape[1]))  # BF16, which as the highest is last
    samples, of_layers = np.pad(samples, (*lossless, (0, 0))), np.pad(of_layers, lossless)
    groups = fused(layers) if tied else [[place] for place in range(len(layers))]
    values = np.stack([of_layers[group].sum(0) for group in groups])
    weights = [sum(layers[place].weights for place in group) for group in groups]
    bits = [scheme.bits for scheme in schemes]
    lowest = samples[:, 0].sum(0)  # by sequence
    more = excess(lowest, lowest_kl)
    if target is None:
        chosen = knapsack.solve(values, weights, bits, budget)
    elif target < (smallest := corrected(values.min(1).sum(), more)):
        raise ConfigError(  # a little more than the smallest, so that what is printed is accepted
            f"target.kl={target:g}: accepted with these options: {1.00001 * smallest:.6g} or more, "
            "the smallest KL that is predicted, with every layer's best option"
        )
    else:
        chosen = knapsack.fewest_bits(values, weights, bits, uncorrected(target, more))
    option = {place: at for group, at in zip(groups, chosen, strict=True) for place in group}
    allocation = {layer.name: schemes[option[place]].name for place, layer in enumerate(layers)}
    sums = sum(samples[place, at] for place, at in option.items())
    predicted = corrected(sums.mean(), more)
    if (n := len(sums)) == 1:
        return allocation, float(predicted), None
    without = [
        corrected(np.delete(sums, i).mean(), excess(lowest, lowest_kl, without=i)) for i in range(n)
    ]
    return allocation, float(predicted), float(np.std(without) * math.sqrt(n - 1))


def excess(
    lowest: np.ndarray, lowest_kl: list[float] | None, *, without: int | None = None
) -> float:
    """What `corrected` takes, per nat: by how much the KL of all layers in the lowest option exceeds its sum.

    lowest: that sum, by sequence; lowest_kl: what was measured, of the first of them; without: leave
    this sequence out. 0 without a measurement.
    """
    if lowest_kl is None:
        return 0.0
    keep = [i for i in range(len(lowest_kl)) if i != without] or [0]
    sum_, measured = lowest[keep].mean(), np.mean([lowest_kl[i] for i in keep])
    if not (sum_ > 0 and measured > 0):
        return 0.0  # rounding errors of an option that loses nothing
    more = measured / sum_ - 1
    return float(more / sum_ if more > 0 else more / measured)


def corrected(sum_: float, more: float) -> float:
    """KL in nats per token for a sum S of scores: S (1 + m S), or S / (1 − m S) where m < 0.

    Both are S + m S² to second order, rise with S, and are what was measured at the lowest option.
    """
    return sum_ * (1 + more * sum_) if more >= 0 else sum_ / (1 - more * sum_)


def uncorrected(kl: float, more: float) -> float:
    """The sum for which `corrected` gives `kl`; infinite if every sum gives less."""
    if more == 0:
        return kl
    if more > 0:
        return (math.sqrt(1 + 4 * more * kl) - 1) / (2 * more)
    return kl / (1 + more * kl) if more * kl > -1 else math.inf


def fused(layers: list[Layer]) -> list[list[int]]:
    """Places of the layers that inference kernels run as one, and of every other layer alone.

    Siblings under one module that are named as FUSED has it: q, k and v of one attention, gate and up
    of one MLP or of one expert.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for place, layer in enumerate(layers):
        parent, _, own = layer.name.rpartition(".")
        together = next((names[0] for names in FUSED if own in names), own)
        groups.setdefault((parent, together), []).append(place)
    return list(groups.values())


def _check_unreached(table: pd.DataFrame, layers: list[Layer], request) -> None:
    """Note the experts that no token reached. Raises ConfigError unless calibration.unreached=lowest."""
    names = dict.fromkeys(table.layer[table.score.isna()])
    unreached = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if not unreached:
        return
    every = {layer.name.rpartition(".")[0] for layer in layers if expert_of(layer.name)}
    found = f"no calibration token reaches {len(unreached)} of {len(every)} experts"
    if request.calibration.unreached == "refuse":
        some = ", ".join(unreached[:3]) + (", …" if len(unreached) > 3 else "")
        raise ConfigError(
            f"calibration.unreached=refuse: {found} ({some}); accepted: more calibration.samples, or "
            "calibration.unreached=lowest, which gives them the lowest option"
        )
    log.warning("  %s; they get the lowest option: %s", found, ", ".join(unreached))
    request.note("experts_unreached", unreached)


def stored(
    layers, schemes, request, signal: str, score: Callable, *, nats: bool = False
) -> tuple[pd.DataFrame, list[float] | None]:
    """(scores, the lowest option's measured KL by sequence if they are nats, else None).

    Scores have columns layer, option, bits, score, stderr, per_sequence; each layer's options, in
    order. Made once, even by many processes that start together. score is the mean of per_sequence and
    stderr its standard error, because tokens of one sequence are not independent; NaN for one sample.
    Raises FloatingPointError if a score is not finite; an expert's that no token reached are NaN.
    """
    checkpoint = models.checkpoint(request.model, request.cache)
    tokenizer = models.load_tokenizer(checkpoint, request.model)
    rows = []  # what a signal without calibration sees
    if (calibration := request.calibration) is not None:
        # As auto-round tokenizes for AutoScheme: with whatever the tokenizer adds by default.
        texts = data.calibration_texts(calibration, tokenizer, request.cache)
        rows = [tokenizer(text).input_ids[: calibration.tokens] for text in texts]
    names = [scheme.name for scheme in schemes]
    model = request.reference
    if model is None:
        device = models.device()
        model = Blocks(checkpoint.folder, models.arithmetic(request.model, device), device)
    arithmetic = str(model.dtype)
    key = digest([VERSION, signal, checkpoint.fingerprint, names, rows, arithmetic])
    folder = request.cache / "scores" / f"{request.model.name}-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    file, about = folder / "scores.parquet", folder / "about.json"
    with FileLock(folder / "lock"):
        request.note("scores", folder.name)
        request.note("scores_stored", whole := file.is_file() and about.is_file())
        if not whole:
            start = time.perf_counter()
            samples = score(model, torch.tensor(rows), layers, schemes)
            seconds = {"scores": round(time.perf_counter() - start, 2)}
            table = _table(samples, layers, schemes)
            lowest_kl = None
            if nats:
                start = time.perf_counter()
                some = torch.tensor(rows[:MEASURED])
                lowest_kl = divergences(model, some, layers, schemes[0]).tolist()
                seconds["lowest_kl"] = round(time.perf_counter() - start, 2)
            what = {
                "signal": signal,
                "model": request.model.name,
                "model_hash": checkpoint.fingerprint,
                "options": names,
                "calibration": calibration and [calibration.samples, calibration.tokens],
                "layers": {layer.name: [layer.out_features, layer.in_features] for layer in layers},
                "lowest_kl": lowest_kl,
                "seconds": seconds,
            }
            write_json(about, what)
            write(file, lambda path: table.to_parquet(path, index=False))
        return pd.read_parquet(file), json.loads(about.read_text(encoding="utf-8"))["lowest_kl"]


def _table(samples: np.ndarray, layers, schemes) -> pd.DataFrame:
    """The mean of `samples` [samples, layers, options] over the first axis, and its standard error."""
    table = pd.DataFrame(
        [(layer.name, scheme.name, scheme.bits) for layer in layers for scheme in schemes],
        columns=["layer", "option", "bits"],
    )
    table["score"] = samples.mean(0).ravel()
    n = len(samples)
    table["stderr"] = np.nan if n == 1 else (samples.std(0, ddof=1) / math.sqrt(n)).ravel()
    table["per_sequence"] = list(samples.reshape(n, -1).T)
    unreached = np.isnan(samples).all((0, 2)) & [expert_of(la.name) is not None for la in layers]
    if len(bad := table[~np.isfinite(table.score) & ~unreached.repeat(len(schemes))]):
        layer, option = bad.iloc[0][["layer", "option"]]
        raise FloatingPointError(f"{layer}: its score in {option} is not finite")
    return table
