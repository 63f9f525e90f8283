"""Fitting the fusion weights on rows that the towers were not trained on."""

from collections.abc import Mapping

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F

from flip_hf.training.protocols import JointModel

_STEPS = 100
_ROWS_AT_ONCE = 1 << 16


def fit_fusion(model: JointModel, scores: Mapping[str, np.ndarray], rows: Dataset) -> dict[str, np.ndarray]:
    """Fits only the fusion parameters, which weigh the towers' logits, on labelled rows.

    The ID-based model memorises training ids, so a fusion weight that is trained along with the towers favours it too
    much. Fitting the fusion on held-out rows is stacking (Wolpert, Neural Networks 5, 1992).

    The estimate is maximum a posteriori, with a standard normal prior centred on equal weights. It does not depend on
    the parameters' previous values.

    Args:
        model: a `FlipForCTR` with both towers that accelerate has not wrapped; changed in place.
        scores: the model's arrays from `click_logits`: `id_logits`, `text_logits` and `labels`, (rows,) each.
        rows: the same rows, encoded.

    Returns:
        `scores`, with the fused `logits` of the fitted model.

    Raises:
        ValueError: the rows have no labels, or the model has only one tower.
    """
    if lacking := [name for name in ("id_logits", "text_logits", "labels") if name not in scores]:
        raise ValueError(f"the scores have no {lacking[0]}: fitting a fusion needs both towers' logits and the labels")
    # On the CPU in double precision, because devices differ in the last digits.
    found = {name: torch.from_numpy(values).double() for name, values in scores.items()}
    oov_fractions = _oov_fractions(model, rows).double()
    fusion = type(model.fusion)(oov_fractions.shape[1]).double()
    fusion.init_parameters()
    prior = [parameter.detach().clone() for parameter in fusion.parameters()]
    optimizer = torch.optim.LBFGS(fusion.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        logits = fusion(found["id_logits"], found["text_logits"], oov_fractions)
        shift = sum((p - q).square().sum() for p, q in zip(fusion.parameters(), prior, strict=True))
        value = F.binary_cross_entropy_with_logits(logits, found["labels"], reduction="sum") + 0.5 * shift
        value = value / len(logits)
        value.backward()
        return value.item()

    optimizer.step(loss)
    model.fusion.load_state_dict(fusion.state_dict())
    with torch.no_grad():
        logits = fusion(found["id_logits"], found["text_logits"], oov_fractions)
    return {**scores, "logits": logits.float().numpy()}


def _oov_fractions(model: JointModel, rows: Dataset) -> torch.Tensor:
    """Returns the fraction of OOV features in each field, float (rows, fields)."""
    table, parts = rows.select_columns("feature_ids").with_format("arrow"), []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        ids = table[start : start + _ROWS_AT_ONCE]["feature_ids"].combine_chunks()
        parts.append(model.base_model.oov_fractions(torch.tensor(ids.flatten().to_numpy()).view(len(ids), -1)))
    return torch.cat(parts)
