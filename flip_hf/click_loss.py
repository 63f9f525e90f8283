"""The loss of `FlipForCTR`: cross-entropy with labels and, optionally, with a teacher's probabilities."""

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from flip_hf.fields import IGNORED_LABEL

ItemCounts = Mapping[str, torch.Tensor | float]
"""Number of items to divide the sum of each part of a loss by, by the part's name."""

# Divisor of a step in which no row has a label; the sum is 0 then.
_NO_ROWS = 1e-6


def count_rows(labels: torch.Tensor, teacher_logits: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Counts the rows of each part of the loss.

    Args:
        labels: (B,), -100 for a row without a label.
        teacher_logits: float (B,), or None.

    Returns:
        int64 () each: `ctr`, the rows with a label; with teacher logits also `distillation`, all rows.
    """
    rows = {"ctr": (labels != IGNORED_LABEL).sum()}
    return rows if teacher_logits is None else rows | {"distillation": torch.ones_like(labels, dtype=torch.int64).sum()}


def click_losses(
    logits: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    distillation_weight: float,
    num_items_in_batch: ItemCounts | torch.Tensor | float | None,
) -> dict[str, torch.Tensor]:
    """Computes the losses of a batch.

    Args:
        logits: the logits to train, by the names of their losses, float (B,) each; the model's own are named `loss`.
        labels: 0, 1, or -100 for a row without a label (B,).
        teacher_logits: another model's click logits of the rows, float (B,), or None.
        distillation_weight: share of the teacher in the model's loss, from 0 to 1.
        num_items_in_batch: as in `FlipForCTR.forward`.

    Returns:
        float () each, by name. The losses of the towers' logits are their binary cross-entropies with the labels. With
        a teacher, `distillation_loss`: the sum of all logits' binary cross-entropies with the teacher's probabilities.
        `loss`: the sum of all logits' binary cross-entropies with the labels, or with a teacher the weighted mean of
        this sum and `distillation_loss`.

    Raises:
        ValueError: rows lack a label and there is a teacher, but `num_items_in_batch` is a single number, which can't
            be the divisor of both parts.
    """
    items = num_items_in_batch if isinstance(num_items_in_batch, Mapping) else count_rows(labels, teacher_logits)
    if num_items_in_batch is not None and not isinstance(num_items_in_batch, Mapping):
        if teacher_logits is not None and bool((labels == IGNORED_LABEL).any()):
            raise ValueError(
                "some rows have no label, and num_items_in_batch is one number. The teacher's part of the loss is a "
                "mean over all rows, the labels' part a mean over the rows that have one. Pass the counts that "
                "model.num_items returns, as FlipTrainer and flip-hf finetune do; transformers.Trainer counts labels "
                "alone"
            )
        items = dict.fromkeys(items, num_items_in_batch)
    losses = {name: _mean_cross_entropy(own, labels, items["ctr"]) for name, own in logits.items()}
    losses["loss"] = torch.stack(list(losses.values())).sum()
    if teacher_logits is not None:
        clicks = teacher_logits.float().sigmoid()
        parts = [_mean_cross_entropy(own, clicks, items["distillation"]) for own in logits.values()]
        losses["distillation_loss"] = torch.stack(parts).sum()
        losses["loss"] = torch.lerp(losses["loss"], losses["distillation_loss"], distillation_weight)
    return losses


def _mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_rows: torch.Tensor | float) -> torch.Tensor:
    """Sum of cross-entropies over the rows with a label, divided by `num_rows`. Labels may be probabilities."""
    is_known = (labels != IGNORED_LABEL).float()
    targets = labels.float().clamp(min=0)
    total = F.binary_cross_entropy_with_logits(logits.float(), targets, is_known, reduction="sum")
    return total / torch.as_tensor(num_rows, device=total.device).clamp(min=_NO_ROWS)
