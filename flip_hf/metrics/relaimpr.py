"""Relative improvement of AUC over a base model."""

import numpy as np

from flip_hf.metrics.auc import auc
from flip_hf.metrics.base import ClickMetric


def relaimpr(labels: np.ndarray, probabilities: np.ndarray, base_probabilities: np.ndarray) -> float:
    """Relative improvement of AUC over a base model: `(AUC - 0.5) / (base AUC - 0.5) - 1`.

    An AUC of 0.5, that of a random order, counts as zero. Sources: Yan et al., Coupled Group Lasso, ICML 2014; Zhou et
    al., Deep Interest Network, KDD 2018, Section "Metrics".

    Args:
        labels: 0 or 1 (rows,).
        probabilities: click probabilities (rows,).
        base_probabilities: the base model's click probabilities (rows,).

    Returns:
        The improvement, such as 0.1 for ten percent, and 0 for equal AUCs. NaN if all labels are the same or the base
        model's AUC is 0.5.
    """
    gained, base = auc(labels, probabilities) - 0.5, auc(labels, base_probabilities) - 0.5
    return gained / base - 1 if base else float("nan")


RELAIMPR = ClickMetric(
    relaimpr, "RelaImpr", needs="base_probabilities", citation="Yan et al., Coupled Group Lasso, ICML 2014"
)
