"""Calibration: whether rows with a probability of 0.3 are clicked 3 times in 10."""

from dataclasses import dataclass

import numpy as np

from flip_hf.metrics.base import ClickMetric

CALIBRATION_BINS = 15


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

    Args:
        labels: 0 or 1 (rows,).
        probabilities: of a click (rows,).
        num_bins: how many bins.
    """
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if len(part)]
    return [CalibrationBin(len(part), float(probabilities[part].mean()), float(labels[part].mean())) for part in parts]


def ece(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error: how far the click rate is from the mean probability, over 15 bins of as many rows
    each (Nguyen and O'Connor 2015, Section 3: bins of equal size).

    Args:
        labels: 0 or 1 (rows,).
        probabilities: of a click (rows,).
    """
    bins = calibration_bins(labels, probabilities)
    return sum(b.rows * abs(b.probability - b.click_rate) for b in bins) / len(labels)


ECE = ClickMetric(ece, "ECE", citation="Nguyen and O'Connor, EMNLP 2015, arXiv 1508.05154")
