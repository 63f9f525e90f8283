"""Which model is the best one."""

import json
import logging
import math
from dataclasses import asdict

import numpy as np
import pytest

from flip_hf.standard_json import measures_json
from flip_hf.training.loop import Goal, Progress, click_goal

NAN = math.nan


@pytest.mark.parametrize(
    ("value", "best", "is_better"),
    [
        (0.5, None, True),
        (NAN, None, True),
        (0.6, 0.5, True),
        (0.5, 0.5, False),
        (0.4, 0.5, False),
        (NAN, 0.5, False),
        (0.5, NAN, True),
        (NAN, NAN, False),
    ],
)
def test_nan_beats_no_number(value, best, is_better):
    assert Goal("auc", larger_is_better=True).better(value, best) == is_better
    # With the signs turned, the smaller one.
    turned = [None if x is None else -x for x in (value, best)]
    assert Goal("loss", larger_is_better=False).better(*turned) == is_better


@pytest.mark.parametrize("label", [0, 1])
def test_logloss_is_the_goal_where_all_labels_are_the_same(caplog, label):
    labels = np.full(7, label, np.float32)
    with caplog.at_level(logging.WARNING):
        assert click_goal(labels) == Goal("logloss", larger_is_better=False)
        assert f"all 7 validation rows have the label {label}, so AUC is undefined" in caplog.text
        caplog.clear()
        labels[3] = 1 - label
        assert click_goal(labels) == Goal("auc", larger_is_better=True)
    assert caplog.messages == []


def test_progress_survives_json_with_a_metric_that_has_no_value():
    progress = Progress(step=3, best={"auc": NAN, "logloss": 0.25}, best_step=2)
    again = Progress.of(json.loads(measures_json(asdict(progress))))
    assert math.isnan(again.best.pop("auc"))
    assert again.best == {"logloss": 0.25}
    assert (again.step, again.best_step, again.meter) == (3, 2, progress.meter)
