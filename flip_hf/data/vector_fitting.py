"""Fits the vectors of fields on batches of rows."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flip_hf.data.feature_vectors import FeatureVectors, ValueVectors, VectorScale, VectorSource, add_new
from flip_hf.data.files import is_place, shown
from flip_hf.data.text_features import (
    NO_KEY,
    TextFeatures,
    catalog_columns,
    joined_texts,
    text_keys,
    vector_keys,
    with_columns,
)
from flip_hf.data.vocabulary import Batch, FeatureVocabulary
from flip_hf.fields import FieldConfig

# Number of (value, text) pairs that fitting collects before it merges equal ones.
_MERGE_AT = 1 << 20
_NUMBERS_AT_ONCE = 1 << 17

logger = logging.getLogger(__name__)


class VectorStatistics:
    """Computes the mean and standard deviation of each dimension over batches of vectors.

    Merges the batches' moments as in Chan, Golub and LeVeque (1979), in float64.

    Args:
        size: dimension of a vector.
    """

    def __init__(self, size: int) -> None:
        self._count = 0
        self._mean = np.zeros(size)
        self._squares = np.zeros(size)

    def add(self, vectors: np.ndarray) -> None:
        """Adds float (vectors, size); ignores vectors of NaN."""
        # In parts that fit in the CPU cache.
        rows_at_once = max(1, _NUMBERS_AT_ONCE // vectors.shape[1])
        for start in range(0, len(vectors), rows_at_once):
            self._add(vectors[start : start + rows_at_once])

    def _add(self, vectors: np.ndarray) -> None:
        present = vectors[~np.isnan(vectors[:, 0])].astype(np.float64)
        if not len(present):
            return
        mean = present.mean(axis=0)
        total, difference = self._count + len(present), mean - self._mean
        self._squares += ((present - mean) ** 2).sum(axis=0) + difference**2 * (self._count * len(present) / total)
        self._mean += difference * (len(present) / total)
        self._count = total

    def result(self) -> VectorScale:
        """Returns the mean and standard deviation. A constant dimension gets a scale of 1."""
        deviation = np.sqrt(self._squares / max(self._count, 1))
        # Rounding makes the deviation of a constant slightly larger than 0. A smaller one could become 0 as float32.
        is_constant = deviation <= np.maximum(1e-6 * np.abs(self._mean), np.finfo(np.float32).tiny)
        return VectorScale(self._mean.astype(np.float32), np.where(is_constant, 1, deviation).astype(np.float32))


class _ValueTexts:
    """Finds the text of each value of a field: its most frequent text. Ties go to the alphabetically first text.

    Args:
        features: the field's text features.
    """

    def __init__(self, features: TextFeatures) -> None:
        self.features = features
        self.vectors: dict[int, np.ndarray] = {}
        self._parts: list[pa.Table] = []
        self._held = 0

    def add(self, batch: Batch) -> None:
        """Adds a batch of rows."""
        columns = [batch[own.name] for own in self.features.columns]
        if self.features.column is None:
            texts = joined_texts(columns)
        else:
            vectors = columns[0].vectors
            assert vectors is not None
            keys = vector_keys(vectors)
            add_new(self.vectors, keys, vectors)
            texts = pc.if_else(pa.array(keys == NO_KEY), None, pa.array(keys).cast(pa.string()))
        pairs = pa.table({"value": batch[self.features.field].strings, "text": texts}).drop_null()
        self._parts.append(pairs.group_by(["value", "text"]).aggregate([([], "count_all")]))
        self._held += len(self._parts[-1])
        if self._held > _MERGE_AT:
            self._merge()

    def _merge(self) -> pa.Table:
        merged = pa.concat_tables(self._parts).group_by(["value", "text"]).aggregate([("count_all", "sum")])
        merged = merged.rename_columns({"count_all_sum": "count_all"}).select(["value", "text", "count_all"])
        self._parts = [merged]
        self._held = 0
        return merged

    def result(self) -> tuple[pa.Array, pa.Array]:
        """Returns the distinct values and their texts, two Arrow string arrays (values,)."""
        if not self._parts:
            return pa.array([], pa.string()), pa.array([], pa.string())
        order = [("value", "ascending"), ("count_all", "descending"), ("text", "ascending")]
        pairs = self._merge().sort_by(order).combine_chunks()
        values, texts = (pairs[name].combine_chunks() for name in ("value", "text"))
        codes = values.dictionary_encode().indices.to_numpy()
        is_first = np.diff(codes, prepend=-1) != 0
        if not is_first.all():
            second = int((~is_first).argmax())
            logger.warning(
                "text features of %r: %d of %d values occur with several values of %s; the most frequent one is used; "
                "for value %r that is %r and not %r",
                self.features.field,
                len(np.unique(codes[~is_first])),
                int(is_first.sum()),
                ", ".join(self.features.fields) or self.features.column,
                values[second].as_py(),
                texts[second - 1].as_py(),
                texts[second].as_py(),
            )
        firsts = pa.array(is_first)
        return values.filter(firsts), texts.filter(firsts)


class VectorFitting:
    """Observes the batches on which a vocabulary is fitted, to fit the vectors in the same pass.

    Args:
        fields: the fields.
        features: the text features.
    """

    def __init__(self, fields: Sequence[FieldConfig], features: Sequence[TextFeatures]) -> None:
        self._features = list(features)
        self._statistics = {f.name: VectorStatistics(f.size) for f in fields if f.size is not None}
        self._texts = {own.field: _ValueTexts(own) for own in features if not own.is_of_value_alone}

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches unchanged and observes each one."""
        for batch in batches:
            for name, statistics in self._statistics.items():
                vectors = batch[name].vectors
                assert vectors is not None
                statistics.add(vectors)
            self.add_values(batch)
            yield batch

    def add_values(self, batch: Batch) -> None:
        """Learns only the texts of values, for example from the rows of a catalog, which are not training rows."""
        for texts in self._texts.values():
            texts.add(batch)

    def result(
        self, vocabulary: FeatureVocabulary, make_source: Callable[[TextFeatures], VectorSource]
    ) -> FeatureVectors:
        """Returns the fitted vectors. `make_source` creates the encoder of their texts."""
        scales = {name: statistics.result() for name, statistics in self._statistics.items()}
        values: dict[str, ValueVectors] = {}
        fitted = []
        for own in self._features:
            source = None if own.encoder is None else make_source(own)
            values[own.field] = _value_vectors(vocabulary, own, self._texts.get(own.field), source)
            scales[own.field] = _scale_of(values[own.field].vectors)
            if source is not None:
                own = replace(own, size=source.size, identity=source.identity)
            fitted.append(own)
        return FeatureVectors(fitted, scales, values, make_source)

    def extended(self, vocabulary: FeatureVocabulary, vectors: FeatureVectors) -> FeatureVectors:
        """Returns `vectors` plus those of the values that these rows added to the vocabulary. Keeps the scales."""
        values = dict(vectors.values)
        for own in self._features:
            source = None if own.encoder is None else vectors.source(own.field)
            added = _value_vectors(vocabulary, own, self._texts.get(own.field), source)
            values[own.field] = _united(vectors.values[own.field], added, _values_of(vocabulary, own))
        extended = FeatureVectors(self._features, vectors.scales, values, vectors.make_source)
        extended.take_new(vectors)
        return extended


def _value_vectors(
    vocabulary: FeatureVocabulary, features: TextFeatures, texts: _ValueTexts | None, source: VectorSource | None
) -> ValueVectors:
    own = _values_of(vocabulary, features)
    values, found = (own, own) if texts is None else texts.result()
    if source is None:
        assert texts is not None
        keys = found.cast(pa.int64()).to_numpy()
        distinct = np.unique(keys)
        found_vectors = [texts.vectors[key] for key in distinct.tolist()]
        vectors = np.stack(found_vectors) if found_vectors else np.empty((0, features.size or 0), np.float32)
    else:
        keys = text_keys(found)
        distinct, firsts = np.unique(keys, return_index=True)
        vectors = source(found.take(pa.array(firsts)).to_pylist())
    places = pc.fill_null(pc.index_in(own, values), len(keys)).to_numpy(zero_copy_only=False)
    value_keys = np.append(keys, NO_KEY)[places]
    is_other = pc.invert(pc.is_in(values, own)).to_numpy(zero_copy_only=False)
    other_values, other_keys = text_keys(values.filter(pa.array(is_other))), keys[is_other]
    order = np.argsort(other_values)
    return ValueVectors(distinct, vectors, value_keys, other_values[order], other_keys[order])


def _values_of(vocabulary: FeatureVocabulary, features: TextFeatures) -> pa.Array:
    """Returns the values of the field that the features are attached to."""
    return vocabulary.values[[f.name for f in vocabulary.fields].index(features.field)]


def _united(old: ValueVectors, new: ValueVectors, values: pa.Array) -> ValueVectors:
    """Merges two sets of vectors. A value that has a vector in `old` keeps it. `values` are the vocabulary's."""
    is_new = old.places(new.keys) < 0
    keys = np.concatenate([old.keys, new.keys[is_new]])
    order = np.argsort(keys)
    # A value may have had a vector before it had a feature.
    before = np.concatenate([old.value_keys, old.keys_of_others(values.slice(len(old.value_keys)))])
    value_keys = np.where(before == NO_KEY, new.value_keys, before)
    others, firsts = np.unique(np.concatenate([old.other_values, new.other_values]), return_index=True)
    other_keys = np.concatenate([old.other_keys, new.other_keys])[firsts]
    vectors = np.concatenate([old.vectors, new.vectors[is_new]])[order]
    return ValueVectors(keys[order], vectors, value_keys, others, other_keys)


def _scale_of(vectors: np.ndarray) -> VectorScale:
    statistics = VectorStatistics(vectors.shape[1])
    statistics.add(vectors)
    return statistics.result()


def fit_fields(
    batches: Callable[..., Iterator[Batch]],
    dataset: Any,
    source: str | None,
    fields: Sequence[FieldConfig],
    features: Sequence[TextFeatures],
    catalog: Any,
    make_source: Callable[[TextFeatures], VectorSource],
) -> tuple[FeatureVocabulary, FeatureVectors]:
    """Fits the vocabulary and the vectors in one pass over the rows.

    Args:
        batches: reads columns of rows in batches: `value_batches` with the label and CSV format already set.
        dataset: the training rows.
        source: name of the rows, for error messages.
        fields: the fields, not yet fitted.
        features: the text features.
        catalog: rows of which only the text features' columns are read; None for none.
        make_source: creates the encoder of some text features.
    """
    fitting = VectorFitting(fields, features)
    vocabulary = FeatureVocabulary.fit(
        fitting.watch(batches(dataset, with_columns(fields, features), source=source)), fields
    )
    if catalog is not None:
        place = shown(catalog) if is_place(catalog) else "the catalog"
        for batch in batches(catalog, catalog_columns(fields, features), source=place):
            fitting.add_values(batch)
    vectors = fitting.result(vocabulary, make_source)
    sizes = {own.field: own.size for own in vectors.features.values()}
    vocabulary.fields = [replace(f, vector_size=sizes.get(f.name)) for f in vocabulary.fields]
    return vocabulary, vectors
