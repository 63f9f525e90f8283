"""Fields with one value per row, such as a user id."""

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flip_hf.data.kinds.base import CountedFeatures, FeatureCounter, FeatureIndex, FieldKind, FieldValues
from flip_hf.data.schema import canonical_strings
from flip_hf.fields import MISSING_OFFSET, NUM_RESERVED_FEATURES, OOV_OFFSET, FieldConfig

# Number of distinct values that fitting collects before it merges repeated ones.
_MERGE_AT = 1 << 20
# Up to this many strings, looking up each one is cheaper than finding the distinct ones.
_FEW = 8
# Number of strings hashed at a time, to limit the memory that Python strings take.
_HASHED_AT_ONCE = 1 << 16


class Categorical(FieldKind):
    """One value per row. It has its own feature or, with `hash_buckets`, shares the feature of its hash bucket."""

    def read(self, column: pa.ChunkedArray, field: FieldConfig, first_row: int, source: str | None) -> FieldValues:
        return FieldValues(*canonical_strings(column, field.name, first_row=first_row, source=source))

    def remembers(self, field: FieldConfig) -> bool:
        return field.hash_buckets is None

    def counter(self, field: FieldConfig) -> FeatureCounter:
        return ValueCounter(field.min_count) if field.hash_buckets is None else BucketCounter(field.hash_buckets)

    def index(self, field: FieldConfig, values: pa.Array) -> FeatureIndex:
        if field.hash_buckets is None:
            return ValueIndex(values)
        if len(values) != field.hash_buckets:
            raise ValueError(f"field {field.name!r} has {len(values)} buckets, but hash_buckets={field.hash_buckets}")
        return HashIndex(field.hash_buckets)


class ValueCounter(FeatureCounter):
    """Counts values. Memory grows with the number of distinct values only.

    Values are sorted by descending count, then alphabetically, so that ids don't depend on the order of the rows.

    Args:
        min_count: values seen fewer times have no feature of their own.
    """

    def __init__(self, min_count: int) -> None:
        self.min_count = min_count
        self._num_missing = 0
        self._parts: list[pa.Table] = []
        self._held = 0

    def add(self, values: FieldValues) -> None:
        self._num_missing += count_missing(values)
        counted = pc.value_counts(values.strings.drop_null())
        self._parts.append(pa.table({"value": counted.field(0), "count": counted.field(1)}))
        self._held += len(counted)
        if self._held > _MERGE_AT:
            self._merge()

    def _merge(self) -> pa.Table:
        merged = pa.concat_tables(self._parts).group_by("value").aggregate([("count", "sum")])
        merged = merged.rename_columns({"count_sum": "count"}).select(["value", "count"])
        self._parts = [merged]
        # Count only values added since the last merge. Otherwise a large field would merge at every batch.
        self._held = 0
        return merged

    def result(self) -> CountedFeatures:
        merged = self._merge().sort_by([("count", "descending"), ("value", "ascending")])
        kept = merged.filter(pc.greater_equal(merged["count"], self.min_count))
        num_rare = (pc.sum(merged["count"]).as_py() or 0) - (pc.sum(kept["count"]).as_py() or 0)
        counts = kept["count"].to_numpy().astype(np.int64)
        return CountedFeatures(kept["value"].combine_chunks(), counts, num_rare, self._num_missing)


class ValueIndex(FeatureIndex):
    """Looks up values among those that fitting kept. All other values are OOV.

    Takes 16 bytes per value besides the values themselves. A dict of Python strings would take ten times as much.

    Args:
        values: Arrow string array (features,), distinct.
    """

    def __init__(self, values: pa.Array) -> None:
        self._values = values
        parts = [_hashes(values.slice(i, _HASHED_AT_ONCE).to_pylist()) for i in range(0, len(values), _HASHED_AT_ONCE)]
        hashes = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        self._order = hashes.argsort(kind="stable")
        self._hashes = hashes[self._order]

    def feature_offsets(self, values: FieldValues) -> np.ndarray:
        return of_distinct(values.strings, self._find)

    def _find(self, texts: list[str]) -> np.ndarray:
        hashes = _hashes(texts)
        if len(texts) <= _FEW or not len(self._values):
            return np.array([self._find_one(*one) for one in zip(texts, hashes, strict=True)], dtype=np.int64)
        # Searching in ascending order uses the CPU cache better.
        ascending = hashes.argsort()
        ranks = np.empty_like(ascending)
        ranks[ascending] = np.searchsorted(self._hashes, hashes[ascending])
        ranks = np.minimum(ranks, len(self._order) - 1)
        places = self._order[ranks]
        is_same = pc.equal(self._values.take(pa.array(places)), pa.array(texts, pa.string())).to_numpy(False)
        found = np.where(is_same, NUM_RESERVED_FEATURES + places, OOV_OFFSET)
        # Different values may share a hash.
        for i in np.flatnonzero(~is_same & (self._hashes[ranks] == hashes)):
            found[i] = self._find_one(texts[i], hashes[i])
        return found

    def _find_one(self, text: str, hashed: np.int64) -> int:
        rank = int(self._hashes.searchsorted(hashed))
        while rank < len(self._hashes) and self._hashes[rank] == hashed:
            if self._values[self._order[rank]].as_py() == text:
                return NUM_RESERVED_FEATURES + int(self._order[rank])
            rank += 1
        return OOV_OFFSET


class BucketCounter(FeatureCounter):
    """Counts how many values hash into each bucket.

    Args:
        num_buckets: number of buckets.
    """

    def __init__(self, num_buckets: int) -> None:
        self._index = HashIndex(num_buckets)
        self._counts = np.zeros(NUM_RESERVED_FEATURES + num_buckets, dtype=np.int64)
        self._num_missing = 0

    def add(self, values: FieldValues) -> None:
        self._num_missing += count_missing(values)
        self._counts += np.bincount(self._index.feature_offsets(values), minlength=len(self._counts))

    def result(self) -> CountedFeatures:
        counts = self._counts[NUM_RESERVED_FEATURES:]
        names = pa.array([f"bucket {i}" for i in range(len(counts))], pa.string())
        return CountedFeatures(names, counts, 0, self._num_missing)


class HashIndex(FeatureIndex):
    """Hashes values into buckets, identically on every machine.

    Args:
        num_buckets: number of buckets.
    """

    def __init__(self, num_buckets: int) -> None:
        self._num_buckets = num_buckets

    def feature_offsets(self, values: FieldValues) -> np.ndarray:
        return of_distinct(values.strings, lambda texts: np.array(list(map(self._bucket, texts)), dtype=np.int64))

    def _bucket(self, text: str) -> int:
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
        return NUM_RESERVED_FEATURES + int.from_bytes(digest, "little") % self._num_buckets


def _hashes(texts: list[str]) -> np.ndarray:
    """Returns a 64-bit hash per string, int64 (texts,). The hashes differ between processes."""
    return np.fromiter(map(hash, texts), np.int64, len(texts))


def of_distinct(strings: pa.Array, find: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Returns each string's feature offset, int64 (values,). Looks up each distinct string once; null is MISSING."""
    if len(strings) <= _FEW:
        texts = strings.to_pylist()
        found = find([text or "" for text in texts])
        found[[text is None for text in texts]] = MISSING_OFFSET
        return found
    encoded = strings.dictionary_encode()
    # One more offset at the end, for nulls.
    distinct = np.append(find(encoded.dictionary.to_pylist()), MISSING_OFFSET)
    indices = encoded.indices.fill_null(len(distinct) - 1) if encoded.null_count else encoded.indices
    return distinct[indices.to_numpy()]


def count_missing(values: FieldValues) -> int:
    """Counts the rows without a value."""
    return values.strings.null_count if values.offsets is None else int((np.diff(values.offsets) == 0).sum())
