"""What the models return: the glossary of shapes.

Letters: B rows in the batch, F fields of the tabular view, P positions (one for a single-valued field, `max_values` for
one that may hold several), D width of a feature's embedding, H width of the tabular representation,
T tokens, C width of the text encoder, L its layers, A its attention heads.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class FlipModelOutput(ModelOutput):
    """What `FlipModel` makes of the two views of a batch; the parts of a tower that is not built are None.

    Args:
        field_embeddings: float (B, F, D), the feature embeddings that the ID-based model read.
        tabular_representation: float (B, H), what the ID-based model makes of the row.
        id_logits: float (B,), the ID-based model's logit.
        token_states: float (B, T, C), the text encoder's last hidden states; with `text_towers` (B, towers, T, C).
        text_representation: float (B, C), the pooled text; with `text_towers` (B, towers * C), one after the other.
        hidden_states: with `output_hidden_states`, float (B, T, C) 1 + L times: the text encoder's embeddings and what
            each layer makes of them; with `text_towers` (B * towers, T, C).
        attentions: with `output_attentions`, float (B, A, T, T) L times: the text encoder's attention weights; with
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
    """The pretraining losses, each a mean over what was masked (MLM, MTM, text MLM) or over rows (ICL).

    Args:
        loss: float (), the weighted sum of the parts.
        mlm_loss: float (), masked language modelling.
        mtm_loss: float (), masked tabular modelling.
        icl_loss: float (), instance-level contrastive learning.
        text_mlm_loss: float (), masked language modelling of the text alone.
        metrics: name to float (), detached: accuracies that a log should show.
        feature_penalty: float (), mean over rows of the summed squares of the feature embeddings that the row reads.
        hidden_states: as in `FlipModelOutput`, of the complete text where an objective reads it, else of the
            masked one.
        attentions: likewise.
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
    """Click logits; those of a tower that is not built are None. `sigmoid(logits)` is the click probability.

    Args:
        loss: float (), the sum of the binary cross-entropies of the logits below, given labels; with `teacher_logits`
            the mean of this sum and of `distillation_loss`, weighted by `config.distillation_weight`.
        logits: float (B,), joint mode: `a * id_logits + (1 - a) * text_logits`; else the one tower's logits.
        id_logits: float (B,), of the ID-based model.
        text_logits: float (B,), of the text encoder.
        id_loss: float (), binary cross-entropy of `id_logits`, joint mode only.
        text_loss: float (), binary cross-entropy of `text_logits`, joint mode only.
        distillation_loss: float (), the sum of the binary cross-entropies of the logits above with the teacher's
            probabilities in place of labels, given `teacher_logits`.
        feature_penalty: float (), mean over rows of the summed squares of the feature embeddings that the row reads.
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
