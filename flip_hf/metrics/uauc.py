"""AUC within users, with the same weight for every user."""

from typing import Any

import numpy as np

from flip_hf.metrics.base import ClickMetric
from flip_hf.metrics.gauc import group_aucs


def uauc(labels: np.ndarray, probabilities: np.ndarray, groups: Any) -> float:
    """Mean of the AUC within groups, such as users, with the same weight for each group.

    Unlike in `gauc`, a user with few rows counts as much as one with many. Source: Zhang et al., CoLLM, arXiv
    2310.19488. Arguments, errors and exclusions as in `flip_hf.metrics.gauc.group_aucs`.

    Returns:
        The mean; NaN if no group has both labels.
    """
    areas, _ = group_aucs(labels, probabilities, groups)
    return float(np.mean(areas)) if len(areas) else float("nan")


UAUC = ClickMetric(uauc, "UAUC", needs="groups", citation="Zhang et al., CoLLM, arXiv 2310.19488")
