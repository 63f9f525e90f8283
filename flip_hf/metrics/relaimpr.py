"""How much of the distance from a random order another model's AUC was improved by."""

import numpy as np

from flip_hf.metrics.auc import auc
from flip_hf.metrics.base import ClickMetric


def relaimpr(labels: np.ndarray, probabilities: np.ndarray, base_probabilities: np.ndarray) -> float:
    """Relative improvement of AUC over a base model's, where a random order's 0.5 counts as nothing:
    `(AUC - 0.5) / (base AUC - 0.5) - 1`.

    Yan et al., Coupled Group Lasso, ICML 2014; Zhou et al., Deep Interest Network, KDD 2018, Section "Metrics".

    Args:
        labels: 0 or 1 (rows,).
        probabilities: of a click (rows,).
        base_probabilities: the base model's (rows,).

    Returns:
        The improvement, 0 where the two AUCs are equal and 0.1 for one tenth; NaN where the labels are all the same or
        the base model's AUC is 0.5.
    """
    gained, base = auc(labels, probabilities) - 0.5, auc(labels, base_probabilities) - 0.5
    return gained / base - 1 if base else float("nan")


RELAIMPR = ClickMetric(
    relaimpr, "RelaImpr", needs="base_probabilities", citation="Yan et al., Coupled Group Lasso, ICML 2014"
)
