"""Metrics of click prediction. To add one: write the function, add its line to `METRICS`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Of labels, 0 or 1 (rows,), and click probabilities (rows,)."""

CALIBRATION_BINS = 15


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks of values (rows,), counted from 1, float64 (rows,): rows with the same value share the mean of theirs."""
    _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (sizes.cumsum() - (sizes - 1) / 2)[places]
    return ranks


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a random click scores above a random other row, ties counting half.

    NaN where the labels are all the same: nothing can be ranked.
    """
    clicks = labels.astype(bool)
    num_clicks = int(clicks.sum())
    num_others = len(labels) - num_clicks
    if num_clicks == 0 or num_others == 0:
        return float("nan")
    rank_sum = midranks(probabilities)[clicks].sum()
    return float((rank_sum - num_clicks * (num_clicks + 1) / 2) / (num_clicks * num_others))


def gauc(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray) -> float:
    """AUC among the rows of a group, such as those of a user, as a mean over groups weighted by their rows: how well a
    model orders what one user sees, whatever it says of users as a whole (Zhou et al., Deep Interest Network, KDD 2018,
    Section "Metrics").

    Groups whose labels are all the same have no AUC, and count neither as values nor as weights.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: of a click (rows,).
        groups: what tells the groups apart, integers or strings (rows,), in any order.

    Returns:
        The mean; NaN where no group has both labels.

    Raises:
        ValueError: the groups are not as many as the rows.
    """
    if len(groups) != len(labels):
        raise ValueError(f"{len(groups)} groups are given for {len(labels)} rows; give one a row")
    clicks = labels.astype(bool)
    _, places, rows = np.unique(groups, return_inverse=True, return_counts=True)
    scores, score_places = np.unique(probabilities, return_inverse=True)
    # Ordered by group, then by score: a rank among all rows is one in the group, and the rows of the groups before it.
    ranks = midranks(places * len(scores) + score_places) - (rows.cumsum() - rows)[places]
    num_clicks = np.bincount(places, clicks, len(rows))
    num_others = rows - num_clicks
    rank_sums = np.bincount(places, ranks * clicks, len(rows))
    both = (num_clicks > 0) & (num_others > 0)
    if not both.any():
        return float("nan")
    areas = (rank_sums - num_clicks * (num_clicks + 1) / 2)[both] / (num_clicks * num_others)[both]
    return float(np.average(areas, weights=rows[both]))


def logloss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels, in nats; probabilities are kept 1e-7 away from 0 and 1."""
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(labels.astype(bool), np.log(clipped), np.log1p(-clipped))))


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of like probability.

    Attributes:
        rows: how many they are.
        probability: the mean of their probabilities.
        click_rate: the share of clicks among them.
    """

    rows: int
    probability: float
    click_rate: float


def calibration_bins(
    labels: np.ndarray, probabilities: np.ndarray, num_bins: int = CALIBRATION_BINS
) -> list[CalibrationBin]:
    """The rows, sorted by probability and cut into bins of as many rows each: what a reliability diagram draws.

    Fewer bins where there are fewer rows.
    """
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if len(part)]
    return [CalibrationBin(len(part), float(probabilities[part].mean()), float(labels[part].mean())) for part in parts]


def ece(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error: how far the click rate is from the mean probability, over 15 bins of as many rows
    each (Nguyen and O'Connor 2015, Section 3: bins of equal size).
    """
    bins = calibration_bins(labels, probabilities)
    return sum(b.rows * abs(b.probability - b.click_rate) for b in bins) / len(labels)


METRICS: dict[str, Metric] = {"auc": auc, "logloss": logloss, "ece": ece}


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """All of `METRICS`.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: of a click (rows,).
    """
    return {name: metric(labels, probabilities) for name, metric in METRICS.items()}


def bootstrap_intervals(
    labels: np.ndarray, probabilities: np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """A confidence interval for each of `METRICS`: percentiles over resamples of the rows (Efron and Tibshirani 1993,
    Chapter 13).

    It says what other rows of the same log would change, not what another training run would. ECE's lies too high: in a
    resample each bin is noisier than in the rows.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: of a click (rows,).
        level: the share of the intervals that shall hold the value over all such rows.
        resamples: how many; time grows with them and with the rows.
        seed: of the resamples.

    Returns:
        The lower and upper bound by metric, NaN where a metric never had a value.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(resamples):
        rows = random.integers(len(labels), size=len(labels))
        for name, value in compute_metrics(labels[rows], probabilities[rows]).items():
            values[name].append(value)
    tails = [50 * (1 - level), 50 * (1 + level)]
    intervals = {}
    for name, found in values.items():
        known = [value for value in found if not np.isnan(value)]
        low, high = np.percentile(known, tails) if known else (float("nan"), float("nan"))
        intervals[name] = (float(low), float(high))
    return intervals
