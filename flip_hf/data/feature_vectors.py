"""The vectors of features: of each row in a vector field, of each value in a field with text features."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flip_hf.data.kinds import FieldValues
from flip_hf.data.schema import InputError
from flip_hf.data.text_features import NO_KEY, TextFeatures, joined_texts, text_keys, vector_keys
from flip_hf.data.vocabulary import FeatureVocabulary
from flip_hf.fetch import FetchError
from flip_hf.fields import oov_id, vector_sizes, with_nearest

VECTORS_NAME = "vectors.safetensors"
# A server keeps the vectors of so many new texts of a field in memory; the encoder's cache on disk holds all of them.
MAX_NEW_TEXTS = 2**17


class VectorScale(NamedTuple):
    """What vectors are standardised by: `(vector - mean) / scale`, float32 (size,) each."""

    mean: np.ndarray
    scale: np.ndarray

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """float (..., size) -> float32 (..., size)."""
        result: np.ndarray = (vectors.astype(np.float32) - self.mean) / self.scale
        return result


@dataclass(frozen=True)
class ValueVectors:
    """The vectors of a field's values.

    Attributes:
        keys: int64 (texts,), ascending, one for each distinct text or vector.
        vectors: (texts, size), float16 of an encoder, float32 of a column.
        value_keys: int64 (values,), for each value of the vocabulary the key of its vector, `NO_KEY` for none.
        other_values: int64 (others,), ascending, `text_key` of values that have a vector and no feature of their own.
        other_keys: int64 (others,), the keys of their vectors.
    """

    keys: np.ndarray
    vectors: np.ndarray
    value_keys: np.ndarray
    other_values: np.ndarray
    other_keys: np.ndarray

    def check(self, num_values: int, size: int, kind: Any) -> None:
        """Raises ValueError unless these can be the vectors, of that type, of a field of so many values."""
        num_keys, num_others = len(self.keys), len(self.other_values)
        expected = {
            "keys": (np.int64, (num_keys,)),
            "vectors": (kind, (num_keys, size)),
            "value_keys": (np.int64, (num_values,)),
            "other_values": (np.int64, (num_others,)),
            "other_keys": (np.int64, (num_others,)),
        }
        for name, (kind, shape) in expected.items():
            _part(vars(self), name, kind, shape)
        if not all((own[1:] > own[:-1]).all() for own in (self.keys, self.other_values)):
            raise ValueError("keys must ascend")
        wanted = np.concatenate([self.value_keys, self.other_keys])
        if (self.places(wanted[wanted != NO_KEY]) < 0).any():
            raise ValueError("the vector of a value is missing")
        if not np.isfinite(self.vectors).all():
            raise ValueError("a vector holds NaN or an infinite number")

    def keys_of_others(self, values: pa.Array) -> np.ndarray:
        """The keys of values without a feature of their own, int64 (values,), `NO_KEY` where no vector is known."""
        return _looked_up(text_keys(values), self.other_values, self.other_keys, NO_KEY)

    def places(self, keys: np.ndarray) -> np.ndarray:
        """The places of keys among `keys`, int64, -1 for those that are not there."""
        return _looked_up(keys, self.keys, np.arange(len(self.keys)), -1)


def add_new(known: dict[int, np.ndarray], keys: np.ndarray, vectors: np.ndarray) -> None:
    """Adds the vectors of keys that are not known yet: int64 (rows,), float (rows, size)."""
    for key, first in zip(*(part.tolist() for part in np.unique(keys, return_index=True)), strict=True):
        if key != NO_KEY and key not in known:
            # A view would keep the vectors of all rows.
            known[key] = vectors[first].copy()


def _looked_up(wanted: np.ndarray, known: np.ndarray, values: np.ndarray, default: int) -> np.ndarray:
    if not len(known):
        return np.full(wanted.shape, default, dtype=np.int64)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    result: np.ndarray = np.where(known[places] == wanted, values[places], default)
    return result


def _part(parts: Mapping[str, np.ndarray], name: str, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    found = parts[name]
    if found.dtype != kind or found.shape != shape:
        raise ValueError(f"{name!r} is {found.dtype} {found.shape}, not {np.dtype(kind)} {shape}")
    return found


class VectorSource(Protocol):
    """Vectors of texts, computed once; `flip_hf.text_vectors.TextVectorizer` is one."""

    @property
    def size(self) -> int:
        """Numbers of a vector."""

    @property
    def identity(self) -> str:
        """A fingerprint of all that decides a text's vector."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float16 (texts, size)."""

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The vectors of texts that were encoded before, by `text_key`: int64 (keys,) -> float16 (keys, size)."""


class FeatureVectors:
    """All vectors of a processor.

    Args:
        features: the text features.
        scales: what the vectors of each field are standardised by, by the field's name.
        values: the vectors of the values of each field with text features.
        make_source: makes what encodes new texts, where it is first needed.
    """

    def __init__(
        self,
        features: Sequence[TextFeatures],
        scales: Mapping[str, VectorScale],
        values: Mapping[str, ValueVectors],
        make_source: Callable[[TextFeatures], VectorSource],
    ) -> None:
        self.features = {own.field: own for own in features}
        self.scales = dict(scales)
        self.values = dict(values)
        self.make_source = make_source
        self._sources: dict[str, VectorSource] = {}
        self._lock = threading.Lock()
        # The vectors of values that came after fitting.
        self._new: dict[str, dict[int, np.ndarray]] = {own.field: {} for own in features}
        self._keys_by_id: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A worker loads its own encoder, if it ever needs one.
        return {**self.__dict__, "_sources": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def source(self, field: str) -> VectorSource:
        """What encodes new texts of a field.

        Raises:
            ValueError: the encoder is not the one that the field was fitted with.
        """
        if field not in self._sources:
            features = self.features[field]
            try:
                source = self.make_source(features)
            except FetchError as error:
                raise FetchError(
                    f"text features of {field!r}: texts that fitting did not see need the encoder "
                    f"{features.encoder!r}. processor.set_text_encoder({field!r}, folder) says where it is. {error}"
                ) from error
            if features.identity not in (None, source.identity):
                raise ValueError(
                    f"text features of {field!r}: the encoder {features.encoder} is not the one that the vectors of "
                    "the known values came from; fetch the revision that the processor was fitted with"
                )
            self._sources[field] = source
        return self._sources[field]

    def take_new(self, other: "FeatureVectors") -> None:
        """Takes over the vectors that another one has learned since fitting."""
        for field, known in other._new.items():
            self._new[field].update(known)

    def set_encoder(self, field: str, encoder: str) -> None:
        """Says where the encoder of a field's new texts is.

        Raises:
            ValueError: the field has no text features of an encoder.
        """
        if field not in self.features or self.features[field].encoder is None:
            known = [name for name, own in self.features.items() if own.encoder is not None]
            raise ValueError(f"no encoder belongs to {with_nearest([field], known)}")
        self.features[field] = replace(self.features[field], encoder=encoder)
        self._sources.pop(field, None)

    def row_keys(
        self,
        vocabulary: FeatureVocabulary,
        field: int,
        values: FieldValues,
        ids: np.ndarray,
        column: Callable[[str], FieldValues],
    ) -> np.ndarray:
        """The key of each value's vector, int64 (values,), `NO_KEY` for none.

        A value that fitting saw has the vector that it got there. Another one has that of its text in this row.

        Args:
            vocabulary: the processor's.
            field: the place of the field that the values are of.
            values: the values.
            ids: int64 (values,), their features.
            column: gives a column of the rows by its name.
        """
        owner = vocabulary.owner(field)
        features = self.features[vocabulary.fields[owner].name]
        keys = self._of_features(vocabulary, owner)[ids]
        unseen = np.flatnonzero(ids == oov_id(vocabulary.ranges[owner]))
        if not len(unseen):
            return keys
        strings = values.strings.take(pa.array(unseen))
        if features.is_of_value_alone:
            keys[unseen] = self._add_texts(features.field, strings)
            return keys
        keys[unseen] = self.values[features.field].keys_of_others(strings)
        left = unseen[keys[unseen] == NO_KEY]
        # What stands beside a value of a history tells of the row, not of that value.
        if len(left) and field == owner:
            columns = [column(own.name) for own in features.columns]
            if features.column is not None:
                vectors = columns[0].vectors
                assert vectors is not None
                keys[left] = self._add_vectors(features.field, vectors[left])
            else:
                keys[left] = self._add_texts(features.field, joined_texts(columns).take(pa.array(left)))
        return keys

    def _of_features(self, vocabulary: FeatureVocabulary, owner: int) -> np.ndarray:
        """For each feature of the vocabulary the key of its vector, int64 (features,)."""
        name = vocabulary.fields[owner].name
        if len(self._keys_by_id.get(name, ())) != len(vocabulary):
            keys = np.full(len(vocabulary), NO_KEY, dtype=np.int64)
            keys[vocabulary.valued(owner)[0]] = self.values[name].value_keys
            self._keys_by_id[name] = keys
        return self._keys_by_id[name]

    def _add_texts(self, field: str, texts: pa.Array) -> np.ndarray:
        """The keys of texts, whose vectors can be found from now on, int64 (texts,)."""
        keys, known = text_keys(texts), self._new[field]
        with self._lock:
            is_new = (keys != NO_KEY) & (self.values[field].places(keys) < 0)
            is_new[is_new] = [key not in known for key in keys[is_new].tolist()]
            new, firsts = np.unique(keys[is_new], return_index=True)
            if len(new):
                wanted = texts.filter(pa.array(is_new)).take(pa.array(firsts)).to_pylist()
                self._remember(field, new, self.source(field)(wanted))
        return keys

    def _remember(self, field: str, keys: np.ndarray, vectors: np.ndarray) -> None:
        """Keeps the vectors of new texts and forgets the oldest ones beyond `MAX_NEW_TEXTS`."""
        known = self._new[field]
        for key in list(islice(known, max(0, len(known) + len(keys) - MAX_NEW_TEXTS))):
            del known[key]
        known.update(zip(keys.tolist(), vectors, strict=True))

    def _add_vectors(self, field: str, vectors: np.ndarray) -> np.ndarray:
        """As `_add_texts`, of vectors that users bring: float32 (rows, size), NaN for none."""
        keys = vector_keys(vectors)
        with self._lock:
            add_new(self._new[field], keys, vectors)
        return keys

    def find(self, field: str, keys: np.ndarray) -> np.ndarray:
        """The standardised vectors of keys: int64 (keys,) -> float32 (keys, size).

        Raises:
            ValueError: nobody knows a key's vector any more.
        """
        own = self.values[field]
        places = own.places(keys)
        vectors = np.empty((len(keys), len(self.scales[field].mean)), own.vectors.dtype)
        vectors[places >= 0] = own.vectors[places[places >= 0]]
        if (places < 0).any():
            vectors[places < 0] = self._new_vectors(field, keys[places < 0])
        return self.scales[field].apply(vectors)

    def _new_vectors(self, field: str, keys: np.ndarray) -> np.ndarray:
        with self._lock:
            known, wanted = self._new[field], keys.tolist()
            if not all(key in known for key in wanted):
                # Another process has encoded these rows, or they were encoded many texts ago.
                if self.features[field].encoder is None:
                    raise ValueError(
                        f"field {field!r}: the rows were encoded by another process, which alone knows the vectors "
                        "that came with values that fitting did not see; encode the rows again in this one"
                    )
                distinct, firsts = np.unique(keys, return_index=True)
                self._remember(field, distinct, self.source(field).find(keys)[firsts])
            return np.stack([known[key] for key in wanted])

    @classmethod
    def load(
        cls,
        path: str,
        vocabulary: FeatureVocabulary,
        features: Sequence[TextFeatures],
        make_source: Callable[[TextFeatures], VectorSource],
    ) -> Self:
        """Reads what `save` wrote and holds it against the vocabulary that was saved beside it.

        Raises:
            InputError: the file can't be read, or its vectors are not those of the vocabulary's fields.
        """
        try:
            tensors = load_file(path)
            scales = {
                name: VectorScale(
                    *(_part(tensors, f"{name}.{part}", np.float32, (size,)) for part in VectorScale._fields)
                )
                for name, size in vector_sizes(vocabulary.fields).items()
            }
            for name, own_scale in scales.items():
                if not np.isfinite(own_scale).all() or not (own_scale.scale > 0).all():
                    raise ValueError(f"the scale of {name!r} must be positive, and its mean a number; neither is NaN")
            owners = {f.name: own for f, own in zip(vocabulary.fields, vocabulary.values, strict=True)}
            values = {}
            for own in features:
                parts = {f.name: tensors.pop(f"{own.field}.{f.name}") for f in fields(ValueVectors)}
                values[own.field] = ValueVectors(**parts)
                values[own.field].check(len(owners[own.field]), own.size or 0, own.vector_type)
            if unknown := sorted(set(tensors) - {f"{name}.{part}" for name in scales for part in VectorScale._fields}):
                raise ValueError(f"{unknown[0]!r} belongs to no field")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            message = f"not the vectors of this processor ({error}); fetch or save it again"
            raise InputError(message, source=path) from error
        return cls(features, scales, values, make_source)

    def tensors(self) -> dict[str, np.ndarray]:
        """All vectors and what belongs to them, by name."""
        scales = {f"{name}.{part}": value for name, own in self.scales.items() for part, value in own._asdict().items()}
        values = {f"{name}.{part}": value for name, own in self.values.items() for part, value in vars(own).items()}
        return scales | values

    def save(self, path: Path) -> None:
        """Writes the vectors as safetensors."""
        save_file({name: np.ascontiguousarray(value) for name, value in self.tensors().items()}, path)
