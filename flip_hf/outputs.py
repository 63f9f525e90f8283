"""Outputs of the models, and the letters that name the dimensions of tensors.

B: rows of the batch. F: fields of the tabular view. P: positions, one for a field with a single value and `max_values`
for a field with several. D: width of a feature's embedding. H: width of the tabular representation. T: tokens.
C: width of the text encoder. L: layers of the text encoder. A: attention heads of the text encoder.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class FlipModelOutput(ModelOutput):
    """Output of `FlipModel`: the encoded views of a batch. The parts of a tower that is not built are None.

    Args:
        field_embeddings: float (B, F, D), the input of the ID-based model: one embedding for each field.
        tabular_representation: float (B, H), the ID-based model's representation of the row.
        id_logits: float (B,), the ID-based model's logit.
        token_states: float (B, T, C), the text encoder's last hidden states; with `text_towers` (B, towers, T, C).
        text_representation: float (B, C), the pooled text; with `text_towers` (B, towers * C), concatenated.
        hidden_states: with `output_hidden_states`, 1 + L times float (B, T, C): the text encoder's embeddings and the
            output of each layer; with `text_towers` (B * towers, T, C).
        attentions: with `output_attentions`, L times float (B, A, T, T): the text encoder's attention weights; with
            `text_towers` (B * towers, A, T, T).
    """

    field_embeddings: torch.Tensor | None = None
    tabular_representation: torch.Tensor | None = None
    id_logits: torch.Tensor | None = None
    token_states: torch.Tensor | None = None
    text_representation: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FlipForPreTrainingOutput(ModelOutput):
    """Output of `FlipForPreTraining`: losses, each a mean over masked items (MLM, MTM, text MLM) or rows (ICL).

    Args:
        loss: float (), the weighted sum of the objectives' losses.
        mlm_loss: float (), masked language modelling.
        mtm_loss: float (), masked tabular modelling.
        icl_loss: float (), instance-level contrastive learning.
        text_mlm_loss: float (), masked language modelling from the text alone.
        metrics: name to float (), detached: accuracies for the log.
        feature_penalty: float (), mean over rows of the summed squares of the row's feature embeddings.
        hidden_states: as in `FlipModelOutput`, of the text without masks if an objective reads it, else of the masked
            text.
        attentions: as in `FlipModelOutput`, of the same text.
    """

    loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    mtm_loss: torch.Tensor | None = None
    icl_loss: torch.Tensor | None = None
    text_mlm_loss: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None
    feature_penalty: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FlipForCTROutput(ModelOutput):
    """Output of `FlipForCTR`: click logits; `sigmoid(logits)` is the click probability.

    Logits of a tower that is not built are None.

    Args:
        loss: float (), given labels: the sum of the binary cross-entropies of the logits below. With `teacher_logits`
            the mean of this sum and `distillation_loss`, weighted by `config.distillation_weight`.
        logits: float (B,), in joint mode `a * id_logits + (1 - a) * text_logits`, else the logits of the one tower.
        id_logits: float (B,), of the ID-based model.
        text_logits: float (B,), of the text encoder.
        id_loss: float (), binary cross-entropy of `id_logits`, joint mode only.
        text_loss: float (), binary cross-entropy of `text_logits`, joint mode only.
        distillation_loss: float (), given `teacher_logits`: the sum of the binary cross-entropies of the logits above
            with the teacher's probabilities instead of labels.
        feature_penalty: float (), mean over rows of the summed squares of the row's feature embeddings.
        hidden_states: as in `FlipModelOutput`.
        attentions: as in `FlipModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    id_logits: torch.Tensor | None = None
    text_logits: torch.Tensor | None = None
    id_loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    distillation_loss: torch.Tensor | None = None
    feature_penalty: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
