"""AUC within groups of rows, such as those of a user, weighted by the number of rows."""

from typing import Any

import numpy as np
import pyarrow as pa

from flip_hf.metrics.auc import midranks
from flip_hf.metrics.base import ClickMetric


def group_aucs(labels: np.ndarray, probabilities: np.ndarray, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Computes the AUC within each group of rows.

    Groups whose labels are all the same have no AUC and are left out. Rows without a group are left out too, because
    together they would mix rows of different users.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: click probabilities (rows,).
        groups: the group of each row, integers or strings (rows,), in any order. None, NaN and masked values are
            missing groups.

    Returns:
        The AUC of each group with both labels, float64 (groups,), and the number of its rows, int64 (groups,).

    Raises:
        ValueError: the numbers of groups and rows differ.
    """
    if len(groups) != len(labels):
        raise ValueError(f"{len(groups)} groups are given for {len(labels)} rows; pass one group for each row")
    encoded = pa.array(groups, from_pandas=True).dictionary_encode()
    has_group = encoded.is_valid().to_numpy(zero_copy_only=False)
    places = encoded.indices.drop_null().to_numpy().astype(np.int64)
    clicks, probabilities = labels[has_group].astype(bool), probabilities[has_group]
    rows = np.bincount(places)
    scores, score_places = np.unique(probabilities, return_inverse=True)
    # Sorted by group, then by score: the rank within a group is the overall rank minus the rows of earlier groups.
    ranks = midranks(places * len(scores) + score_places) - (rows.cumsum() - rows)[places]
    num_clicks = np.bincount(places, clicks, len(rows))
    num_others = rows - num_clicks
    rank_sums = np.bincount(places, ranks * clicks, len(rows))
    both = (num_clicks > 0) & (num_others > 0)
    areas = (rank_sums - num_clicks * (num_clicks + 1) / 2)[both] / (num_clicks * num_others)[both]
    return areas, rows[both]


def gauc(labels: np.ndarray, probabilities: np.ndarray, groups: Any) -> float:
    """Mean of the AUC within groups, such as users, weighted by the groups' rows.

    It measures how well a model orders the rows of one user, and ignores how it orders users. Source: Zhou et al., Deep
    Interest Network, KDD 2018, Section "Metrics". Arguments, errors and exclusions as in `group_aucs`.

    Returns:
        The weighted mean; NaN if no group has both labels.
    """
    areas, rows = group_aucs(labels, probabilities, groups)
    return float(np.average(areas, weights=rows)) if len(areas) else float("nan")


GAUC = ClickMetric(gauc, "GAUC", needs="groups", citation="Zhou et al., Deep Interest Network, KDD 2018")
