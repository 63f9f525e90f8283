"""Pretraining objectives, one file each. To add one, write its file and add a line to `OBJECTIVES`."""

from flip_hf.objectives.base import ContrastiveShare, Objective, ObjectiveOutput, PretrainingBatch
from flip_hf.objectives.icl import InstanceContrastiveLearning
from flip_hf.objectives.mlm import MaskedLanguageModeling
from flip_hf.objectives.mtm import MaskedTabularModeling
from flip_hf.objectives.text_mlm import TextMaskedLanguageModeling

OBJECTIVES: dict[str, type[Objective]] = {
    "mlm": MaskedLanguageModeling,
    "mtm": MaskedTabularModeling,
    "icl": InstanceContrastiveLearning,
    "text_mlm": TextMaskedLanguageModeling,
}

__all__ = ["OBJECTIVES", "ContrastiveShare", "Objective", "ObjectiveOutput", "PretrainingBatch"]
