"""Instance-level contrastive learning between the two views (FLIP, Section 3.3.3)."""

import torch
from torch import nn
from torch.nn import functional as F

from flip_hf.configuration_flip import FlipConfig
from flip_hf.nn.gather import first_row, gather_rows, row_counts
from flip_hf.objectives.base import Objective, ObjectiveOutput, PretrainingBatch, mean_over_items


class InstanceContrastiveLearning(Objective):
    """Symmetric InfoNCE: the two views of a row attract, other rows of the global batch repel.

    Projected representations are compared by cosine similarity over a temperature. Negatives come from all processes,
    with gradients. Rows with the same features are not each other's negatives: nothing could tell them apart.

    The loss is the mean of both directions' cross-entropies. Metrics: `icl_tabular_to_text_accuracy` and
    `icl_text_to_tabular_accuracy`, the share of rows whose other view is the nearest in the global batch. At the
    accuracy of chance the loss is ln(R), R rows of all processes, and nothing is being aligned.
    """

    views = frozenset({"tabular", "text"})
    labels = None

    def __init__(self, config: FlipConfig, tabular_size: int, text_size: int) -> None:
        super().__init__(config, tabular_size, text_size)
        self.temperature = config.contrastive_temperature
        self.tabular_projection = nn.Linear(tabular_size, config.projection_dim)
        self.text_projection = nn.Linear(text_size, config.projection_dim)

    def forward(self, batch: PretrainingBatch) -> ObjectiveOutput:
        assert batch.tabular is not None and batch.text is not None
        tabular, text = self.tabular_projection(batch.tabular), self.text_projection(batch.text)  # (B, P), (B, P)
        counts = row_counts(len(tabular), tabular.device)
        # A similarity divided by the temperature needs more than the 8 bits of a bfloat16.
        with torch.autocast(tabular.device.type, enabled=False):
            tabular, text = F.normalize(tabular.float(), dim=-1), F.normalize(text.float(), dim=-1)
            all_tabular, all_text = gather_rows(tabular, counts), gather_rows(text, counts)  # (R, P)
            tabular_to_text = tabular @ all_text.T / self.temperature  # (B, R)
            text_to_tabular = text @ all_tabular.T / self.temperature

        num_rows = len(tabular)
        targets = torch.arange(num_rows, device=tabular.device) + first_row(counts)
        all_ids = gather_rows(batch.feature_ids, counts)
        duplicates = (batch.feature_ids.unsqueeze(1) == all_ids.unsqueeze(0)).all(dim=-1)  # (B, R)
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
        return ObjectiveOutput(loss_sum, self.num_items(batch.feature_ids, None), metrics)
