"""LogLoss, the binary cross-entropy."""

import numpy as np

from flip_hf.metrics.base import ClickMetric


def logloss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels, in nats; probabilities are clipped to [1e-7, 1 - 1e-7].

    Args:
        labels: 0 or 1 (rows,).
        probabilities: click probabilities (rows,).
    """
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(labels.astype(bool), np.log(clipped), np.log1p(-clipped))))


LOGLOSS = ClickMetric(logloss, "LogLoss")
