"""Metrics for the `evaluate` library; `flip_hf.metrics.load` creates them."""

from typing import Any

import datasets
import evaluate
import numpy as np

from flip_hf.metrics import METRICS

_LABELS_AND_CLICKS = {"predictions": datasets.Value("float64"), "references": datasets.Value("int8")}
# The library's name for the third input, and its possible types; the first type that fits is used.
_THIRD_INPUTS = {
    "groups": ("groups", [datasets.Value("string"), datasets.Value("int64")]),
    "base_probabilities": ("base_predictions", [datasets.Value("float64")]),
}


class EvaluateMetric(evaluate.Metric):
    """One of `METRICS`; `config_name` is its name."""

    def _info(self) -> evaluate.MetricInfo:
        metric = METRICS[self.config_name]
        features = [datasets.Features(_LABELS_AND_CLICKS)]
        if metric.needs is not None:
            name, types = _THIRD_INPUTS[metric.needs]
            features = [datasets.Features({**_LABELS_AND_CLICKS, name: kind}) for kind in types]
        return evaluate.MetricInfo(
            description=f"{metric.title} of click prediction.\n{metric.function.__doc__}",
            citation=metric.citation,
            inputs_description="predictions: click probabilities in [0, 1]; references: labels, 0 or 1",
            features=features,
        )

    def _compute(self, predictions: Any, references: Any, **third: Any) -> dict[str, float]:
        for name, values in third.items():
            # The library rejects None in some places of a column only.
            if None in values:
                raise ValueError(f"{name}: row {values.index(None)} has no value; leave out rows without one")
        inputs = [np.asarray(values) for values in (references, predictions, *third.values())]
        return {self.config_name: METRICS[self.config_name].function(*inputs)}
