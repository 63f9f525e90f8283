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
    """Symmetric InfoNCE: the two views of a row attract, other rows of the global batch repel.

    Projected representations are compared by cosine similarity over a temperature. Negatives come from all processes,
    with gradients. Rows with the same features are not each other's negatives: nothing could tell them apart.

    The loss is the mean of both directions' cross-entropies. Metrics: `icl_tabular_to_text_accuracy` and
    `icl_text_to_tabular_accuracy`, the share of rows whose other view is the nearest in the global batch. At the
    accuracy of chance the loss is ln(R), R rows of all processes, and nothing is being aligned.

    The contrastive batch may be larger than what is encoded at a time: `project` each part without a graph, have
    `shares` of them all, and encode each part again `contrasted_as` its share (Gao et al., RepL4NLP 2021, arXiv
    2101.06983, Section 3.2). The loss then is the part's share of the larger batch's, with the larger batch's gradient.
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
        """In this context `forward` takes its rows for that part of a larger batch, instead of a batch of their own."""
        self._share = share
        try:
            yield
        finally:
            self._share = None

    def project(self, tabular: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors that are compared: float (B, H) and (B, C) -> float32 (B, P) twice, of length 1."""
        tabular, text = self.tabular_projection(tabular), self.text_projection(text)
        return F.normalize(tabular.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def contrast(self, tabular: torch.Tensor, text: torch.Tensor, feature_ids: torch.Tensor) -> ObjectiveOutput:
        """The loss of rows whose views are projected: float32 (B, P) twice and int64 (B, positions)."""
        counts = row_counts(len(tabular), tabular.device)
        # A similarity divided by the temperature needs more than the 8 bits of a bfloat16.
        with torch.autocast(tabular.device.type, enabled=False):
            all_tabular, all_text = gather_rows(tabular, counts), gather_rows(text, counts)  # (R, P)
            tabular_to_text = tabular @ all_text.T / self.temperature  # (B, R)
            text_to_tabular = text @ all_tabular.T / self.temperature

        num_rows, first = len(tabular), first_row(counts)
        targets = torch.arange(num_rows, device=tabular.device) + first
        # Rows with the same features have the same number.
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
        """Contrasts the rows of several batches, and tells each what that means for it.

        Args:
            views: for each batch, what `project` returned, without a graph.
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
