"""Calibration error: the difference between predicted probabilities and observed click rates."""

from dataclasses import dataclass

import numpy as np

from flip_hf.metrics.base import ClickMetric

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of similar probability.

    Attributes:
        rows: number of rows.
        probability: mean of their probabilities.
        click_rate: share of clicks among them.
    """

    rows: int
    probability: float
    click_rate: float


def calibration_bins(
    labels: np.ndarray, probabilities: np.ndarray, num_bins: int = CALIBRATION_BINS
) -> list[CalibrationBin]:
    """Sorts rows by probability and cuts them into bins of equally many rows, as for a reliability diagram.

    If there are fewer rows than bins, there are fewer bins.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: click probabilities (rows,).
        num_bins: number of bins.
    """
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if len(part)]
    return [CalibrationBin(len(part), float(probabilities[part].mean()), float(labels[part].mean())) for part in parts]


def ece(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error: the mean distance of click rate and mean probability over 15 bins of equal size.

    Source: Nguyen and O'Connor 2015, Section 3.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: click probabilities (rows,).
    """
    bins = calibration_bins(labels, probabilities)
    return sum(b.rows * abs(b.probability - b.click_rate) for b in bins) / len(labels)


ECE = ClickMetric(ece, "ECE", citation="Nguyen and O'Connor, EMNLP 2015, arXiv 1508.05154")
