"""Intervals, tests and sample sizes: every number of a table that says how sure another number is.

Intervals are of 95 %. Accuracies are paired by document: what counts of two cells is, per task, on how many
documents both were right, only the one, only the other, or neither. A mean is over tasks and unweighted, as
in the report. docs/statistics.md has the formulas in words and the coverage that was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats
from scipy.signal import fftconvolve
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from mixprec.paired import Answers

ALPHA = 0.05  # of intervals and tests
POWER = 0.8  # of `documents_needed`
DRAWS = 5000  # of the bootstrap
SEED = 0  # a table rendered again is the same
STEPS = 2000  # per standard deviation: how finely a test's null distribution is kept

# Of one task, documents on which: both were right, only the one, only the other, neither.
Counts = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Interval:
    """A value, its 95 % interval and its standard error; None where the data cannot give them."""

    value: float
    low: float | None
    high: float | None
    stderr: float | None


# --- two cells that answered the same documents -------------------------------------------------


def difference(one: Answers, other: Answers) -> Interval:
    """mean(one) − mean(other), the mean over tasks unweighted.

    stderr: √(Σ se²)/T over T independent tasks, se = sd(d)/√n of the documents' differences d, None if a
    task has one document. Interval: the percentiles of a paired bootstrap, stratified by task (Efron and
    Tibshirani 1993, ch. 13), that draws from the counts with half a document added to each of the four
    (Agresti and Min 2005, for the same purpose): a task on which two cells never disagreed is no proof
    that they never do. Raises ValueError if the two did not answer the same documents.
    """
    return _difference(_counts(one, other))


def task_differences(one: Answers, other: Answers) -> dict[str, Interval]:
    """`difference` for each task alone. mmlu's subjects are one task, as they are one accuracy."""
    counts = _counts(one, other)
    return {task: _difference((row,)) for task, row in zip(one.correct, counts, strict=True)}


def recovery(one: Answers, reference: Answers) -> Interval:
    """mean(one) / mean(reference): 1.0 is all of it.

    stderr by the delta method, that of one − ratio × reference per document over mean(reference);
    interval by the bootstrap of `difference`, of the ratio; without ends where mean(reference)
    cannot be told from 0. Raises ValueError if not paired, or if the reference has no right answer.
    """
    return _recovery(_counts(one, reference))


def p_value(one: Answers, other: Answers) -> float:
    """Of a difference of the means at least so large, were the two cells interchangeable.

    The paired permutation test (Fisher 1935; Good 2005, ch. 3), stratified by task: on each document where the two
    disagree, which of them is right is a fair coin. All coins are enumerated; for one task it is
    McNemar's exact test.
    """
    rows = [
        (only + lacks, 1 / sum(row)) for row in _counts(one, other) for _, only, lacks, _ in [row]
    ]
    observed = sum((row[1] - row[2]) / sum(row) for row in _counts(one, other))
    return _coins(observed, rows)


def mcnemar(one: Answers, other: Answers) -> dict[str, float]:
    """p-value per task of McNemar's exact test (statsmodels): 1.0 where the two never disagree."""
    return {
        task: float(contingency_tables.mcnemar([[both, only], [lacks, neither]]).pvalue)
        for task, (both, only, lacks, neither) in zip(one.correct, _counts(one, other), strict=True)
    }


def documents_needed(one: Answers, other: Answers) -> int | None:
    """Documents a task that show, in 4 of 5 samples, a difference as large as the one observed.

    With ψ the share of documents on which the two disagree and d their difference, per task:
    n = (z₀.₉₇₅ √Σψ + z₀.₈ √Σ(ψ − d²))² / (Σd)² (Connor 1987, for one task McNemar's test with power 80 % at
    the 5 % level). None where nothing differs: no number of documents shows a difference of 0. It is as
    uncertain as the difference itself.
    """
    rows = np.array(_counts(one, other), dtype=float)
    n = rows.sum(1)
    psi, d = (rows[:, 1] + rows[:, 2]) / n, (rows[:, 1] - rows[:, 2]) / n
    if abs(d.sum()) < 1e-12:
        return None
    z = stats.norm.ppf([1 - ALPHA / 2, POWER])
    root = z[0] * math.sqrt(psi.sum()) + z[1] * math.sqrt(max(0.0, (psi - d**2).sum()))
    return math.ceil(root**2 / d.sum() ** 2)


def holm(p_values: list[float]) -> list[float]:
    """Holm's (1979) step-down correction: p-values that may be compared with 0.05 as they are."""
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


# --- one cell -----------------------------------------------------------------------------------


def accuracy(one: Answers) -> Interval:
    """The unweighted mean over tasks of the share of right answers.

    stderr: √(Σ se²)/T, se² = p(1 − p)/(n − 1). Interval: Wilson's (1927) [l, u] of each task, put together
    by MOVER (Zou and Donner 2008): mean(p) − √Σ(p − l)²/T, mean(p) + √Σ(u − p)²/T.
    """
    n = np.array([len(right) for right in one.correct.values()])
    count = np.array([right.sum() for right in one.correct.values()])
    low, high = proportion_confint(count, n, alpha=ALPHA, method="wilson")
    p = count / n
    return Interval(
        float(p.mean()),
        float(p.mean() - np.sqrt(((p - low) ** 2).sum()) / len(n)),
        float(p.mean() + np.sqrt(((high - p) ** 2).sum()) / len(n)),
        _error_of_mean(p * (1 - p), n),
    )


def kl(result: dict) -> Interval:
    """KL to BF16 in nats per token, over the sequences of held-out text.

    Interval: `_of_few`; without ends where a result keeps no number per sequence. Raises ValueError if no KL.
    """
    if not result["kl"]:
        raise ValueError("no KL")
    rows = result["kl"].get("per_sequence")
    if not rows:
        return Interval(result["kl"]["mean"], None, None, result["kl"]["stderr"])
    return _of_few(np.array(rows))


def kl_difference(one: dict, other: dict) -> Interval:
    """KL of `one` − KL of `other` in nats per token, paired by sequence. Interval: `_of_few`.

    Raises ValueError if either result has no KL or it is of other text.
    """
    return _of_few(_per_sequence(one, other))


def kl_p_value(one: dict, other: dict) -> float:
    """As `p_value`, with a coin for every sequence: the sign of its difference. At least 2/2ⁿ."""
    d = _per_sequence(one, other)
    return _coins(d.sum(), [(1, abs(value)) for value in d])


# --- how ----------------------------------------------------------------------------------------


def _counts(one: Answers, other: Answers) -> Counts:
    if one.documents != other.documents:
        tasks = sorted(one.documents.keys() | other.documents.keys())
        differ = [t for t in tasks if one.documents.get(t) != other.documents.get(t)]
        raise ValueError(f"not paired: other documents of {', '.join(differ)}")
    rows = []
    for task, a in one.correct.items():
        b = other.correct[task]
        rows.append(tuple(int(part.sum()) for part in (a & b, a & ~b, ~a & b, ~a & ~b)))
    return tuple(rows)


def _per_sequence(one: dict, other: dict) -> np.ndarray:
    if not one["kl"] or not other["kl"]:
        raise ValueError("not paired: no KL")
    texts = [result.get("provenance", {}).get("heldout_text") for result in (one, other)]
    rows = [result["kl"].get("per_sequence", []) for result in (one, other)]
    if texts[0] != texts[1] or not rows[0] or len(rows[0]) != len(rows[1]):
        raise ValueError("not paired: KL of other text")
    return np.subtract(*rows)


def _error_of_mean(variance: np.ndarray, n: np.ndarray) -> float | None:
    """√(Σ variance/(n − 1))/T: variances are those of the sample, over n."""
    return float(np.sqrt((variance / (n - 1)).sum()) / len(n)) if (n > 1).all() else None


@lru_cache(maxsize=4096)
def _difference(counts: Counts) -> Interval:
    rows = np.array(counts)
    if tuple(rows[:, 1]) < tuple(rows[:, 2]):  # the same draws whichever cell comes first
        swapped = _difference(tuple(map(tuple, rows[:, [0, 2, 1, 3]].tolist())))
        return Interval(-swapped.value, -swapped.high, -swapped.low, swapped.stderr)
    n = rows.sum(1)
    d = (rows[:, 1] - rows[:, 2]) / n
    drawn = _draws(rows)
    low, high = _ends((drawn[..., 1] - drawn[..., 2]).mean(-1))
    if (rows[:, 1] == rows[:, 2]).all():
        low, high = _symmetric(low, high)
    error = _error_of_mean((rows[:, 1] + rows[:, 2]) / n - d**2, n)
    return Interval(float(d.mean()), low, high, error)


@lru_cache(maxsize=4096)
def _recovery(counts: Counts) -> Interval:
    rows = np.array(counts)
    n = rows.sum(1)
    right, whole = ((rows[:, 0] + rows[:, column]) / n for column in (1, 2))
    if not whole.any():
        raise ValueError("no recovery: the reference has no right answer")
    ratio = right.mean() / whole.mean()
    drawn = _draws(rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (drawn[..., 0] + drawn[..., 1]).mean(-1) / (drawn[..., 0] + drawn[..., 2]).mean(-1)
    low, high = _ends(ratios) if np.isfinite(ratios).all() else (None, None)
    # of right − ratio × whole per document: its mean square less its squared mean
    squares = (rows[:, 0] * (1 - ratio) ** 2 + rows[:, 1] + rows[:, 2] * ratio**2) / n
    error = _error_of_mean(squares - (right - ratio * whole) ** 2, n)
    return Interval(float(ratio), low, high, None if error is None else float(error / whole.mean()))


def _draws(rows: np.ndarray) -> np.ndarray:
    """Shares [DRAWS, tasks, 4] of documents drawn anew; `difference` says from what."""
    n = rows.sum(1)
    shares = (rows + 0.5) / (n + 2)[:, None]
    # Binomials one after another, the disagreements first: numpy's multinomial, column order aside.
    order = [1, 2, 0, 3]
    drawn = np.random.default_rng(SEED).multinomial(n, shares[:, order], size=(DRAWS, len(n)))
    return drawn[..., np.argsort(order)] / n[:, None]


def _ends(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def _symmetric(low: float, high: float) -> tuple[float, float]:
    """The ends where the data are as they would be with the two cells exchanged."""
    half = (high - low) / 2
    return -half, half


def _of_few(values: np.ndarray) -> Interval:
    """The mean of a few values, which may be skewed. One value has neither interval nor error.

    Each end is the farther one of Student's t and of the bootstrap-t (Efron and Tibshirani 1993, ch. 12). t alone is
    too short where sixteen values are skewed, the bootstrap-t where they are symmetric with heavy tails,
    and percentiles and BCa are too short for so few in either case (docs/statistics.md).
    """
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(mean, None, None, None)
    # In an order of their own, so that neither the order of sequences nor the sign changes the draws.
    up, down = np.sort(values), np.sort(-values)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    t = float(stats.t.ppf(1 - ALPHA / 2, n - 1))
    low, high = -t, t
    if error > 1e-12 * abs(mean):
        mirrored = tuple(down) < tuple(up)
        drawn = (down if mirrored else up)[_places(n)]
        errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
        some = errors > 1e-9 * error  # the same value n times has no error to divide by
        centre = -mean if mirrored else mean
        left, right = _ends((drawn.mean(1) - centre)[some] / errors[some])
        if mirrored:
            left, right = -right, -left
        elif tuple(down) == tuple(up):
            left, right = _symmetric(left, right)
        low, high = min(low, left), max(high, right)
    return Interval(mean, mean - high * error, mean - low * error, error)


@lru_cache(maxsize=8)
def _places(n: int) -> np.ndarray:
    """Which of n values each of DRAWS samples has: [DRAWS, n]."""
    return np.random.default_rng(SEED).integers(0, n, (DRAWS, n))


def _coins(observed: float, weights: list[tuple[int, float]]) -> float:
    """P(|Σ ±w| ≥ |observed|) of fair signs; weights: (how many coins, w of each).

    The sum's distribution is kept on a grid of STEPS per standard deviation, and what rounding could
    have moved across `observed` counts as across: the value is exact or a little too large.
    """
    weights = [(count, weight) for count, weight in weights if count and weight]
    deviation = math.sqrt(sum(count * weight**2 for count, weight in weights))
    if not deviation or not observed:
        return 1.0
    step = deviation / STEPS
    total, lowest = np.ones(1), 0.0
    for count, weight in weights:
        heads = np.arange(count + 1)
        place = np.rint(2 * weight * heads / step).astype(int)
        total = fftconvolve(total, np.bincount(place, stats.binom.pmf(heads, count, 0.5)))
        lowest -= count * weight
    sums = lowest + step * np.arange(len(total))
    across = abs(sums) >= abs(observed) - step * (len(weights) / 2 + 1e-6)
    return float(np.clip(total[across].sum(), 0, 1))
