"""A metric for users of the `evaluate` library; `flip_hf.metrics.load` makes it."""

from typing import Any

import datasets
import evaluate
import numpy as np

from flip_hf.metrics import METRICS

_LABELS_AND_CLICKS = {"predictions": datasets.Value("float64"), "references": datasets.Value("int8")}
# What the library calls the third input, and the types that it may have; the first that fits is taken.
_THIRD_INPUTS = {
    "groups": ("groups", [datasets.Value("string"), datasets.Value("int64")]),
    "base_probabilities": ("base_predictions", [datasets.Value("float64")]),
}


class EvaluateMetric(evaluate.Metric):
    """One of `METRICS`, whose name is `config_name`."""

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
            # The library lets None through in some places of a column, and not in others.
            if None in values:
                raise ValueError(f"{name}: row {values.index(None)} has none; leave out the rows without one")
        inputs = [np.asarray(values) for values in (references, predictions, *third.values())]
        return {self.config_name: METRICS[self.config_name].function(*inputs)}
