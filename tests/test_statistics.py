"""Statistics: by hand, against scipy and statsmodels, as properties, and their coverage by simulation.

`pytest tests/test_statistics.py -k cover -s` prints the coverage that docs/statistics.md states.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from mixprec import statistics
from mixprec.paired import Answers
from mixprec.statistics import Interval

TABLES = 1000
# Accuracies of BF16, and what is lost of them: SmolLM2's in MXFP4, and a large model's at 5 bits.
SMALL = ([0.27, 0.34, 0.67, 0.50, 0.24], [0.20, 0.03, 0.07, 0.00, 0.00])
LARGE = ([0.70, 0.75, 0.80, 0.70, 0.65], [0.01, 0.02, 0.00, 0.01, 0.02])


def answers(rows) -> tuple[Answers, Answers]:
    """Two cells with, per task, so many documents: both right, only the one, only the other, neither."""
    documents = {f"task {place}": "hash" for place in range(len(rows))}
    pairs = [np.repeat([(1, 1), (1, 0), (0, 1), (0, 0)], row, axis=0).astype(bool) for row in rows]
    return tuple(
        Answers(documents, {task: pair[:, side] for task, pair in zip(documents, pairs, strict=True)})
        for side in (0, 1)
    )  # fmt: skip


def simulated(accuracies, losses, documents: list[int], correlation: float, seed: int = 0):
    """(counts [TABLES, tasks, 4], shares [tasks, 4]) of answers right where a latent normal is low.

    correlation: of the two cells' latent values, as of two models that are much alike.
    """
    shares = []
    for whole, lost in zip(accuracies, losses, strict=True):
        cuts = stats.norm.ppf([whole - lost, whole])
        both = stats.multivariate_normal.cdf(cuts, cov=[[1, correlation], [correlation, 1]])
        shares.append([both, whole - lost - both, whole - both, 1 + both - 2 * whole + lost])
    rng = np.random.default_rng(seed)
    return rng.multinomial(documents, shares, size=(TABLES, len(shares))), np.array(shares)


def holds(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


def stated(what: str, covered: float) -> float:
    print(f"\n{what}: {100 * covered:.1f} % of {TABLES}", end="")
    return covered


counts = st.lists(st.tuples(*[st.integers(0, 30)] * 4).filter(any), min_size=1, max_size=4)
quick = settings(max_examples=40, deadline=None, derandomize=True)


# --- by hand and against other implementations ---------------------------------------------------


def test_a_difference_by_hand():
    """Tasks of 4 and of 2 documents: (1/4 + 1/2)/2; variances 3/12 · 1/4 … as sd(d)/√n has them."""
    one, other = answers([(1, 2, 1, 0), (0, 1, 0, 1)])
    found = statistics.difference(one, other)
    assert found.value == pytest.approx((1 / 4 + 1 / 2) / 2)
    errors = [stats.sem([0, 1, 1, -1]), stats.sem([1, 0])]
    assert found.stderr == pytest.approx(math.hypot(*errors) / 2)
    tasks = statistics.task_differences(one, other)
    assert [tasks[t].value for t in one.correct] == [0.25, 0.5]
    assert [tasks[t].stderr for t in one.correct] == pytest.approx(errors)


def test_recovery_by_hand():
    one, reference = answers([(3, 1, 2, 4), (2, 0, 2, 6)])
    found = statistics.recovery(one, reference)
    assert found.value == pytest.approx((4 / 10 + 2 / 10) / (5 / 10 + 4 / 10))
    d = [one.correct[t] - found.value * reference.correct[t] for t in one.correct]
    assert found.stderr == pytest.approx(math.hypot(*map(stats.sem, d)) / 2 / 0.45)


@quick
@given(counts)
def test_standard_errors_are_those_of_documents(rows):
    one, other = answers(rows)
    found = statistics.difference(one, other)
    d = [one.correct[t].astype(float) - other.correct[t] for t in one.correct]
    assert found.value == pytest.approx(np.mean([x.mean() for x in d]), abs=1e-12)
    if min(map(len, d)) == 1:
        assert found.stderr is None
    else:
        expected = math.sqrt(sum(stats.sem(x) ** 2 for x in d)) / len(d)
        assert found.stderr == pytest.approx(expected, abs=1e-9)


def test_the_interval_is_that_of_a_bootstrap_of_documents():
    """Where there are many documents, scipy's bootstrap of one task's finds the same ends."""
    one, other = answers([(400, 120, 60, 420)])
    found = statistics.difference(one, other)
    d = one.correct["task 0"].astype(float) - other.correct["task 0"]
    theirs = stats.bootstrap(
        (d,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)


@quick
@given(st.tuples(*[st.integers(0, 60)] * 4).filter(any))
def test_one_task_is_mcnemars_exact_test(row):
    one, other = answers([row])
    expected = mcnemar([[row[0], row[1]], [row[2], row[3]]], exact=True).pvalue
    assert statistics.mcnemar(one, other)["task 0"] == pytest.approx(expected)
    assert statistics.p_value(one, other) == pytest.approx(expected, rel=1e-9)


@quick
@given(counts)
def test_a_p_value_is_that_of_scipys_permutation_test(rows):
    rows = [tuple(min(n, 4) for n in row) for row in rows][:2]
    one, other = answers(rows)
    d = np.concatenate(
        [(a * 1.0 - b) / len(a) for a, b in zip(one.correct.values(), other.correct.values(), strict=True)]
    )  # fmt: skip
    d = d[d != 0]
    if len(d) < 2:
        return
    theirs = stats.permutation_test(
        (d, 0 * d), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples",
        n_resamples=70000,
    ).pvalue  # fmt: skip
    assert statistics.p_value(one, other) == pytest.approx(theirs, abs=1e-9)


def test_kl_has_the_p_value_of_every_sign_and_its_t_interval_where_it_is_symmetric():
    rng = np.random.default_rng(3)
    rows = rng.normal(0.5, 0.1, 12), rng.normal(0.45, 0.1, 12)
    one, other = (divergence(values) for values in rows)
    d = rows[0] - rows[1]
    theirs = stats.permutation_test(
        (d, 0 * d), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples"
    ).pvalue
    assert statistics.kl_p_value(one, other) == pytest.approx(theirs, rel=0.02)
    assert statistics.kl_p_value(one, other) >= theirs - 1e-9  # what is rounded is rounded up
    found = statistics.kl_difference(one, other)
    t = stats.ttest_1samp(d, 0).confidence_interval()
    assert found.low <= t.low and found.high >= t.high
    assert found.high - found.low < 1.3 * (t.high - t.low)
    assert found.stderr == pytest.approx(stats.sem(d))


def test_accuracy_of_one_task_is_wilsons():
    one, _ = answers([(30, 5, 3, 62)])
    found = statistics.accuracy(one)
    assert (found.low, found.high) == pytest.approx(proportion_confint(35, 100, method="wilson"))
    assert found.stderr == pytest.approx(stats.sem([1] * 35 + [0] * 65))


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []


def test_documents_needed_by_hand_and_none_for_no_difference():
    """Connor's formula: ψ = 0.2, d = 0.1: (1.960 √0.2 + 0.842 √0.19)²/0.01 = 154.3…"""
    assert statistics.documents_needed(*answers([(40, 15, 5, 40)])) == 155
    assert statistics.documents_needed(*answers([(40, 5, 15, 40)])) == 155
    assert statistics.documents_needed(*answers([(40, 5, 5, 40)])) is None


# --- properties ----------------------------------------------------------------------------------


@quick
@given(counts)
def test_the_other_way_round_is_the_negative(rows):
    one, other = answers(rows)
    there, back = statistics.difference(one, other), statistics.difference(other, one)
    assert (there.value, there.low, there.high) == (-back.value, -back.high, -back.low)
    assert there.stderr == back.stderr
    assert there.low <= there.value <= there.high
    assert statistics.p_value(one, other) == pytest.approx(statistics.p_value(other, one))
    assert statistics.documents_needed(one, other) == statistics.documents_needed(other, one)


@quick
@given(counts, st.randoms())
def test_the_order_of_documents_changes_nothing(rows, random):
    one, other = answers(rows)
    orders = {t: random.sample(range(len(r)), len(r)) for t, r in one.correct.items()}
    mixed = [Answers(x.documents, {t: r[orders[t]] for t, r in x.correct.items()}) for x in (one, other)]  # fmt: skip
    for of in (statistics.difference, statistics.mcnemar, statistics.p_value):
        assert of(*mixed) == of(one, other)
    assert statistics.accuracy(mixed[0]) == statistics.accuracy(one)


@quick
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.randoms())
def test_the_order_of_sequences_and_the_sign_change_nothing_for_kl(values, random):
    mixed = random.sample(values, len(values))
    found = statistics.kl_difference(divergence(values), divergence([0.0] * len(values)))
    other = statistics.kl_difference(divergence([0.0] * len(mixed)), divergence(mixed))
    ends = (found.low, found.value, found.high)
    assert ends == pytest.approx((-other.high, -other.value, -other.low), rel=1e-6, abs=1e-9)
    assert found.low <= found.value <= found.high


@quick
@given(counts)
def test_identical_answers_differ_by_nothing_and_recover_everything(rows):
    one, _ = answers([(a + b + 1, 0, 0, c + d) for a, b, c, d in rows])
    found = statistics.difference(one, one)
    assert found.value == 0 and found.low < 0 < found.high  # not proof that nothing differs
    assert statistics.p_value(one, one) == 1
    assert set(statistics.mcnemar(one, one).values()) == {1.0}
    assert statistics.documents_needed(one, one) is None
    part = statistics.recovery(one, one)
    assert part.value == 1 and (part.low is None or holds(part, 1))
    same = divergence([0.5, 0.7])
    assert statistics.kl_difference(same, same) == Interval(0.0, 0.0, 0.0, 0.0)
    assert statistics.kl_p_value(same, same) == 1


def test_more_documents_that_agree_say_more():
    widths = []
    for n in (1, 10, 250, 10_000):
        found = statistics.difference(*answers([(n, 0, 0, 0)]))
        widths.append(found.high - found.low)
    assert widths[0] > 0.5 and sorted(widths, reverse=True) == widths and widths[-1] < 0.001


def test_one_document_or_sequence_has_no_standard_error():
    one, other = answers([(0, 1, 0, 0)])
    found = statistics.difference(one, other)
    assert (found.value, found.stderr) == (1.0, None) and found.low <= 0 < found.high
    assert statistics.recovery(other, one).value == 0
    assert statistics.recovery(other, one).low is None  # a reference that may be 0
    assert statistics.accuracy(one).stderr is None and statistics.accuracy(one).low > 0.2
    assert statistics.kl(divergence([0.5])) == Interval(0.5, None, None, None)
    assert statistics.kl_p_value(divergence([0.5]), divergence([0.4])) == 1


def test_what_is_not_paired_is_refused_in_one_line():
    one, other = answers([(1, 1, 1, 1), (2, 1, 1, 1)])
    moved = Answers(other.documents | {"task 1": "others"}, other.correct)
    fewer = Answers({"task 0": "hash"}, {"task 0": other.correct["task 0"]})
    for of in (statistics.difference, statistics.recovery, statistics.mcnemar):
        for bad in (moved, fewer):
            with pytest.raises(ValueError, match=r"^not paired: other documents of task 1$"):
                of(one, bad)
    of_text = divergence([1.0, 2.0])
    for bad in (divergence([1.0, 2.0], "other"), divergence([1.0]), {"kl": None}):
        with pytest.raises(ValueError, match=r"^not paired"):
            statistics.kl_difference(of_text, bad)
    with pytest.raises(ValueError, match="no right answer"):
        statistics.recovery(*answers([(0, 3, 0, 2)]))


# --- coverage ------------------------------------------------------------------------------------


@pytest.fixture
def fewer_draws(monkeypatch):
    """A thousand draws an interval in place of 5,000: what is measured over 1,000 tables is the same."""
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    statistics._difference.cache_clear()
    statistics._recovery.cache_clear()
    statistics._places.cache_clear()
    yield
    statistics._difference.cache_clear()
    statistics._recovery.cache_clear()
    statistics._places.cache_clear()


@pytest.mark.parametrize(
    "what, of, documents, correlation",
    [
        ("small model", SMALL, [250] * 4 + [337], 0.8),
        ("large model", LARGE, [250] * 4 + [337], 0.95),
        ("one task", ([0.7], [0.03]), [250], 0.9),
    ],
)
def test_the_bootstrap_covers(what, of, documents, correlation, fewer_draws):
    tables, shares = simulated(*of, documents, correlation)
    mean = (shares[:, 1] - shares[:, 2]).mean()
    ratio = (shares[:, 0] + shares[:, 1]).mean() / (shares[:, 0] + shares[:, 2]).mean()
    keys = [tuple(map(tuple, table)) for table in tables.tolist()]
    for name, found, value in (
        ("difference", statistics._difference, mean),
        ("recovery", statistics._recovery, ratio),
    ):
        covered = np.mean([holds(found(key), value) for key in keys])
        assert 0.93 <= stated(f"{what}, n = 250, {name}", covered) <= 0.97


@pytest.mark.parametrize("documents, most", [(50, 0.98), (10, 1.0)])
def test_with_few_documents_it_covers_at_least(documents, most, fewer_draws):
    tables, shares = simulated(*SMALL, [documents] * 5, 0.8)
    mean = (shares[:, 1] - shares[:, 2]).mean()
    covered = np.mean(
        [holds(statistics._difference(tuple(map(tuple, t))), mean) for t in tables.tolist()]
    )
    assert 0.93 <= stated(f"small model, n = {documents}, difference", covered) <= most


def test_accuracy_covers():
    tables, shares = simulated(*SMALL, [250] * 4 + [337], 0.8)
    mean = (shares[:, 0] + shares[:, 1]).mean()
    covered = np.mean([holds(statistics.accuracy(answers(table)[0]), mean) for table in tables])
    assert 0.93 <= stated("small model, n = 250, accuracy", covered) <= 0.97


def divergence(values, text: str = "same") -> dict:
    rows = [float(value) for value in values]
    kl = {"per_sequence": rows, "mean": float(np.mean(rows)), "stderr": None}
    return {"kl": kl, "provenance": {"heldout_text": text}}


def lognormal(rng, spread: float, shape=(TABLES, 16)) -> np.ndarray:
    """Mean 1; spread 0.2 is what SmolLM2's sequences have."""
    return rng.lognormal(-(spread**2) / 2, spread, shape)


@pytest.mark.parametrize(
    "what, sequences, value, least",
    [
        ("lognormal 0.2", lambda rng: lognormal(rng, 0.2), 1, 0.93),
        ("lognormal 0.5", lambda rng: lognormal(rng, 0.5), 1, 0.93),
        ("lognormal 0.75", lambda rng: lognormal(rng, 0.75), 1, 0.93),
        ("Student's t, 3 degrees", lambda rng: 2 + rng.standard_t(3, (TABLES, 16)), 2, 0.93),
        (
            "paired difference, lognormal 0.5",
            lambda rng: lognormal(rng, 0.5) * (lognormal(rng, 0.1) - 0.7 * lognormal(rng, 0.1)),
            0.3,
            0.93,
        ),
        # The limit: a skewness of 7, which sixteen values hardly ever show.
        ("Pareto 4", lambda rng: 0.75 * (1 + rng.pareto(4, (TABLES, 16))), 1, 0.90),
    ],
)
def test_kl_of_sixteen_heavy_tailed_sequences_covers(what, sequences, value, least, fewer_draws):
    rows = sequences(np.random.default_rng(0))
    covered = np.mean([holds(statistics._of_few(row), value) for row in rows])
    assert least <= stated(f"KL of 16 sequences, {what}", covered) <= 0.97


@pytest.mark.parametrize(
    "what, sequences",
    [
        ("lognormal 0.75", lambda rng: lognormal(rng, 0.75)),
        ("Pareto 4", lambda rng: 0.75 * (1 + rng.pareto(4, (TABLES, 16)))),
    ],
)
def test_neither_students_t_nor_bca_covers_sixteen_skewed_sequences(what, sequences, fewer_draws):
    """Why there is `_of_few`: it holds the mean more often than either."""
    rows = sequences(np.random.default_rng(0))
    ours = np.mean([holds(statistics._of_few(row), 1) for row in rows])
    t = np.mean(stats.ttest_1samp(rows, 1, axis=1).pvalue >= 0.05)
    ends = stats.bootstrap(
        (rows,), np.mean, axis=1, method="BCa", n_resamples=500, batch=50,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    bca = np.mean((ends.low <= 1) & (ends.high >= 1))
    assert stated(f"KL of 16 sequences, {what}, Student's t", t) < ours - 0.02
    assert stated(f"KL of 16 sequences, {what}, BCa", bca) < ours - 0.02


def test_where_nothing_differs_one_in_twenty_is_significant():
    of = (LARGE[0], [0.0] * 5)
    tables, _ = simulated(*of, [250] * 5, 0.95)
    wrong = np.mean([statistics.p_value(*answers(table)) < 0.05 for table in tables])
    assert 0.03 <= stated("no difference, p < 0.05", wrong) <= 0.06


def test_documents_needed_show_the_difference_in_four_of_five_samples():
    """As many documents as the formula asks for, of the shares that it was given."""
    _, shares = simulated(*LARGE, [250] * 5, 0.95)
    needed = statistics.documents_needed(*answers(np.rint(1e6 * shares).astype(int)))
    assert 100 < needed < 2000
    drawn = np.random.default_rng(1).multinomial(needed, shares, size=(TABLES, 5))
    seen = np.mean([statistics.p_value(*answers(table)) < 0.05 for table in drawn])
    assert 0.76 <= stated(f"power with {needed} documents", seen) <= 0.84
