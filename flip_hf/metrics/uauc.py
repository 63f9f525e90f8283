"""AUC among the rows of a user, every user counting alike."""

from typing import Any

import numpy as np

from flip_hf.metrics.base import ClickMetric
from flip_hf.metrics.gauc import group_aucs


def uauc(labels: np.ndarray, probabilities: np.ndarray, groups: Any) -> float:
    """AUC among the rows of a group, such as those of a user, as a plain mean over the groups: unlike in `gauc`, a user
    with few rows counts as much as one with many.

    Zhang et al., CoLLM, arXiv 2310.19488. Arguments, errors and what is left out are as in
    `flip_hf.metrics.gauc.group_aucs`.

    Returns:
        The mean; NaN where no group has both labels.
    """
    areas, _ = group_aucs(labels, probabilities, groups)
    return float(np.mean(areas)) if len(areas) else float("nan")


UAUC = ClickMetric(uauc, "UAUC", needs="groups", citation="Zhang et al., CoLLM, arXiv 2310.19488")
