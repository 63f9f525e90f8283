"""Instance-level contrastive learning between the two views (FLIP, Section 3.3.3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from flip_hf.configuration_flip import FlipConfig
from flip_hf.nn.gather import first_row, gather_rows, row_counts
from flip_hf.objectives.base import ContrastiveShare, Objective, ObjectiveOutput, PretrainingBatch, mean_over_items


class InstanceContrastiveLearning(Objective):
    """Symmetric InfoNCE: attracts the two views of a row, and repels the other rows of the global batch.

    Projected representations are compared by cosine similarity, divided by a temperature. Negatives come from all
    processes, with gradients. Rows with identical features are not used as negatives of each other, because they can't
    be distinguished.

    The loss is the mean of the cross-entropies in both directions. Metrics: `icl_tabular_to_text_accuracy` and
    `icl_text_to_tabular_accuracy`, the share of rows whose other view is the nearest in the global batch. If the
    loss is ln(R), with R rows over all processes, and the accuracy is at chance, nothing has been aligned.

    The contrastive batch may be larger than the batches that are encoded at a time (gradient caching: Gao et al.,
    RepL4NLP 2021, arXiv 2101.06983, Section 3.2): `project` each part without a graph, compute the `shares` of all
    parts, and encode each part again inside `contrasted_as(share)`. The loss is then the part's share of the larger
    batch's loss, with the larger batch's gradient.
    """

    views = frozenset({"tabular", "text"})
    labels = None

    _share: ContrastiveShare | None = None

    def __init__(self, config: FlipConfig, tabular_size: int, text_size: int) -> None:
        super().__init__(config, tabular_size, text_size)
        self.temperature = config.contrastive_temperature
        self.tabular_projection = nn.Linear(tabular_size, config.projection_dim)
        self.text_projection = nn.Linear(text_size, config.projection_dim)

    def forward(self, batch: PretrainingBatch) -> ObjectiveOutput:
        assert batch.tabular is not None and batch.text is not None
        tabular, text = self.project(batch.tabular, batch.text)  # (B, P), (B, P)
        share = self._share
        if share is None:
            return self.contrast(tabular, text, batch.feature_ids)
        slope = (tabular * share.tabular_gradient).sum() + (text * share.text_gradient).sum()
        loss_sum = share.loss_sum + slope - slope.detach()
        return ObjectiveOutput(loss_sum, self.num_items(batch.feature_ids, None), share.metrics)

    @contextmanager
    def contrasted_as(self, share: ContrastiveShare) -> Iterator[None]:
        """Context manager in which `forward` treats its rows as part of a larger batch."""
        self._share = share
        try:
            yield
        finally:
            self._share = None

    def project(self, tabular: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projects both views: float (B, H) and (B, C) -> float32 (B, P) twice, normalised to length 1."""
        tabular, text = self.tabular_projection(tabular), self.text_projection(text)
        return F.normalize(tabular.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def contrast(self, tabular: torch.Tensor, text: torch.Tensor, feature_ids: torch.Tensor) -> ObjectiveOutput:
        """Computes the loss from projected views: float32 (B, P) twice, and int64 (B, positions)."""
        counts = row_counts(len(tabular), tabular.device)
        # A similarity divided by the temperature needs more precision than bfloat16 has.
        with torch.autocast(tabular.device.type, enabled=False):
            all_tabular, all_text = gather_rows(tabular, counts), gather_rows(text, counts)  # (R, P)
            tabular_to_text = tabular @ all_text.T / self.temperature  # (B, R)
            text_to_tabular = text @ all_tabular.T / self.temperature

        num_rows, first = len(tabular), first_row(counts)
        targets = torch.arange(num_rows, device=tabular.device) + first
        # Rows with identical features get the same number.
        _, numbers = torch.unique(gather_rows(feature_ids, counts), dim=0, return_inverse=True)  # (R,)
        duplicates = numbers[first : first + num_rows].unsqueeze(1) == numbers  # (B, R)
        duplicates[torch.arange(num_rows, device=targets.device), targets] = False
        tabular_to_text = tabular_to_text.masked_fill(duplicates, float("-inf"))
        text_to_tabular = text_to_tabular.masked_fill(duplicates, float("-inf"))

        loss_sum = 0.5 * (
            F.cross_entropy(tabular_to_text, targets, reduction="sum")
            + F.cross_entropy(text_to_tabular, targets, reduction="sum")
        )
        metrics = {
            "icl_tabular_to_text_accuracy": mean_over_items(tabular_to_text.argmax(dim=-1) == targets),
            "icl_text_to_tabular_accuracy": mean_over_items(text_to_tabular.argmax(dim=-1) == targets),
        }
        return ObjectiveOutput(loss_sum, self.num_items(feature_ids, None), metrics)

    def shares(
        self, views: Sequence[tuple[torch.Tensor, torch.Tensor]], feature_ids: Sequence[torch.Tensor]
    ) -> list[ContrastiveShare]:
        """Contrasts the rows of several batches, and returns each batch's share of the loss.

        Args:
            views: for each batch, the output of `project`, without a graph.
            feature_ids: for each batch, int64 (B, positions).
        """
        sizes = [len(ids) for ids in feature_ids]
        tabular, text = (torch.cat(parts).requires_grad_() for parts in zip(*views, strict=True))
        output = self.contrast(tabular, text, torch.cat(list(feature_ids)))
        gradients = torch.autograd.grad(output.loss_sum, (tabular, text))
        of_tabular, of_text = (gradient.split(sizes) for gradient in gradients)
        return [
            ContrastiveShare(of_tabular[i], of_text[i], output.loss_sum.detach() * size / sum(sizes), output.metrics)
            for i, size in enumerate(sizes)
        ]
