"""Configures the vectors attached to the values of a field, and builds the texts that they are computed from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from flip_hf.data.kinds import FieldValues
from flip_hf.fetch import public_name
from flip_hf.fields import LARGEST_VECTOR, FieldConfig, is_whole, with_nearest

_COMMA = ", "

NO_KEY = 0
"""Key of a value without a vector."""


@dataclass(frozen=True)
class TextFeatures:
    """Attaches a vector to each value of a field: an encoder computes it from the value's text, or a column holds it.

    The embedding of a value becomes its row of the feature table plus its projected vector. An unseen value has the
    OOV row plus its own vector. Fields that share the field's features, such as histories, get the vectors too.

    Args:
        field: name of the field, such as `"movie_id"`. It must be categorical, without `hash_buckets`.
        encoder: name or folder of a transformers or sentence-transformers encoder, or of a saved FLIP model, whose
            text tower then encodes (`flip_hf.text_vectors.TextVectorizer`).
        fields: the columns that make up the text of a value, joined by commas, such as `["title", "genre"]`. They need
            not be fields of the model.
        column: instead of an encoder, the column that holds each row's vector, a list of numbers.
        size: dimension of the vectors in that column. For an encoder, fitting sets it.
        text_layers: number of layers of the encoder to use; all by default.
        identity: fingerprint of the encoder, set by fitting. A different encoder can't encode new texts.
    """

    field: str
    encoder: str | None = None
    fields: tuple[str, ...] = ()
    column: str | None = None
    size: int | None = None
    text_layers: int | None = None
    identity: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", (self.fields,) if isinstance(self.fields, str) else tuple(self.fields or ()))
        if self.encoder is not None:
            object.__setattr__(self, "encoder", str(self.encoder))
        names = [self.field, *self.fields, *([] if self.column is None else [self.column])]
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"text features of {self.field!r}: field, fields and column must be names of columns")
        if self.text_layers is not None and not is_whole(self.text_layers):
            raise ValueError(
                f"text features of {self.field!r}: text_layers={self.text_layers!r} must be a whole number"
            )
        if (self.encoder is None) == (self.column is None):
            raise ValueError(
                f"text features of {self.field!r}: set either encoder and fields, or a column that holds vectors"
            )
        if (self.encoder is None) != (not self.fields):
            raise ValueError(
                f"text features of {self.field!r}: set encoder and fields together; fields are the columns that the "
                "encoder reads, such as ['title']"
            )
        if self.column is not None and not (is_whole(self.size) and 0 < (self.size or 0) <= LARGEST_VECTOR):
            raise ValueError(
                f"text features of {self.field!r}: size={self.size!r} must be the dimension of the vectors, a whole "
                f"number from 1 to {LARGEST_VECTOR}"
            )
        if self.column is not None and self.text_layers is not None:
            raise ValueError(f"text features of {self.field!r}: text_layers needs an encoder, but column is set")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TextFeatures":
        """Creates text features from the output of `to_dict`, or from a run file. Unknown settings raise ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"text features must be a mapping such as {{field: movie_id, ...}}, not {values!r:.80}")
        known = list(cls.__dataclass_fields__)
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"text features have no setting {with_nearest(unknown, known)}")
        if "field" not in values:
            raise ValueError("text features need the field whose values get vectors: {field: movie_id, ...}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings that differ from their defaults, as plain JSON types.

        An encoder's folder is reduced to the last part of its path.
        """
        values = asdict(self) | {"fields": list(self.fields)}
        if self.encoder is not None:
            values["encoder"] = public_name(self.encoder)
        return {name: value for name, value in values.items() if value not in (None, [])}

    @property
    def vector_type(self) -> type[np.floating[Any]]:
        """The NumPy type in which the vectors are stored: float16 from an encoder, float32 from a column."""
        return np.float16 if self.column is None else np.float32

    @property
    def columns(self) -> list[FieldConfig]:
        """The columns from which the vectors are made, as fields."""
        if self.column is not None:
            return [FieldConfig(self.column, kind="vector", size=self.size)]
        return [FieldConfig(name, kind="text") for name in self.fields]

    @property
    def is_of_value_alone(self) -> bool:
        """Whether a value's text is the value itself. The text is then known without other columns."""
        return self.fields == (self.field,)


def as_text_features(
    values: Sequence[TextFeatures | Mapping[str, Any]], fields: Sequence[FieldConfig]
) -> list[TextFeatures]:
    """Validates text features, and converts mappings (as in JSON files) to `TextFeatures`.

    Raises:
        ValueError: the field is unknown, has two text features, or has features that don't stand for single values.
    """
    if isinstance(values, TextFeatures | Mapping | str):
        raise ValueError("text_features must be a list of TextFeatures; put a single one in a list")
    result = [value if isinstance(value, TextFeatures) else TextFeatures.from_dict(value) for value in values]
    by_name = {f.name: f for f in fields}
    for features in result:
        field = by_name.get(features.field)
        if field is None:
            raise ValueError(f"text features: field={features.field!r} is not one of {', '.join(map(repr, by_name))}")
        if field.share_embedding is not None:
            raise ValueError(
                f"text features: {field.name!r} uses the features of {field.share_embedding!r}; attach them to that one"
            )
        if field.kind != "categorical" or field.hash_buckets is not None:
            raise ValueError(
                f"text features: {field.name!r} must be of kind='categorical' without hash_buckets, so that a feature "
                "stands for one value"
            )
        if vectors := [n for n in features.fields if n in by_name and by_name[n].traits.is_vector]:
            raise ValueError(f"text features of {field.name!r}: {vectors[0]!r} is a vector, which has no text")
        if features.column is not None and features.column in by_name:
            raise ValueError(f"text features: the column {features.column!r} of vectors can't be a field too")
    if len({features.field for features in result}) < len(result):
        raise ValueError("text features: a field is named twice, but can have one vector only")
    return result


def with_columns(fields: Sequence[FieldConfig], features: Iterable[TextFeatures]) -> list[FieldConfig]:
    """Returns the fields, followed by the columns that only text features read, as fields."""
    columns = {own.name: own for one in features for own in one.columns}
    names = {f.name for f in fields}
    return [*fields, *(own for name, own in columns.items() if name not in names)]


def catalog_columns(fields: Sequence[FieldConfig], features: Iterable[TextFeatures]) -> list[FieldConfig]:
    """Returns a catalog's columns as fields: the fields with text features and the columns that make their vectors."""
    features = list(features)
    named = {f.name: f for f in with_columns(fields, features)}
    return [
        named[name]
        for name in dict.fromkeys(n for own in features for n in (own.field, *(c.name for c in own.columns)))
    ]


def joined_texts(parts: Sequence[FieldValues]) -> pa.Array:
    """Returns the text of each row: its values joined by commas, or null if all are missing."""
    # Without the empty string, Arrow 26 would drop a row whose values are all null.
    columns: list[Any] = [""]
    for part in parts:
        strings = part.strings
        if part.offsets is not None:
            lists = pa.ListArray.from_arrays(pa.array(part.offsets, pa.int32()), strings)
            strings = pc.binary_join(lists, _COMMA)
            strings = pc.if_else(pc.equal(strings, ""), None, strings)
        columns.append(strings)
    joined = pc.binary_join_element_wise(*columns, _COMMA, null_handling="skip")
    joined = pc.utf8_slice_codeunits(joined, len(_COMMA))
    return pc.if_else(pc.equal(joined, ""), None, joined)


def text_keys(texts: pa.Array) -> np.ndarray:
    """Returns a key for each text, int64 (texts,); `NO_KEY` for null. The keys are the same on every machine."""
    encoded = texts.dictionary_encode()
    found = [text_key(text) for text in encoded.dictionary.to_pylist()]
    distinct = np.array([*found, NO_KEY], dtype=np.int64)
    result: np.ndarray = distinct[encoded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)]
    return result


def text_key(text: str) -> int:
    """Returns a text's 64-bit hash as a signed integer that is never `NO_KEY`."""
    return _signed(xxhash.xxh3_64_intdigest(text.encode()))


def vector_keys(vectors: np.ndarray) -> np.ndarray:
    """Returns a key for each vector: float32 (vectors, size) -> int64 (vectors,); `NO_KEY` for a vector of NaN."""
    keys = [NO_KEY if np.isnan(v[0]) else _signed(xxhash.xxh3_64_intdigest(v.tobytes())) for v in vectors]
    return np.array(keys, dtype=np.int64)


def _signed(digest: int) -> int:
    return (digest - (1 << 63)) or 1
