"""Growing vocabularies: new features of a processor, and the model's resize for them.

`model.resize_feature_embeddings(processor.extend(rows))`
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flip_hf.fields import NUM_RESERVED_FEATURES, FieldConfig, num_features, oov_id, owned_ranges
from flip_hf.nn.embeddings import FeatureEmbedding
from flip_hf.nn.ridge import ridge_predictions
from flip_hf.nn.sharded_embeddings import ShardedFeatureEmbedding


@dataclass(frozen=True)
class FeatureTexts:
    """Features of one field, each with the text that describes it alone, such as `title is Kolya (1996) .`

    Attributes:
        feature_ids: int64 (features,).
        tokens: the token ids of each text, int64 (tokens,) each.
    """

    feature_ids: torch.Tensor
    tokens: list[torch.Tensor]


@dataclass(frozen=True)
class FeatureGrowth:
    """An extended vocabulary, as `FlipProcessor.extend` returns it.

    Attributes:
        fields: the fields with the added features; existing ids are unchanged.
        feature_counts: int64 (features,), how often each feature was seen, in fitting and in all extensions.
        texts: returns the texts of known and of new features, for each field that grew in the last extension.
    """

    fields: list[FieldConfig]
    feature_counts: torch.Tensor
    texts: Callable[[], Iterable[tuple[FeatureTexts, FeatureTexts]]]


@torch.no_grad()
def resize_feature_table(towers: Any, growth: FeatureGrowth, init: str) -> FeatureEmbedding:
    """Adds rows for new features to a model's feature table; existing features keep their ids and weights.

    Args:
        towers: the `FlipModel`; its configuration gets the new fields.
        growth: the return value of `processor.extend`.
        init: "mean" or "text", as in `FlipModel.resize_feature_embeddings`.

    Returns:
        The larger table.

    Raises:
        ValueError: the growth belongs to another processor, the model lacks a tower that `init` needs, or the table is
            sharded.
    """
    if init not in ("mean", "text"):
        raise ValueError(f"init={init!r} is not one of mean, text")
    embeddings: FeatureEmbedding | None = towers.feature_embeddings
    if embeddings is None or (init == "text" and towers.text_model is None):
        raise ValueError(
            f"init={init!r} needs {'a text encoder' if embeddings is not None else 'a feature table'}, but "
            f"mode={towers.config.mode!r} builds none; load the model with mode='joint'"
        )
    if isinstance(embeddings, ShardedFeatureEmbedding):
        raise ValueError("the feature table is sharded: save the model, load it unsharded, and resize the loaded one")
    _check_growth(towers.config.fields, growth.fields)
    old: torch.Tensor = embeddings.weight
    table = torch.cat([old, old.new_zeros(num_features(growth.fields) - len(old), old.shape[1])])
    for ranges in filter(None, owned_ranges(growth.fields)):
        ids = torch.cat([torch.arange(*bounds) for bounds in ranges]).to(old.device)
        valued = ids[NUM_RESERVED_FEATURES:]
        known = valued[valued < len(old)]
        # If the field had no known value, its OOV feature stands in for the mean.
        table[valued[valued >= len(old)]] = old[known].mean(dim=0) if len(known) else old[oov_id(ranges)]
    if init == "text":
        for known_texts, new_texts in growth.texts():
            table[new_texts.feature_ids.to(old.device)] = ridge_predictions(
                _text_vectors(towers, known_texts.tokens),
                old[known_texts.feature_ids.to(old.device)],
                _text_vectors(towers, new_texts.tokens),
            ).to(old.dtype)
    # All parts of the model share this configuration object.
    towers.config.fields = growth.fields
    embeddings.weight = nn.Parameter(table, requires_grad=old.requires_grad)
    embeddings.set_position_ranges(towers.config.position_ranges)
    return embeddings


def _text_vectors(towers: Any, texts: list[torch.Tensor], batch_size: int = 256) -> torch.Tensor:
    """The text tower's vectors of texts, given as token ids; float (texts, C)."""
    was_training = towers.training
    towers.eval()
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        masks = [torch.ones_like(tokens) for tokens in batch]
        padded = (nn.utils.rnn.pad_sequence(rows, batch_first=True).to(towers.device) for rows in (batch, masks))
        parts.append(towers.encode_texts(*padded).float())
    towers.train(was_training)
    return torch.cat(parts)


def _check_growth(fields: Sequence[FieldConfig], grown: Sequence[FieldConfig]) -> None:
    """Raises ValueError unless `grown` are the same fields with features added."""
    same = [f.name for f in fields] == [f.name for f in grown] and all(
        replace(
            new,
            added_features=new.added_features[: len(old.added_features)],
            value_hashes=new.value_hashes[: len(old.value_hashes)],
        )
        == old
        for old, new in zip(fields, grown, strict=True)
    )
    if not same:
        raise ValueError(
            "this growth belongs to another processor; extend the one that was saved with this model: "
            "FlipProcessor.from_pretrained(<the model's folder>).extend(rows)"
        )
