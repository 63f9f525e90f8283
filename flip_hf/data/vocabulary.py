"""Stores which values of each field have a feature of their own, and how often fitting saw them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from flip_hf.data.kinds import KINDS, FieldValues
from flip_hf.data.kinds.base import CountedFeatures, FeatureIndex
from flip_hf.data.schema import InputError
from flip_hf.fields import (
    MISSING_OFFSET,
    NUM_RESERVED_FEATURES,
    NUM_SHARED_FEATURES,
    OOV_OFFSET,
    PADDING_ID,
    FieldConfig,
    missing_id,
    num_features,
    oov_id,
    owned_ranges,
)

_RESERVED = ("oov", "missing")
_SHARED = ("padding", "mask")
_SCHEMA = pa.schema(
    [
        ("field", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.string()),
        ("reserved", pa.dictionary(pa.int8(), pa.string())),
        ("count", pa.int64()),
    ]
)

_NO_VALUES = pa.array([], pa.string())
_HASHED_AT_ONCE = 1 << 16

# Reading these columns as dictionaries keeps a repeated string in memory only once.
_STRINGS = ["field", "value", "reserved"]
# Memory limit for a loaded vocabulary: `_MOST_TIMES` times the file size, but at least `_LARGEST_SMALL` bytes.
_LARGEST_SMALL = 1 << 26
_MOST_TIMES = 1000
_ROW_BYTES = 32
_LARGEST_NOTE = 1 << 20

Batch = Mapping[str, FieldValues]
"""Maps each field's name to its values in a batch of rows."""


class Positions(NamedTuple):
    """A field's columns of `feature_ids`.

    Attributes:
        ids: int64 (rows, num_positions), the feature ids.
        places: int64 (rows, num_positions), the index of the field's value at each position, -1 for none.
        has_oov: bool (rows,), true for rows with an OOV value.
        is_cut: bool (rows,), true for rows with more values than positions.
    """

    ids: np.ndarray
    places: np.ndarray
    has_oov: np.ndarray
    is_cut: np.ndarray


def placed_values(values: np.ndarray, places: np.ndarray, filler: int) -> np.ndarray:
    """Puts values at their positions, `filler` elsewhere: int64 (values,) -> int64 (rows, num_positions)."""
    if not len(values):
        return np.full(places.shape, filler, dtype=np.int64)
    result: np.ndarray = np.where(places >= 0, values[places], filler)
    return result


class FeatureVocabulary:
    """The features of all fields in one global id space.

    Ids 0 and 1 are padding and mask. Each field that owns features has a contiguous range after them: its OOV feature,
    its MISSING feature, and its values by descending count (ties alphabetically). Ids therefore depend neither on the
    order of the rows nor on the order of the columns. `extended` adds new features after all existing ones.

    Args:
        fields: fitted fields, in the order of their ranges.
        values: for each field, the values of the features that it owns, in the order of their ids.
        counts: int64 (features,), how often fitting saw each feature.
    """

    def __init__(self, fields: Sequence[FieldConfig], values: Sequence[pa.Array], counts: np.ndarray) -> None:
        self.fields = list(fields)
        self.values = list(values)
        self.counts = counts
        self.ranges = owned_ranges(self.fields)
        # Index of the field that owns each field's features: itself, or the field whose features it shares.
        self._owners = [_owner(self.fields, f) for f in self.fields]
        self._indices: dict[int, FeatureIndex] = {}

    def __len__(self) -> int:
        return num_features(self.fields)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, FeatureVocabulary)
            and self.fields == other.fields
            and all(a.equals(b) for a, b in zip(self.values, other.values, strict=True))
            and np.array_equal(self.counts, other.counts)
        )

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        # Indices are rebuilt on demand, so worker processes and caches need not store them.
        return {**self.__dict__, "_indices": {}}

    @classmethod
    def fit(cls, batches: Iterable[Batch], fields: Sequence[FieldConfig]) -> Self:
        """Finds the features of each field in batches of rows.

        Args:
            batches: the rows.
            fields: the fields to fit, without sizes.

        Raises:
            InputError: there are no rows.
        """
        counters = {f.name: KINDS[f.kind].counter(f) for f in fields if f.owns_features}
        num_rows = 0
        for batch in batches:
            for f in fields:
                if f.traits.has_features:
                    counters[f.share_embedding or f.name].add(batch[f.name])
            num_rows += len(batch[fields[0].name])
        if num_rows == 0:
            raise InputError("there are no rows to fit on; check the file, or the filter that made the rows")

        found = [counters[f.name].result() if f.owns_features else None for f in fields]
        values = [_NO_VALUES if features is None else features.values for features in found]
        fitted = [
            f.fitted(_size(features), value_hash(own) if f.owns_features else None)
            for f, features, own in zip(fields, found, values, strict=True)
        ]
        counts = [np.zeros(NUM_SHARED_FEATURES, dtype=np.int64)]
        counts += [np.concatenate([_reserved_counts(f), f.counts]) for f in found if f is not None]
        return cls(fitted, values, np.concatenate(counts))

    def extended(self, batches: Iterable[Batch]) -> Self:
        """Returns a copy with features for the new values of further rows, after all existing features.

        Only fields that remember their values grow. Every number and every hashed value has a bucket already. A value
        that these rows hold fewer than `min_count` times stays OOV.

        Args:
            batches: the rows.

        Raises:
            InputError: there are no rows.
        """
        growing = [i for i, f in enumerate(self.fields) if f.owns_features and KINDS[f.kind].remembers(f)]
        counters = {i: KINDS[self.fields[i].kind].counter(self.fields[i]) for i in growing}
        counts = self.counts.copy()
        num_rows = 0
        for batch in batches:
            for i, field in enumerate(self.fields):
                if self._owners[i] in counters:
                    counters[self._owners[i]].add(batch[field.name])
                elif field.traits.has_features:
                    counts += np.bincount(self.lookup(i, batch[field.name]), minlength=len(counts))
            num_rows += len(batch[self.fields[0].name])
        if num_rows == 0:
            raise InputError("there are no rows to extend by; check the file, or the filter that made the rows")

        values, added = list(self.values), []
        fields = [f.extended(0, value_hash(_NO_VALUES)) for f in self.fields]
        for i, counter in counters.items():
            found, ids = counter.result(), self._ids(i)
            counts[ids[:NUM_RESERVED_FEATURES]] += _reserved_counts(found)
            places = pc.fill_null(pc.index_in(found.values, values[i]), -1).to_numpy(zero_copy_only=False)
            is_new = places < 0
            counts[ids[NUM_RESERVED_FEATURES + places[~is_new]]] += found.counts[~is_new]
            new = found.values.filter(pa.array(is_new))
            fields[i] = self.fields[i].extended(len(new), value_hash(new))
            values[i] = pa.concat_arrays([values[i], new])
            added.append(found.counts[is_new])
        return type(self)(fields, values, np.concatenate([counts, *added]))

    def make_indices(self) -> None:
        """Builds all indices now instead of at the first `lookup`, so that threads can share this vocabulary."""
        for owner in {self._owners[i] for i, f in enumerate(self.fields) if f.traits.has_features}:
            self._index(owner)

    def _index(self, owner: int) -> FeatureIndex:
        if owner not in self._indices:
            self._indices[owner] = KINDS[self.fields[owner].kind].index(self.fields[owner], self.values[owner])
        return self._indices[owner]

    def lookup(self, field: int, values: FieldValues) -> np.ndarray:
        """Returns the feature ids of values, int64 (values,).

        Null becomes the field's MISSING feature. A value that fitting did not keep becomes its OOV feature.

        Args:
            field: index of the field.
            values: its values.
        """
        owner = self._owners[field]
        offsets = self._index(owner).feature_offsets(values)
        ranges = self.ranges[owner]
        # A field that was never extended has one contiguous range.
        if len(ranges) == 1:
            return ranges[0][0] + offsets
        sizes = np.array([end - first for first, end in ranges])
        shifts = np.array([first for first, _ in ranges]) - (sizes.cumsum() - sizes)
        return offsets + shifts[np.searchsorted(sizes.cumsum(), offsets, side="right")]

    def owner(self, field: int) -> int:
        """Returns the index of the field that owns the features of the field with this index."""
        return self._owners[field]

    def keys(self, field: int, ids: np.ndarray) -> np.ndarray | None:
        """Returns `FieldValues.keys` for ids that `lookup` returned; None if the field remembers no values."""
        owner = self._owners[field]
        if not KINDS[self.fields[owner].kind].remembers(self.fields[owner]):
            return None
        return np.where(ids == oov_id(self.ranges[owner]), -1, ids)

    def positions(self, field: int, values: FieldValues, ids: np.ndarray) -> Positions:
        """Fills the field's columns of `feature_ids`.

        Args:
            field: index of the field.
            values: its values.
            ids: their feature ids, as `lookup` returned them.
        """
        ranges = self.ranges[self._owners[field]]
        kind, unseen = KINDS[self.fields[field].kind], oov_id(ranges)
        places, cut = kind.arrange(ids, values, self.fields[field], unseen)
        placed = placed_values(ids, places, PADDING_ID)
        placed[places[:, 0] < 0, 0] = missing_id(ranges)
        return Positions(placed, places, (placed == unseen).any(axis=1), cut)

    def valued(self, field: int) -> tuple[np.ndarray, pa.Array]:
        """Returns the ids (int64) and the values of the features that stand for a value of the field."""
        return self._ids(field)[NUM_RESERVED_FEATURES:], self.values[field]

    def describe(self, feature_id: int) -> tuple[str | None, str]:
        """Returns a feature's field and value; `<oov>`, `<missing>`, `<padding>` or `<mask>` for reserved features."""
        if feature_id < NUM_SHARED_FEATURES:
            return None, f"<{_SHARED[feature_id]}>"
        for i, field in enumerate(self.fields):
            place = 0
            for first, end in self.ranges[i]:
                if first <= feature_id < end:
                    place += feature_id - first
                    if place < NUM_RESERVED_FEATURES:
                        return field.name, f"<{_RESERVED[place]}>"
                    return field.name, self.values[i][place - NUM_RESERVED_FEATURES].as_py()
                place += end - first
        raise IndexError(f"feature {feature_id} is outside the vocabulary, which has {len(self)} features")

    def to_table(self) -> pa.Table:
        """Returns a table with one row per feature, sorted by id: field, value, reserved name (if any), count."""
        names: list[pa.Array] = [pa.nulls(NUM_SHARED_FEATURES, pa.string())]
        values: list[pa.Array] = [pa.nulls(NUM_SHARED_FEATURES, pa.string())]
        reserved: list[pa.Array] = [pa.array(_SHARED, pa.string())]
        ids = [np.arange(NUM_SHARED_FEATURES)]
        for i, (field, own) in enumerate(zip(self.fields, self.values, strict=True)):
            if field.owns_features:
                names.append(pa.repeat(field.name, NUM_RESERVED_FEATURES + len(own)))
                values += [pa.nulls(NUM_RESERVED_FEATURES, pa.string()), own]
                reserved += [pa.array(_RESERVED, pa.string()), pa.nulls(len(own), pa.string())]
                ids.append(self._ids(i))
        order = pa.array(np.argsort(np.concatenate(ids)))
        columns = [pa.concat_arrays(part).take(order) for part in (names, values, reserved)]
        return pa.Table.from_arrays([*columns, pa.array(self.counts)], names=_SCHEMA.names).cast(_SCHEMA)

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary as a Parquet file."""
        pq.write_table(self.to_table(), path, compression="zstd")

    @classmethod
    def load(cls, path: str | Path, fields: Sequence[FieldConfig]) -> Self:
        """Reads a file that `save` wrote, and checks that it matches the fields saved beside it.

        Raises:
            InputError: the file can't be read, or its features don't match the fields.
        """
        try:
            with pq.ParquetFile(path, thrift_string_size_limit=_LARGEST_NOTE) as file:
                metadata = file.metadata
            if metadata.schema.names != _SCHEMA.names:
                raise ValueError(f"the columns are {metadata.schema.names}, not {_SCHEMA.names}")
            _check_size(metadata, Path(path), num_features(fields))
            table = pq.read_table(path, read_dictionary=_STRINGS)
            _check_strings(table, Path(path))
            table = table.cast(_SCHEMA)
            # Arrow does not check that a Parquet file's strings are UTF-8.
            table.validate(full=True)
        except (pa.ArrowException, LookupError, OSError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"not a readable vocabulary ({error}); download or save it again", source=str(path)
            ) from error
        if table["count"].null_count or (len(table) and pc.min(table["count"]).as_py() < 0):
            raise InputError("counts of features must be 0 or more; save the vocabulary again", source=str(path))
        names = table["field"].cast(pa.string())
        reserved = table["reserved"].cast(pa.string())
        values = []
        for field, ranges in zip(fields, owned_ranges(fields), strict=True):
            slices = [slice(first, end) for first, end in ranges]
            own = pa.concat_arrays(
                [chunk for s in slices for chunk in table["value"][s].chunks] or [pa.array([], pa.string())]
            )
            own = own.slice(NUM_RESERVED_FEATURES)
            if ranges and (
                any(pc.unique(names[s]).to_pylist() != [field.name] for s in slices)
                or reserved[slices[0]][:NUM_RESERVED_FEATURES].to_pylist() != list(_RESERVED)
                or own.null_count
                or pc.count_distinct(own).as_py() != len(own)
                or not _is_index(field, own)
            ):
                raise InputError(
                    f"rows {ranges[0][0]} to {ranges[-1][1] - 1} are not the features of this field; the vocabulary "
                    "was edited or belongs to another processor, so save the processor again",
                    source=str(path),
                    field=field.name,
                )
            if field.value_hashes and _hashes(field, own) != field.value_hashes:
                message = "the values differ from those that the field was fitted on; save the processor again"
                raise InputError(message, source=str(path), field=field.name)
            values.append(own)
        return cls(fields, values, table["count"].to_numpy().copy())

    def _ids(self, field: int) -> np.ndarray:
        """Returns the ids of the features that the field with this index owns, int64 (features,)."""
        return np.concatenate([np.arange(first, end) for first, end in self.ranges[field]])


def value_hash(values: pa.Array) -> str:
    """Returns a hash of the strings in their order, 32 hexadecimal digits. Their memory layout makes no difference."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(values), _HASHED_AT_ONCE):
        part = values.slice(start, _HASHED_AT_ONCE)
        digest.update(pc.binary_length(part).to_numpy().tobytes())
        digest.update("".join(part.to_pylist()).encode())
    return digest.hexdigest()


def _hashes(field: FieldConfig, values: pa.Array) -> tuple[str, ...]:
    """Returns `value_hash` of the values of the fit and of each extension."""
    assert field.num_features is not None
    ends = np.cumsum([field.num_features - NUM_RESERVED_FEATURES, *field.added_features]).tolist()
    return tuple(value_hash(values[start:end]) for start, end in zip([0, *ends], ends, strict=False))


def _check_size(metadata: pq.FileMetaData, path: Path, num_features: int) -> None:
    """Raises InputError, before the file is read, if its metadata doesn't match a vocabulary of `num_features`."""
    if metadata.num_rows != num_features:
        raise InputError(
            f"holds {metadata.num_rows} features, but the fields beside it have {num_features}; the two were "
            "not saved together, so save the processor again",
            source=str(path),
        )
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    _check_bytes(sum(column.total_uncompressed_size for column in columns) + _ROW_BYTES * num_features, path)


def _check_strings(table: pa.Table, path: Path) -> None:
    """Raises InputError if dictionary-encoded columns would take too much memory once decoded."""
    for name in _STRINGS:
        lengths = [pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in table[name].chunks]
        _check_bytes(sum(pc.sum(chunk).as_py() or 0 for chunk in lengths), path)


def _check_bytes(number: int, path: Path) -> None:
    most = max(_LARGEST_SMALL, _MOST_TIMES * path.stat().st_size)
    if number > most:
        raise InputError(
            f"would take {number} bytes of memory, over {_MOST_TIMES} times the file size, so FLIP did not "
            "write the file; save the vocabulary again",
            source=str(path),
        )


def _owner(fields: Sequence[FieldConfig], field: FieldConfig) -> int:
    """Returns the index of the field whose features the field uses."""
    return [f.name for f in fields].index(field.share_embedding or field.name)


def _size(features: CountedFeatures | None) -> int:
    return 0 if features is None else NUM_RESERVED_FEATURES + len(features.values)


def _reserved_counts(features: CountedFeatures) -> np.ndarray:
    counts = np.zeros(NUM_RESERVED_FEATURES, dtype=np.int64)
    counts[OOV_OFFSET], counts[MISSING_OFFSET] = features.num_oov, features.num_missing
    return counts


def _is_index(field: FieldConfig, values: pa.Array) -> bool:
    """Whether values read from a file are valid for the field's index."""
    try:
        KINDS[field.kind].index(field, values)
    except (ValueError, pa.ArrowException):
        return False
    return True
