"""What a `FlipForCTR` learns from: labels and, where there is one, a teacher."""

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from flip_hf.fields import IGNORED_LABEL

ItemCounts = Mapping[str, torch.Tensor | float]
"""What each part of a loss is divided by, by the part's name."""

# A step whose rows all lack a label divides by this: their sum is 0, too.
_NO_ROWS = 1e-6


def count_rows(labels: torch.Tensor, teacher_logits: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What the parts of the loss are sums over, int64 (): `ctr`, the rows with a label, and with a teacher
    `distillation`, all rows.

    Args:
        labels: (B,), -100 for a row without a label.
        teacher_logits: (B,), or None.
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
    """The losses of a batch.

    Args:
        logits: the logits that learn, by the names of their losses, float (B,) each; the model's own is `loss`.
        labels: 0, 1, or -100 for a row without a label (B,).
        teacher_logits: another model's click logits of the rows, float (B,), or None.
        distillation_weight: the share of the teacher in the model's loss.
        num_items_in_batch: as `FlipForCTR.forward` takes it.

    Returns:
        float () each: for each logit the binary cross-entropy with the labels; with a teacher `distillation_loss`, the
        sum of the binary cross-entropies with the teacher's probabilities; and `loss`, the sum of the former, or with a
        teacher the weighted mean of both.

    Raises:
        ValueError: rows lack a label, and `num_items_in_batch` is one number, which can't be of both parts.
    """
    items = num_items_in_batch if isinstance(num_items_in_batch, Mapping) else count_rows(labels, teacher_logits)
    if num_items_in_batch is not None and not isinstance(num_items_in_batch, Mapping):
        if teacher_logits is not None and bool((labels == IGNORED_LABEL).any()):
            raise ValueError(
                "some rows have no label, and num_items_in_batch is one number: the teacher's part of the loss is a "
                "mean over all rows, the labels' over those that have one. Pass what model.num_items counts, as "
                "FlipTrainer and flip-hf finetune do; transformers.Trainer counts labels alone"
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
    """The sum over the rows with a label, which may be a probability, divided by their number."""
    is_known = (labels != IGNORED_LABEL).float()
    targets = labels.float().clamp(min=0)
    total = F.binary_cross_entropy_with_logits(logits.float(), targets, is_known, reduction="sum")
    return total / torch.as_tensor(num_rows, device=total.device).clamp(min=_NO_ROWS)
