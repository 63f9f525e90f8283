"""Metrics of click prediction. To add one: write the function, add its line to `METRICS`."""

from collections.abc import Callable

import numpy as np


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a random click scores above a random other row, ties counting half.

    NaN where the labels are all the same: nothing can be ranked.
    """
    clicks = labels.astype(bool)
    num_clicks = int(clicks.sum())
    num_others = len(labels) - num_clicks
    if num_clicks == 0 or num_others == 0:
        return float("nan")
    _, places, sizes = np.unique(probabilities, return_inverse=True, return_counts=True)
    # Rows with the same score share the mean of their ranks, counted from 1.
    ranks = (sizes.cumsum() - (sizes - 1) / 2)[places]
    return float((ranks[clicks].sum() - num_clicks * (num_clicks + 1) / 2) / (num_clicks * num_others))


def logloss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels, in nats; probabilities are kept 1e-7 away from 0 and 1."""
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(labels.astype(bool), np.log(clipped), np.log1p(-clipped))))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"auc": auc, "logloss": logloss}


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """All of `METRICS`.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: of a click (rows,).
    """
    return {name: metric(labels, probabilities) for name, metric in METRICS.items()}
