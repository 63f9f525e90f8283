"""Area under the ROC curve."""

import numpy as np

from flip_hf.metrics.base import ClickMetric


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks of values, counted from 1, float64 (rows,); equal values get the mean of their ranks."""
    _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (sizes.cumsum() - (sizes - 1) / 2)[places]
    return ranks


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a random click scores above a random non-click; ties count half.

    NaN if all labels are the same.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: click probabilities (rows,).
    """
    clicks = labels.astype(bool)
    num_clicks = int(clicks.sum())
    num_others = len(labels) - num_clicks
    if num_clicks == 0 or num_others == 0:
        return float("nan")
    rank_sum = midranks(probabilities)[clicks].sum()
    return float((rank_sum - num_clicks * (num_clicks + 1) / 2) / (num_clicks * num_others))


AUC = ClickMetric(auc, "AUC")
