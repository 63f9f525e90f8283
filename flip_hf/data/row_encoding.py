"""Encodes a table of rows to both views, without padding."""

from collections.abc import Collection
from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow as pa

from flip_hf.data.feature_vectors import FeatureVectors
from flip_hf.data.groups import GROUP_COLUMN, group_ids
from flip_hf.data.kinds import KINDS, FieldValues
from flip_hf.data.schema import Fallback, canonical_labels
from flip_hf.data.template import AssembledText, TextTemplate
from flip_hf.data.text_features import NO_KEY, with_columns
from flip_hf.data.vocabulary import FeatureVocabulary, placed_values

VECTORS_COLUMN = "vectors"
"""Column of the standardised vectors of all vector fields, concatenated per row; NaN where missing."""
KEYS_COLUMN = "vector_keys"
"""Column of the key of the vector at each position of a field with text features."""


def encode_rows(
    table: pa.Table,
    vocabulary: FeatureVocabulary,
    template: TextTemplate,
    vectors: FeatureVectors,
    *,
    label: str | None,
    with_text: bool,
    with_vectors: bool,
    group_field: str | None,
    first_row: int,
    source: str | None,
) -> pa.Table:
    """Implements `FlipProcessor.encode`.

    Args:
        table: the columns that the processor reads.
        vocabulary: the processor's vocabulary.
        template: the processor's template.
        vectors: the processor's vectors.
        label: name of the label column to read; None for none.
        with_text: as in `encode`.
        with_vectors: as in `encode`.
        group_field: as in `encode`.
        first_row: as in `encode`.
        source: as in `encode`.
    """
    num_rows, num_fields = len(table), len(vocabulary.fields)
    named = {f.name: f for f in with_columns(vocabulary.fields, vectors.features.values())}

    @cache
    def column(name: str) -> FieldValues:
        field = named[name]
        return KINDS[field.kind].read(table[name], field, first_row, source)

    fallbacks = np.empty((num_rows, num_fields), dtype=np.uint8)
    positions, shown, keys, rows_of_vectors = [], [], [], []
    for i, field in enumerate(vocabulary.fields):
        values = column(field.name)
        ids = None
        fallbacks[:, i] = values.flags
        if field.traits.has_features:
            ids = vocabulary.lookup(i, values)
            placed = vocabulary.positions(i, values, ids)
            positions.append(placed.ids)
            fallbacks[placed.has_oov, i] |= np.uint8(Fallback.OOV)
            fallbacks[placed.is_cut, i] |= np.uint8(Fallback.TRUNCATED)
            if vocabulary.fields[vocabulary.owner(i)].name in vectors.values and with_vectors:
                own_keys = vectors.row_keys(vocabulary, i, values, ids, column)
                keys.append(placed_values(own_keys, placed.places, NO_KEY))
            if values.vectors is not None and with_vectors:
                rows_of_vectors.append(vectors.scales[field.name].apply(values.vectors))
        if with_text and field.traits.has_text:
            shown.append(_shown(vocabulary, i, values, ids))
    encoded = {
        "row": pa.array(np.arange(first_row, first_row + num_rows)),
        "feature_ids": _fixed_lists(np.concatenate(positions, axis=1)),
    }
    for name, parts in ((KEYS_COLUMN, keys), (VECTORS_COLUMN, rows_of_vectors)):
        if parts:
            encoded[name] = _fixed_lists(np.concatenate(parts, axis=1))
    if with_text:
        text = template.assemble(shown)
        fallbacks[text.truncated] |= np.uint8(Fallback.TRUNCATED)
        encoded |= _text_columns(text)
    encoded["fallbacks"] = _fixed_lists(fallbacks)
    if label:
        encoded["label"] = pa.array(canonical_labels(table[label], label, first_row=first_row, source=source))
    if group_field is not None:
        groups = group_ids(table[group_field], group_field, first_row=first_row, source=source)
        encoded[GROUP_COLUMN] = pa.array(groups)
    return pa.table(encoded)


def encode_text(
    table: pa.Table,
    vocabulary: FeatureVocabulary,
    template: TextTemplate,
    names: Collection[str],
    first_row: int = 0,
    source: str | None = None,
) -> pa.Table:
    """Encodes the textual view of rows that have only some of the fields. Shows all other fields as missing.

    Args:
        table: the columns of these fields.
        vocabulary: the processor's vocabulary.
        template: the processor's template.
        names: the names of the fields that the rows have.
        first_row: as in `FlipProcessor.encode`.
        source: as in `FlipProcessor.encode`.

    Returns:
        `row`, `input_ids` and `token_field_ids`, as in `FlipProcessor.encode`.

    Raises:
        InputError: a value is invalid for its field's kind.
    """
    num_rows, shown = len(table), []
    for i, field in enumerate(vocabulary.fields):
        if not field.traits.has_text:
            continue
        if field.name not in names:
            shown.append(FieldValues(pa.nulls(num_rows, pa.string()), np.zeros(num_rows, np.uint8)))
            continue
        values = KINDS[field.kind].read(table[field.name], field, first_row, source)
        ids = vocabulary.lookup(i, values) if field.traits.has_features else None
        shown.append(_shown(vocabulary, i, values, ids))
    rows = pa.array(np.arange(first_row, first_row + num_rows))
    return pa.table({"row": rows, **_text_columns(template.assemble(shown))})


def _shown(vocabulary: FeatureVocabulary, place: int, values: FieldValues, ids: np.ndarray | None) -> FieldValues:
    """Returns the values that the text shows for a field. `ids` are the values' features, int64 (values,), or None."""
    field = vocabulary.fields[place]
    if ids is not None:
        values = replace(values, keys=vocabulary.keys(place, ids))
    values = KINDS[field.kind].shown(values, field)
    return values if field.show_oov else values.without_oov()


def _text_columns(text: AssembledText) -> dict[str, pa.ListArray]:
    offsets = pa.array(text.offsets, pa.int32())
    return {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(text.input_ids)),
        "token_field_ids": pa.ListArray.from_arrays(offsets, pa.array(text.token_field_ids)),
    }


def _fixed_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
