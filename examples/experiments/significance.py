"""Tests whether one model is better than another.

`delong` and `paired_bootstrap` compare two models on the same rows, and assume that the rows are independent: they
account for the choice of rows. `paired_t` compares two ways to train over several seeds: it accounts for the training
runs, or for the splits.

Sources: DeLong, DeLong and Clarke-Pearson, Comparing the Areas under Two or More Correlated Receiver Operating
Characteristic Curves, Biometrics 44(3), 1988; Sun and Xu, Fast Implementation of DeLong's Algorithm for Comparing the
Areas Under Correlated Receiver Operating Characteristic Curves, IEEE Signal Processing Letters 21(11), 2014; Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, Chapter 13; Davison and Hinkley, Bootstrap Methods and Their
Application, 1997, Chapter 4; Student, The Probable Error of a Mean, Biometrika 6(1), 1908; Nadeau and Bengio, Inference
for the Generalization Error, Machine Learning 52, 2003.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from flip_hf.metrics.auc import midranks

_LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """The difference of a metric between two models.

    Attributes:
        difference: the first model's value minus the second's.
        standard_error: the standard error of the difference.
        low: the lower bound of its confidence interval.
        high: the upper bound of its confidence interval.
        p: the two-sided p-value for the hypothesis that there is no difference.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p: float


def delong(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> Comparison:
    """The difference of two models' AUCs on the same rows, by the normal approximation of DeLong et al. (1988)
    and from midranks (Sun and Xu 2014), in O(rows log rows); ties count half.

    With a standard error of 0, p is 1 for no difference and 0 for any other.

    Args:
        labels: 0 or 1 (rows,).
        first: scores of a model, logits or probabilities (rows,).
        second: another's (rows,).

    Returns:
        With a 95% interval.

    Raises:
        ValueError: a score is NaN, the arrays differ in shape, or there are fewer than two clicks or two other rows,
            from which no variance can be told.
    """
    clicks = _checked(labels, first, second)
    num_clicks, num_others = int(clicks.sum()), int((~clicks).sum())
    if min(num_clicks, num_others) < 2:
        raise ValueError(
            f"the labels have {num_clicks} clicks and {num_others} other rows; DeLong's test needs two of each"
        )
    # Counts are whole or half and their sums exact, so that what cancels gives 0: they are divided at the end.
    below, above = (a - b for a, b in zip(_wins(clicks, first), _wins(clicks, second), strict=True))
    difference = float(below.sum()) / (num_clicks * num_others)
    variance = below.var(ddof=1) / num_others**2 / num_clicks + above.var(ddof=1) / num_clicks**2 / num_others
    error = math.sqrt(variance)
    reach = float(stats.norm.ppf((1 + _LEVEL) / 2)) * error
    p = 2 * float(stats.norm.sf(_ratio(abs(difference), error)))
    return Comparison(difference, error, difference - reach, difference + reach, p)


def paired_bootstrap(
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    metric: Callable[[np.ndarray, np.ndarray], float],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """The difference of any metric of two models, from resamples of the rows that are the same for both (Efron and
    Tibshirani 1993, Chapter 13).

    p is twice the smaller share of resamples whose difference is at most, or at least, 0; the rows themselves count as
    one more of these, so that p is never 0 (Davison and Hinkley 1997, Chapter 4). Resamples in which the metric has no
    value, as AUC with one label, are left out.

    Args:
        labels: 0 or 1 (rows,).
        first: click probabilities of a model (rows,).
        second: another's (rows,).
        metric: of labels and probabilities, such as `flip_hf.metrics.logloss.logloss`.
        resamples: how many; no p is below 2 / (resamples + 1).
        seed: of the resamples.
        level: of the percentile interval.

    Raises:
        ValueError: a probability is NaN, the arrays differ in shape, the level is not between 0 and 1, or the metric
            has no value on the rows, or on fewer than two resamples.
    """
    _checked(labels, first, second)
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1")
    difference = float(metric(labels, first) - metric(labels, second))
    if math.isnan(difference):
        raise ValueError("the metric has no value on these rows")
    random = np.random.Generator(np.random.PCG64(seed))
    found = np.empty(resamples)
    for i in range(resamples):
        rows = random.integers(len(labels), size=len(labels))
        found[i] = metric(labels[rows], first[rows]) - metric(labels[rows], second[rows])
    found = found[~np.isnan(found)]
    if len(found) < 2:
        raise ValueError(f"the metric has a value in {len(found)} of {resamples} resamples; at least two are needed")
    low, high = np.percentile(found, [50 * (1 - level), 50 * (1 + level)])
    tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(found) + 1))
    return Comparison(difference, float(found.std(ddof=1)), float(low), float(high), p)


def paired_t(differences: Sequence[float] | np.ndarray, test_ratio: float = 0.0) -> Comparison:
    """The mean of differences, one a seed or a split, by Student's t (1908).

    Of random splits of the same rows the differences are not independent, as their models share training rows: then
    `test_ratio` makes it the corrected resampled t-test (Nadeau and Bengio 2003), whose variance is larger by it.

    With a standard error of 0, p is 1 for no difference and 0 for any other.

    Args:
        differences: of the first's value and the second's (seeds,).
        test_ratio: test rows of a split divided by its training rows; 0 where all seeds have the same rows, or each
            has rows of its own.

    Returns:
        With a 95% interval.

    Raises:
        ValueError: there are fewer than two differences, one is not finite, or the ratio is negative.
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"the differences have the shape {values.shape}; at least two in a row are needed")
    if not np.isfinite(values).all():
        place = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"difference {place} is {values[place]}; a mean needs finite ones")
    if not test_ratio >= 0:
        raise ValueError(f"test_ratio is {test_ratio}; it is a number of rows divided by another")
    freedom = len(values) - 1
    difference, error = float(values.mean()), float(values.std(ddof=1)) * math.sqrt(1 / len(values) + test_ratio)
    reach = float(stats.t.ppf((1 + _LEVEL) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(_ratio(abs(difference), error), freedom))
    return Comparison(difference, error, difference - reach, difference + reach, p)


def _checked(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The clicks, bool (rows,)."""
    if not labels.shape == first.shape == second.shape or labels.ndim != 1:
        raise ValueError(
            f"labels {labels.shape}, first {first.shape} and second {second.shape} must have one shape, (rows,)"
        )
    for name, scores in (("first", first), ("second", second)):
        if (missing := np.isnan(scores)).any():
            raise ValueError(f"{name} is NaN in row {int(np.argmax(missing))}")
    return labels.astype(bool)


def _wins(clicks: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each click the number of other rows below it, and for each other row that of the clicks above it.

    A rank among all rows less that among the rows of the same label is what a row has of the other label below it.
    """
    ranks = midranks(scores)
    below = ranks[clicks] - midranks(scores[clicks])
    above = clicks.sum() - (ranks[~clicks] - midranks(scores[~clicks]))
    return below, above


def _ratio(distance: float, error: float) -> float:
    if error == 0:
        return math.inf if distance else 0.0
    return distance / error
