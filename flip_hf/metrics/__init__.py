"""Metrics of click prediction, as functions of arrays and as metrics of the `evaluate` library (`load`)."""

from typing import Any

import numpy as np

from flip_hf.metrics.auc import AUC
from flip_hf.metrics.base import ClickMetric
from flip_hf.metrics.ece import ECE
from flip_hf.metrics.gauc import GAUC
from flip_hf.metrics.logloss import LOGLOSS
from flip_hf.metrics.relaimpr import RELAIMPR
from flip_hf.metrics.uauc import UAUC

METRICS: dict[str, ClickMetric] = {
    "auc": AUC,
    "logloss": LOGLOSS,
    "ece": ECE,
    "gauc": GAUC,
    "uauc": UAUC,
    "relaimpr": RELAIMPR,
}
"""The metrics by their names in logs, records and cards. To add one, write a file in this folder and add a line."""


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray, groups: Any = None) -> dict[str, float]:
    """Computes all of `METRICS` for which the inputs are given.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: click probabilities (rows,).
        groups: the group of each row, such as its user, as in `flip_hf.metrics.gauc.group_aucs`. Without it, the
            metrics that need groups are left out.

    Returns:
        The values by the metric's name.
    """
    results = {}
    for name, metric in METRICS.items():
        if metric.needs is None:
            results[name] = metric.function(labels, probabilities)
        elif metric.needs == "groups" and groups is not None:
            results[name] = metric.function(labels, probabilities, groups)
    return results


def load(name: str, **kwargs: Any) -> Any:
    """Loads one of `METRICS` as a metric of the `evaluate` library, without using the network.

    `load("gauc").compute(predictions=..., references=..., groups=...)` returns `{"gauc": value}`. `predictions` are
    click probabilities, `references` are labels, 0 or 1. GAUC and UAUC also take `groups`: integers or strings, without
    missing values. RelaImpr also takes `base_predictions`, the click probabilities of the base model.

    Args:
        name: name of the metric.
        kwargs: as in `evaluate.load`, such as `keep_in_memory`, `num_process` or `experiment_id`.

    Returns:
        An `evaluate.Metric`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"{name!r} is not one of the metrics {', '.join(METRICS)}")
    # Imported here, because importing `evaluate` takes a second.
    from flip_hf.metrics.evaluate_metric import EvaluateMetric

    return EvaluateMetric(config_name=name, **kwargs)
