"""The metrics for users of the `evaluate` library.

Not imported by the scripts: a script called `evaluate.py` hides the library of that name from its own process.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from flip_hf.metrics.functions import compute_metrics


class ClickMetrics(evaluate.Metric):
    """All of `METRICS`: `ClickMetrics().compute(predictions=probabilities, references=labels)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Metrics of click-through-rate prediction.",
            citation="",
            inputs_description="predictions: click probabilities in [0, 1]; references: labels, 0 or 1",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int8")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return compute_metrics(np.asarray(references), np.asarray(predictions))
