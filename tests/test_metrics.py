"""Metrics against scikit-learn, and through the evaluate library."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from flip_hf.training.click_metrics import ClickMetrics
from flip_hf.training.loop import Goal
from flip_hf.training.metrics import METRICS, auc, compute_metrics, logloss


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


def test_the_best_is_never_nothing():
    goal = Goal("auc", larger_is_better=True)
    nan = float("nan")
    assert goal.better(nan, None), "the first model is kept whatever it is worth"
    assert goal.better(0.4, nan)
    assert not goal.better(nan, 0.4)
    assert goal.better(0.5, 0.4)
    assert not goal.better(0.4, 0.4)
    assert Goal("loss", larger_is_better=False).better(0.3, 0.4)
