"""AUC among the rows of a group, such as those of a user, weighted by the group's rows."""

from typing import Any

import numpy as np
import pyarrow as pa

from flip_hf.metrics.auc import midranks
from flip_hf.metrics.base import ClickMetric


def group_aucs(labels: np.ndarray, probabilities: np.ndarray, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """AUC among the rows of each group.

    A group whose labels are all the same has no AUC and is left out. So are rows whose group is missing: they belong to
    no group that is known, and as one group they would compare rows of different users.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: of a click (rows,).
        groups: the group of each row, whole numbers or strings (rows,), in any order. It is missing where it is None,
            NaN or masked.

    Returns:
        The AUC of each group with both labels, float64 (groups,); and the number of its rows, int64 (groups,).

    Raises:
        ValueError: the groups are not as many as the rows.
    """
    if len(groups) != len(labels):
        raise ValueError(f"{len(groups)} groups are given for {len(labels)} rows; give one a row")
    encoded = pa.array(groups, from_pandas=True).dictionary_encode()
    has_group = encoded.is_valid().to_numpy(zero_copy_only=False)
    places = encoded.indices.drop_null().to_numpy().astype(np.int64)
    clicks, probabilities = labels[has_group].astype(bool), probabilities[has_group]
    rows = np.bincount(places)
    scores, score_places = np.unique(probabilities, return_inverse=True)
    # Ordered by group, then by score: a rank among all rows is one in the group, and the rows of the groups before it.
    ranks = midranks(places * len(scores) + score_places) - (rows.cumsum() - rows)[places]
    num_clicks = np.bincount(places, clicks, len(rows))
    num_others = rows - num_clicks
    rank_sums = np.bincount(places, ranks * clicks, len(rows))
    both = (num_clicks > 0) & (num_others > 0)
    areas = (rank_sums - num_clicks * (num_clicks + 1) / 2)[both] / (num_clicks * num_others)[both]
    return areas, rows[both]


def gauc(labels: np.ndarray, probabilities: np.ndarray, groups: Any) -> float:
    """AUC among the rows of a group, such as those of a user, as a mean over groups weighted by their rows: how well a
    model orders what one user sees, whatever it says of users as a whole.

    Zhou et al., Deep Interest Network, KDD 2018, Section "Metrics". Arguments, errors and what is left out are as in
    `group_aucs`.

    Returns:
        The mean; NaN where no group has both labels.
    """
    areas, rows = group_aucs(labels, probabilities, groups)
    return float(np.average(areas, weights=rows)) if len(areas) else float("nan")


GAUC = ClickMetric(gauc, "GAUC", needs="groups", citation="Zhou et al., Deep Interest Network, KDD 2018")
