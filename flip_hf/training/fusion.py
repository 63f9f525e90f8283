"""Fusion fitted to rows that the towers have not learned."""

from collections.abc import Mapping

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F

from flip_hf.training.protocols import JointModel

_STEPS = 100
_ROWS_AT_ONCE = 1 << 16


def fit_fusion(model: JointModel, scores: Mapping[str, np.ndarray], rows: Dataset) -> dict[str, np.ndarray]:
    """Fits the parameters that weigh the towers' logits, and no others, to labelled rows.

    On the rows that it was trained on the ID-based model looks better than it is on others, as it learns ids by heart:
    a fusion that is trained along with the towers trusts it too much. This is stacking on held-out rows (Wolpert,
    Neural Networks 5, 1992), by maximum a posteriori with a standard normal prior around equal shares: the same rows
    give the same parameters, whatever they were before.

    Args:
        model: a `FlipForCTR` of both towers, not wrapped; changed in place.
        scores: what `click_logits` returned of it: `id_logits`, `text_logits` and `labels`, (rows,).
        rows: these rows, encoded.

    Returns:
        The scores with the fused `logits` of the fitted model.

    Raises:
        ValueError: the rows have no labels, or the model has one tower.
    """
    if lacking := [name for name in ("id_logits", "text_logits", "labels") if name not in scores]:
        raise ValueError(f"there are no {lacking[0]}: a fusion is fitted to both towers' logits of labelled rows")
    # On the CPU in double precision: no device gives the digits of another.
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
    """The fraction of each field's features that are OOV, float (rows, fields)."""
    table, parts = rows.select_columns("feature_ids").with_format("arrow"), []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        ids = table[start : start + _ROWS_AT_ONCE]["feature_ids"].combine_chunks()
        parts.append(model.base_model.oov_fractions(torch.tensor(ids.flatten().to_numpy()).view(len(ids), -1)))
    return torch.cat(parts)
