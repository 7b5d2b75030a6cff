"""Scores on disk, one folder for each model's contents, options, calibration and signal; any budget.

A signal is a function

    score(model, tokens, layers, schemes) -> float64 [samples, layers, options]

of the unquantized model, in memory or as `Blocks`, and token ids [sequences, tokens]: how much an
option of a layer loses, by one or more samples of it. `scores.parquet` holds them, their mean and its
standard error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from filelock import FileLock

from mixprec import data, models
from mixprec.allocate import knapsack
from mixprec.allocate.blocks import Blocks
from mixprec.cell import ConfigError, digest
from mixprec.experts import expert_of

log = logging.getLogger(__name__)

VERSION = 1  # raised whenever a signal means something else than before


def minimise(
    layers, schemes, budget, request, signal: str, score: Callable
) -> tuple[dict[str, str], float, float | None]:
    """The allocation with the smallest sum of scores within the budget, that sum, its standard error."""
    table = stored(layers, schemes, request, signal, score)
    values = table.score.to_numpy().reshape(len(layers), len(schemes))
    values = _with_unreached(values, layers, request)
    weights, bits = [layer.weights for layer in layers], [scheme.bits for scheme in schemes]
    chosen = knapsack.solve(values, weights, bits, budget)
    allocation = {
        layer.name: schemes[option].name for layer, option in zip(layers, chosen, strict=True)
    }
    samples = np.nan_to_num(np.stack(table.per_sequence)).reshape(*values.shape, -1)
    sums = samples[np.arange(len(layers)), chosen].sum(0)
    n = len(sums)
    stderr = None if n == 1 else float(sums.std(ddof=1) / math.sqrt(n))
    return allocation, float(sums.mean()), stderr


def _with_unreached(values: np.ndarray, layers, request) -> np.ndarray:
    """`values` [layers, options] with a number for experts that no token reached, where they are NaN.

    By calibration.unreached=lowest, one with which no better option is ever bought for them; else
    raises ConfigError.
    """
    without = np.isnan(values).all(1)
    names = [layer.name for layer, missing in zip(layers, without, strict=True) if missing]
    unreached = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if not unreached:
        return values
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
    values = values.copy()
    values[without, 0], values[without, 1:] = 0, np.nanmax(values) or 1.0
    return values


def stored(layers, schemes, request, signal: str, score: Callable) -> pd.DataFrame:
    """Columns layer, option, bits, score, stderr, per_sequence; each layer's options, in order.

    Made once, even by many processes that start together. score is the mean of per_sequence and
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
    file = folder / "scores.parquet"
    with FileLock(folder / "lock"):
        request.note("scores_stored", file.is_file())
        if not file.is_file():
            samples = score(model, torch.tensor(rows), layers, schemes)
            table = _table(samples, layers, schemes)
            aside = file.with_suffix(".tmp")
            table.to_parquet(aside, index=False)
            aside.replace(file)
        return pd.read_parquet(file)


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
