"""Confidence intervals of metrics."""

import numpy as np

from flip_hf.metrics import compute_metrics


def bootstrap_intervals(
    labels: np.ndarray, probabilities: np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Computes a bootstrap confidence interval for each metric of `compute_metrics`.

    The bounds are percentiles over resamples of the rows (Efron and Tibshirani 1993, Chapter 13). They show the effect
    of other rows of the same log, not of another training run. The intervals of ECE are too high, because the bins of a
    resample are noisier than those of the rows.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: click probabilities (rows,).
        level: confidence level.
        resamples: number of resamples; the time grows with it and with the number of rows.
        seed: random seed of the resamples.

    Returns:
        The lower and upper bound by metric, NaN for a metric that never had a value.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    values: dict[str, list[float]] = {}
    for _ in range(resamples):
        rows = random.integers(len(labels), size=len(labels))
        for name, value in compute_metrics(labels[rows], probabilities[rows]).items():
            values.setdefault(name, []).append(value)
    tails = [50 * (1 - level), 50 * (1 + level)]
    intervals = {}
    for name, found in values.items():
        known = [value for value in found if not np.isnan(value)]
        low, high = np.percentile(known, tails) if known else (float("nan"), float("nan"))
        intervals[name] = (float(low), float(high))
    return intervals
