"""Metrics against scikit-learn, and through the evaluate library."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from flip_hf.training.click_metrics import ClickMetrics
from flip_hf.training.loop import Goal
from flip_hf.training.metrics import METRICS, auc, bootstrap_intervals, calibration_bins, compute_metrics, ece, logloss


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2, max_size=80))
def test_metrics_equal_those_of_scikit_learn(rows):
    labels = np.array([y for y, _ in rows]).astype(int)
    probabilities = np.array([p for _, p in rows]) / 20
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    assert logloss(labels, probabilities) == pytest.approx(log_loss(labels, clipped, labels=[0, 1]), abs=1e-9)
    if len(set(labels)) == 2:
        assert auc(labels, probabilities) == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)
    else:
        assert np.isnan(auc(labels, probabilities))


def test_evaluate_metric_gives_the_same():
    random = np.random.RandomState(0)
    labels, probabilities = random.randint(0, 2, 50), random.rand(50)
    found = ClickMetrics(keep_in_memory=True).compute(predictions=probabilities, references=labels)
    assert found == pytest.approx(compute_metrics(labels, probabilities))
    assert set(found) == set(METRICS)


def test_ece_and_the_bins_it_is_made_of():
    labels = np.array([0, 0, 0, 1] * 15)
    probabilities = np.repeat(np.linspace(0.1, 0.8, 15), 4)
    bins = calibration_bins(labels, probabilities)
    assert [b.rows for b in bins] == [4] * 15
    assert [b.click_rate for b in bins] == [0.25] * 15
    assert ece(labels, probabilities) == pytest.approx(np.abs(np.linspace(0.1, 0.8, 15) - 0.25).mean())
    assert ece(labels[:3], probabilities[:3]) == pytest.approx(0.1), "fewer rows than bins"


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=80))
def test_bins_hold_every_row_once(rows):
    labels, probabilities = np.array([y for y, _ in rows]).astype(int), np.array([p for _, p in rows])
    bins = calibration_bins(labels, probabilities)
    assert sum(b.rows for b in bins) == len(rows)
    assert sum(b.rows * b.click_rate for b in bins) == pytest.approx(labels.sum())
    assert sum(b.rows * b.probability for b in bins) == pytest.approx(probabilities.sum())
    assert 0 <= ece(labels, probabilities) <= 1


def by_theory(interval, mean, error):
    assert interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)


def test_intervals_hold_what_theory_says():
    random = np.random.RandomState(1)
    probabilities = random.rand(2000)
    labels = (random.rand(2000) < probabilities).astype(int)
    found = bootstrap_intervals(labels, probabilities)
    assert found == bootstrap_intervals(labels, probabilities), "the same seed, the same intervals"

    losses = -np.where(labels, np.log(probabilities), np.log1p(-probabilities))
    error = losses.std() / np.sqrt(len(losses))
    assert found["logloss"] == pytest.approx(
        (losses.mean() - 1.96 * error, losses.mean() + 1.96 * error), abs=0.2 * error
    )
    # DeLong, DeLong and Clarke-Pearson 1988.
    above = (probabilities[labels == 1][:, None] > probabilities[labels == 0]).astype(float)
    error = np.sqrt(above.mean(1).var(ddof=1) / len(above) + above.mean(0).var(ddof=1) / above.shape[1])
    by_theory(found["auc"], above.mean(), error)

    assert np.isnan(bootstrap_intervals(np.ones(5, int), np.full(5, 0.5), resamples=3)["auc"]).all()


def test_the_best_is_never_nothing():
    goal = Goal("auc", larger_is_better=True)
    nan = float("nan")
    assert goal.better(nan, None), "the first model is kept whatever it is worth"
    assert goal.better(0.4, nan)
    assert not goal.better(nan, 0.4)
    assert goal.better(0.5, 0.4)
    assert not goal.better(0.4, 0.4)
    assert Goal("loss", larger_is_better=False).better(0.3, 0.4)
