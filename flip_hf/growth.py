"""What a processor tells a model of features that came later.

`model.resize_feature_embeddings(processor.extend(rows))`
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from flip_hf.fields import FieldConfig


@dataclass(frozen=True)
class FeatureTexts:
    """Features of one field and the text that shows each alone, such as `title is Kolya (1996) .`

    Attributes:
        feature_ids: int64 (features,).
        tokens: int64 (tokens,) each.
    """

    feature_ids: torch.Tensor
    tokens: list[torch.Tensor]


@dataclass(frozen=True)
class FeatureGrowth:
    """A larger vocabulary.

    Attributes:
        fields: the fields with what was added; ids that were there before are what they were.
        feature_counts: int64 (features,), how often each feature was seen, before and since.
        texts: makes, for each field that grew last, the texts of features that were there and of those that are new.
    """

    fields: list[FieldConfig]
    feature_counts: torch.Tensor
    texts: Callable[[], Iterable[tuple[FeatureTexts, FeatureTexts]]]
