"""Texts of known and new features, for the initialisation of new features from their texts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from flip_hf.data.kinds import FieldValues
from flip_hf.data.template import TextTemplate
from flip_hf.data.vocabulary import FeatureVocabulary
from flip_hf.growth import FeatureTexts

# Maximum number of known features of a field whose texts are used to predict embeddings of new ones.
_MOST_KNOWN_TEXTS = 4096


def texts_of_grown(
    vocabulary: FeatureVocabulary, tokenizer: Any, max_length: int
) -> Iterator[tuple[FeatureTexts, FeatureTexts]]:
    """Yields the texts of known and of new features, for each field that grew in the last extension.

    Args:
        vocabulary: the extended vocabulary.
        tokenizer: the processor's tokenizer.
        max_length: maximum number of tokens of a text.
    """
    for i, field in enumerate(vocabulary.fields):
        if field.owns_features and field.added_features[-1]:
            template = TextTemplate(tokenizer, [field], max_length)
            ids, values = vocabulary.valued(i)
            num_known = len(ids) - field.added_features[-1]
            # Frequent features come first; training has changed their embeddings most.
            parts = (slice(0, min(num_known, _MOST_KNOWN_TEXTS)), slice(num_known, len(ids)))
            known, new = (FeatureTexts(torch.from_numpy(ids[part]), _tokens(template, values[part])) for part in parts)
            yield known, new


def _tokens(template: TextTemplate, values: pa.Array) -> list[torch.Tensor]:
    text = template.assemble([FieldValues(values, np.zeros(len(values), dtype=np.uint8))])
    parts = np.split(text.input_ids.astype(np.int64), text.offsets[1:-1])
    return [torch.from_numpy(part) for part in parts]
