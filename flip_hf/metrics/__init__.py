"""Metrics of click prediction: functions of arrays, and the same for users of the `evaluate` library (`load`)."""

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
"""The metrics by their names in logs, records and cards. To add one: a file of this folder, and its line here."""


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray, groups: Any = None) -> dict[str, float]:
    """All of `METRICS` that the inputs suffice for, by their names.

    Args:
        labels: 0 or 1 (rows,).
        probabilities: of a click (rows,).
        groups: the group of each row, such as its user, as in `flip_hf.metrics.gauc.group_aucs`; without it the metrics
            that need groups are left out.
    """
    results = {}
    for name, metric in METRICS.items():
        if metric.needs is None:
            results[name] = metric.function(labels, probabilities)
        elif metric.needs == "groups" and groups is not None:
            results[name] = metric.function(labels, probabilities, groups)
    return results


def load(name: str, **kwargs: Any) -> Any:
    """One of `METRICS` as a metric of the `evaluate` library, without the network.

    `load("gauc").compute(predictions=..., references=..., groups=...)` returns `{"gauc": value}`. `predictions` are
    click probabilities, `references` are labels, 0 or 1. GAUC and UAUC also take `groups`, whole numbers or strings,
    none of them missing; RelaImpr also takes `base_predictions`, the click probabilities of the base model.

    Args:
        name: of the metric.
        kwargs: as in `evaluate.load`, such as `keep_in_memory`, `num_process` or `experiment_id`.

    Returns:
        An `evaluate.Metric`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"{name!r} is not one of the metrics {', '.join(METRICS)}")
    # The library takes a second to import.
    from flip_hf.metrics.evaluate_metric import EvaluateMetric

    return EvaluateMetric(config_name=name, **kwargs)
