"""Tests of differences against published tables, closed forms, plain loops and what theory says."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from significance import Comparison, delong, paired_bootstrap, paired_t
from sklearn.metrics import roc_auc_score

from flip_hf.metrics.auc import auc
from flip_hf.metrics.logloss import logloss

# A label and two scores, few enough to tie often.
ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 6)), min_size=4, max_size=60)


def arrays(rows):
    """With two rows of each label, which DeLong's test needs, that tell the models apart."""
    rows = [*rows, (True, 6, 5), (True, 3, 0), (False, 0, 1), (False, 4, 4)]
    labels, first, second = (np.array(column) for column in zip(*rows, strict=True))
    return labels.astype(int), first / 6, second / 6


def delong_by_pairs(labels, first, second):
    """DeLong et al. 1988 as the paper has it: the kernel of every pair, components as its means, their covariances."""
    kernels = []
    for scores in (first, second):
        clicks, others = scores[labels == 1], scores[labels == 0]
        kernels.append([[1.0 if x > y else 0.5 if x == y else 0.0 for y in others] for x in clicks])
    kernels = np.array(kernels)
    of_clicks, of_others = kernels.mean(2), kernels.mean(1)
    covariance = np.cov(of_clicks) / of_clicks.shape[1] + np.cov(of_others) / of_others.shape[1]
    contrast = np.array([1.0, -1.0])
    return contrast @ kernels.mean((1, 2)), math.sqrt(max(0.0, contrast @ covariance @ contrast))


@settings(max_examples=80, deadline=None)
@given(rows=ROWS)
def test_delong_equals_the_sum_over_pairs(rows):
    labels, first, second = arrays(rows)
    found = delong(labels, first, second)
    difference, error = delong_by_pairs(labels, first, second)
    assert found.difference == pytest.approx(difference, abs=1e-12)
    assert found.difference == pytest.approx(roc_auc_score(labels, first) - roc_auc_score(labels, second), abs=1e-12)
    assert found.standard_error == pytest.approx(error, abs=1e-7)
    assert found.p == pytest.approx(math.erfc(abs(found.difference) / found.standard_error / math.sqrt(2)), rel=1e-9)
    normal = NormalDist(found.difference, found.standard_error)
    assert (found.low, found.high) == pytest.approx((normal.inv_cdf(0.025), normal.inv_cdf(0.975)), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_delong_does_not_see_what_ranks_do_not(rows, seed):
    labels, first, second = arrays(rows)
    found = delong(labels, first, second)
    turned = delong(labels, second, first)
    assert turned == Comparison(-found.difference, found.standard_error, -found.high, -found.low, found.p)
    assert delong(labels, np.exp(9 * first) - 5, second**3) == found
    order = np.random.RandomState(seed).permutation(len(labels))
    assert vars(delong(labels[order], first[order], second[order])) == pytest.approx(vars(found), rel=1e-9, abs=1e-12)
    # What ranks the other way round is worth as much less than one half as the other more.
    flipped = delong(1 - labels, -first, -second)
    assert flipped.difference == pytest.approx(found.difference, abs=1e-12)
    assert flipped.standard_error == pytest.approx(found.standard_error, abs=1e-12)


def test_delong_of_scores_without_a_difference_or_without_an_error():
    labels = np.array([0, 1, 1, 0, 1, 0, 0])
    scores = np.array([0.1, 0.3, 0.3, 0.3, 0.9, 0.2, 0.8])
    assert delong(labels, scores, scores) == Comparison(0.0, 0.0, 0.0, 0.0, 1.0)
    assert delong(labels, scores, 10 * scores) == Comparison(0.0, 0.0, 0.0, 0.0, 1.0)
    # All pairs in order, and none: no row differs from another, though sevenths and thirds are no binary fractions.
    assert delong(labels, labels, 1 - labels) == Comparison(1.0, 0.0, 1.0, 1.0, 0.0)


def test_delong_of_many_rows():
    """Half a million rows: more pairs than memory holds."""
    random = np.random.RandomState(0)
    labels = random.randint(0, 2, 500_000)
    first, second = labels + random.randn(2, len(labels))
    found = delong(labels, first, second)
    assert found.difference == pytest.approx(auc(labels, first) - auc(labels, second), abs=1e-12)
    # For normal scores a unit apart, by the moments of Bamber 1975: Var P(X > y) = P(both of two clicks above) - AUC^2.
    area = stats.norm.cdf(math.sqrt(0.5))
    both = stats.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]]).cdf([math.sqrt(0.5)] * 2)
    error = math.sqrt(2 * 2 * (both - area**2) / (len(labels) / 2))
    assert found.standard_error == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize(
    ("labels", "first", "said"),
    [
        ([1, 1, 1, 1], [0.1, 0.2, 0.3, 0.4], "4 clicks and 0 other rows"),
        ([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], "0 clicks and 4 other rows"),
        ([0, 0, 1, 0], [0.1, 0.2, 0.3, 0.4], "1 clicks and 3 other rows"),
        ([0, 1, 1, 0], [0.1, 0.2, math.nan, 0.4], "first is NaN in row 2"),
        ([0, 1, 1, 0], [0.1, 0.2, 0.3], r"first \(3,\)"),
        ([[0, 1, 1, 0]], [[0.1, 0.2, 0.3, 0.4]], r"one shape, \(rows,\)"),
    ],
)
def test_delong_refuses_what_it_cannot_tell(labels, first, said):
    second = np.array([0.4, 0.3, 0.2, 0.1]).reshape(np.shape(labels))
    with pytest.raises(ValueError, match=said):
        delong(np.array(labels), np.array(first), second)


def two_models(rows, seed, noise=(0.6, 0.6)):
    """Labels drawn from true probabilities, and two models that see their logits through noise of their own."""
    random = np.random.RandomState(seed)
    logits = random.randn(rows)
    labels = (random.rand(rows) < 1 / (1 + np.exp(-logits))).astype(int)
    first, second = (1 / (1 + np.exp(-logits - sd * random.randn(rows))) for sd in noise)
    return labels, first, second


def test_bootstrap_of_a_mean_is_what_theory_says():
    labels, first, second = two_models(3000, 3, (0.6, 0.8))
    found = paired_bootstrap(labels, first, second, logloss, resamples=2000)
    losses = [-np.where(labels, np.log(p), np.log1p(-p)) for p in (first, second)]
    theory = stats.ttest_rel(*losses)
    error = (losses[0] - losses[1]).std(ddof=1) / math.sqrt(len(labels))
    assert found.difference == pytest.approx(losses[0].mean() - losses[1].mean(), abs=1e-12)
    assert found.standard_error == pytest.approx(error, rel=0.05)
    interval = theory.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.15 * error)
    assert 0.001 < found.p < 0.05
    assert found.p == pytest.approx(theory.pvalue, rel=0.5)

    narrow = paired_bootstrap(labels, first, second, logloss, resamples=2000, level=0.5)
    interval = theory.confidence_interval(0.5)
    assert (narrow.low, narrow.high) == pytest.approx((interval.low, interval.high), abs=0.15 * error)


def test_bootstrap_of_auc_agrees_with_delong():
    labels, first, second = two_models(2000, 5, (0.6, 0.9))
    found, expected = paired_bootstrap(labels, first, second, auc, resamples=500), delong(labels, first, second)
    assert found.difference == pytest.approx(expected.difference, abs=1e-12)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.1)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.3 * expected.standard_error)


def test_bootstrap_resamples_both_models_alike():
    labels, first, second = two_models(200, 7)
    run = {"metric": logloss, "resamples": 200, "seed": 4}
    found = paired_bootstrap(labels, first, second, **run)
    assert found == paired_bootstrap(labels, first, second, **run), "the same seed, the same rows"
    assert found != paired_bootstrap(labels, first, second, **run | {"seed": 5})
    turned = paired_bootstrap(labels, second, first, **run)
    assert (turned.difference, turned.p) == (-found.difference, found.p)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-15)

    assert paired_bootstrap(labels, first, first, **run) == Comparison(0.0, 0.0, 0.0, 0.0, 1.0)
    # A difference that is the same on any rows has no error only where the rows are the same.
    shifted = paired_bootstrap(labels, first, first + 0.25, lambda _, p: float(p.mean()), resamples=99)
    assert shifted.difference == pytest.approx(-0.25)
    assert shifted.standard_error < 1e-12
    assert shifted.p == 2 / 100, "the smallest that 99 resamples can tell"


def test_bootstrap_leaves_out_resamples_without_a_value():
    labels = np.array([1, 0, 0])
    first, second = np.array([0.9, 0.1, 0.2]), np.array([0.1, 0.9, 0.8])
    found = paired_bootstrap(labels, first, second, auc, resamples=50)
    # With both labels the first is always right and the second never; (2/3)^3 + (1/3)^3 of resamples have one label.
    assert (found.difference, found.standard_error, found.low, found.high) == (1.0, 0.0, 1.0, 1.0)
    assert 2 / 51 < found.p < 2 / 20


@pytest.mark.parametrize(
    ("labels", "settings", "said"),
    [
        ([1, 1, 1], {}, "no value on these rows"),
        ([1, 0, 1], {"resamples": 1}, "of 1 resamples"),
        ([1, 0, 1], {"level": 1.0}, "level is 1.0"),
        ([1, 0], {}, r"labels \(2,\)"),
    ],
)
def test_bootstrap_refuses_what_it_cannot_tell(labels, settings, said):
    scores = np.array([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=said):
        paired_bootstrap(np.array(labels), scores, scores[::-1], auc, **settings)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=30).filter(
        lambda values: len(set(values)) > 1
    )
)
def test_t_equals_that_of_scipy(values):
    found, expected = paired_t(values), stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval()
    assert found.difference == pytest.approx(np.mean(values), abs=1e-12)
    assert found.standard_error == pytest.approx(stats.sem(values), rel=1e-9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)
    turned = paired_t(-np.array(values))
    assert (turned.difference, turned.low, turned.high, turned.p) == pytest.approx(
        (-found.difference, -found.high, -found.low, found.p)
    )


def test_t_of_student_s_sleep_data():
    """Student 1908: hours of sleep that one drug gained over the other; figures of R's `t.test`."""
    found = paired_t([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert found.difference == pytest.approx(1.58)
    assert found.difference / found.standard_error == pytest.approx(4.0621, abs=5e-5)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)


def values_of(rows, t):
    """Half of the values up and half down, around a mean that is t times its error."""
    values = np.resize([1.0, -1.0], rows)
    values -= values.mean()
    return values / values.std(ddof=1) * math.sqrt(rows) + t


# The chance that |T| is at least t, by degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4). These forms
# lose no digits for large t.
TAILS = {
    1: lambda t: 2 / math.pi * math.atan2(1, t),
    2: lambda t: 2 / (math.sqrt(2 + t * t) * (math.sqrt(2 + t * t) + t)),
    3: lambda t: 2 / math.pi * (math.atan2(math.sqrt(3), t) - math.sqrt(3) * t / (3 + t * t)),
}


@pytest.mark.parametrize("freedom", TAILS)
@pytest.mark.parametrize("t", [1e-9, 1e-3, 0.5, 1.0, 1.7, 2.0, 5.0, 30.0, 1e3])
def test_tails_of_t_equal_their_closed_forms(freedom, t):
    found = paired_t(values_of(freedom + 1, t))
    assert found.p == pytest.approx(TAILS[freedom](found.difference / found.standard_error), rel=1e-6)


@pytest.mark.parametrize("t", [1e-3, 0.5, 1.7, 5.0])
def test_tails_of_t_of_many_values_are_normal(t):
    found = paired_t(values_of(1_000_001, t))
    assert found.p == pytest.approx(math.erfc(found.difference / found.standard_error / math.sqrt(2)), rel=1e-3)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (100, 1.984), (1_000_000, 1.960)],
)
def test_intervals_reach_as_far_as_tables_of_t_say(freedom, quantile):
    """NIST/SEMATECH e-Handbook of Statistical Methods, Section 1.3.6.7.2: 97.5% quantiles."""
    found = paired_t(values_of(freedom + 1, 0.5))
    assert (found.high - found.low) / 2 / found.standard_error == pytest.approx(quantile, abs=5e-4)


def test_t_without_an_error():
    assert paired_t([0.25] * 4) == Comparison(0.25, 0.0, 0.25, 0.25, 0.0)
    assert paired_t(np.zeros(3)) == Comparison(0.0, 0.0, 0.0, 0.0, 1.0)
    assert paired_t([1.0, 1.0 + 1e-15]).p < 1e-14
    assert paired_t([1.0, -1.0]).p == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_t_ends_where_numbers_do():
    assert math.isnan(paired_t([1e308, 1e308, 1e308]).p)


@pytest.mark.parametrize(
    ("values", "said"),
    [([0.1], r"\(1,\)"), ([], r"\(0,\)"), ([[0.1, 0.2]], r"\(1, 2\)"), ([0.1, math.nan], "difference 1 is nan")],
)
def test_t_refuses_what_it_cannot_tell(values, said):
    with pytest.raises(ValueError, match=said):
        paired_t(values)


def null_splits(seed, test_ratio):
    """Of two equal models the differences on the test rows of random splits of the same 90 rows, 10 of them each."""
    random = np.random.RandomState(seed)
    rows = random.randn(90)
    return paired_t([random.permutation(rows)[:10].mean() for _ in range(5)], test_ratio)


def test_splits_of_the_same_rows_do_not_look_different_too_often():
    uncorrected, corrected = (
        np.mean([null_splits(seed, ratio).p < 0.05 for seed in range(1000)]) for ratio in (0.0, 10 / 80)
    )
    assert uncorrected > 0.08
    # Three and a half standard deviations above 0.05.
    assert corrected < 0.074


def test_shared_rows_widen_the_interval():
    values = [0.1, 0.3, 0.2, 0.5]
    plain, corrected = paired_t(values), paired_t(values, 0.25)
    assert corrected.standard_error == pytest.approx(plain.standard_error * math.sqrt(2))
    assert corrected.difference == plain.difference
    statistic = plain.difference / plain.standard_error / math.sqrt(2)
    assert corrected.p == pytest.approx(TAILS[3](statistic))
    with pytest.raises(ValueError, match=r"test_ratio is -0\.1"):
        paired_t(values, -0.1)


def squared(labels, probabilities):
    return float(np.mean((labels - probabilities) ** 2))


def null_delong(seed):
    return delong(*two_models(200, seed))


def null_bootstrap(seed):
    return paired_bootstrap(*two_models(100, seed), squared, resamples=199, seed=seed)


def null_t(seed):
    return paired_t(np.random.RandomState(seed).randn(5))


@pytest.mark.parametrize(("test", "runs"), [(null_delong, 1000), (null_bootstrap, 300), (null_t, 1000)])
def test_one_in_twenty_of_equal_models_looks_different(test, runs):
    found = [test(seed) for seed in range(runs)]
    # Three and a half standard deviations of a count of such chances.
    slack = 3.5 * math.sqrt(0.05 * 0.95 / runs)
    assert np.mean([each.p <= 0.05 for each in found]) == pytest.approx(0.05, abs=slack)
    assert np.mean([each.low <= 0 <= each.high for each in found]) == pytest.approx(0.95, abs=slack)
    # Small p are as seldom as they say, and large ones as frequent.
    assert np.mean([each.p <= 0.5 for each in found]) == pytest.approx(0.5, abs=3.5 * math.sqrt(0.25 / runs))


def test_intervals_hold_a_difference_that_there_is():
    """Of normal scores that clicks are some deviations above: their AUC is known."""
    true = stats.norm.cdf(1.0 / math.sqrt(2)) - stats.norm.cdf(0.5 / math.sqrt(2))
    held, power, runs = 0, 0, 500
    for seed in range(runs):
        random = np.random.RandomState(seed)
        labels, common = np.repeat([0, 1], 150), random.randn(300)
        first, second = (gap * labels + 0.6 * common + 0.8 * random.randn(300) for gap in (1.0, 0.5))
        found = delong(labels, first, second)
        held += found.low <= true <= found.high
        power += found.p < 0.05 and found.difference > 0
    assert held / runs == pytest.approx(0.95, abs=3.5 * math.sqrt(0.05 * 0.95 / runs))
    assert power / runs > 0.7
