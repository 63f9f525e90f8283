"""Which values of each field have a feature of their own, and how often they were seen."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flip_hf.configuration_flip import (
    MISSING_OFFSET,
    NUM_RESERVED_FEATURES,
    NUM_SHARED_FEATURES,
    OOV_OFFSET,
    FieldConfig,
    field_bounds,
)
from flip_hf.data.schema import InputError

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
# Distinct values that fitting may hold unmerged before it sums up what repeats.
_MERGE_AT = 1 << 20


class FeatureVocabulary:
    """The features of all fields in one global id space.

    Ids 0 and 1 are padding and mask. Each field then owns a contiguous range: its OOV feature, its MISSING feature, and
    its values, the frequent ones first (ties in the order of their characters), so that ids depend neither on the
    order of the rows nor on that of the columns.

    Args:
        fields: fitted fields, in the order of their ranges.
        values: for each field its values, in the order of their ids.
        counts: int64 (features,), how often each feature was seen in fitting.
    """

    def __init__(self, fields: Sequence[FieldConfig], values: Sequence[pa.Array], counts: np.ndarray) -> None:
        self.fields = list(fields)
        self.values = list(values)
        self.counts = counts
        self.bounds = field_bounds(self.fields)
        self._ids: list[dict[str, int] | None] = [None] * len(self.fields)

    def __len__(self) -> int:
        return self.bounds[-1]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, FeatureVocabulary)
            and self.fields == other.fields
            and all(a.equals(b) for a, b in zip(self.values, other.values, strict=True))
            and np.array_equal(self.counts, other.counts)
        )

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        # The lookup tables are rebuilt where they are needed; workers and caches should not carry them.
        return {**self.__dict__, "_ids": [None] * len(self.fields)}

    @classmethod
    def fit(cls, batches: Iterable[Mapping[str, pa.Array]], fields: Sequence[FieldConfig]) -> Self:
        """Counts the values of each field over batches of rows.

        Args:
            batches: for each field's name its canonical strings, null where missing (`data.schema.canonical_strings`).
            fields: the fields to fit, not yet sized.

        Raises:
            InputError: there are no rows.
        """
        counters = [_ValueCounter() for _ in fields]
        num_rows = 0
        for batch in batches:
            for field, counter in zip(fields, counters, strict=True):
                counter.add(batch[field.name])
            num_rows += len(batch[fields[0].name])
        if num_rows == 0:
            raise InputError("there are no rows to fit on; check the file or the filter that made them")

        fitted, values, counts = [], [], [np.zeros(NUM_SHARED_FEATURES, dtype=np.int64)]
        for field, counter in zip(fields, counters, strict=True):
            kept, kept_counts, num_rare = counter.result(field.min_count)
            fitted.append(field.fitted(NUM_RESERVED_FEATURES + len(kept)))
            values.append(kept)
            reserved = np.zeros(NUM_RESERVED_FEATURES, dtype=np.int64)
            reserved[OOV_OFFSET], reserved[MISSING_OFFSET] = num_rare, counter.num_missing
            counts += [reserved, kept_counts]
        return cls(fitted, values, np.concatenate(counts))

    def lookup(self, field: int, values: pa.Array) -> np.ndarray:
        """Feature ids of canonical strings of the field at that place, int64 (len(values),).

        A null is the field's MISSING feature, a value that fitting did not keep its OOV feature.
        """
        ids = self._ids[field]
        if ids is None:
            first = self.bounds[field] + NUM_RESERVED_FEATURES
            ids = dict(zip(self.values[field].to_pylist(), range(first, self.bounds[field + 1]), strict=True))
            self._ids[field] = ids
        encoded = values.dictionary_encode()
        oov = self.bounds[field] + OOV_OFFSET
        distinct = np.array([ids.get(v, oov) for v in encoded.dictionary.to_pylist()], dtype=np.int64)
        # One more place, for the nulls.
        distinct = np.append(distinct, self.bounds[field] + MISSING_OFFSET)
        return distinct[encoded.indices.fill_null(len(distinct) - 1).to_numpy(zero_copy_only=False)]

    def describe(self, feature_id: int) -> tuple[str | None, str]:
        """The field and the value of a feature; `<oov>`, `<missing>`, `<padding>` or `<mask>` for reserved ones."""
        if feature_id < NUM_SHARED_FEATURES:
            return None, f"<{_SHARED[feature_id]}>"
        field = int(np.searchsorted(self.bounds, feature_id, side="right")) - 1
        place = feature_id - self.bounds[field]
        if place < NUM_RESERVED_FEATURES:
            return self.fields[field].name, f"<{_RESERVED[place]}>"
        return self.fields[field].name, self.values[field][place - NUM_RESERVED_FEATURES].as_py()

    def to_table(self) -> pa.Table:
        """One row a feature, in the order of the ids: field, value, which reserved feature it is if any, count."""
        names: list[pa.Array] = [pa.nulls(NUM_SHARED_FEATURES, pa.string())]
        values: list[pa.Array] = [pa.nulls(NUM_SHARED_FEATURES, pa.string())]
        reserved: list[pa.Array] = [pa.array(_SHARED, pa.string())]
        for field, own in zip(self.fields, self.values, strict=True):
            names.append(pa.repeat(field.name, NUM_RESERVED_FEATURES + len(own)))
            values += [pa.nulls(NUM_RESERVED_FEATURES, pa.string()), own]
            reserved += [pa.array(_RESERVED, pa.string()), pa.nulls(len(own), pa.string())]
        columns = [pa.concat_arrays(names), pa.concat_arrays(values), pa.concat_arrays(reserved), pa.array(self.counts)]
        return pa.Table.from_arrays(columns, names=_SCHEMA.names).cast(_SCHEMA)

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary as Parquet."""
        pq.write_table(self.to_table(), path, compression="zstd")

    @classmethod
    def load(cls, path: str | Path, fields: Sequence[FieldConfig]) -> Self:
        """Reads what `save` wrote and holds it against the fields that were saved beside it.

        Raises:
            InputError: the file can't be read, or its features are not those that the fields describe.
        """
        try:
            table = pq.read_table(path).cast(_SCHEMA)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"not a readable vocabulary ({error}); fetch or save it again", source=str(path)
            ) from error
        bounds = field_bounds(fields)
        if len(table) != bounds[-1]:
            raise InputError(
                f"holds {len(table)} features, but the fields beside it have {bounds[-1]}; the two were not saved "
                "together",
                source=str(path),
            )
        names = table["field"].cast(pa.string())
        reserved = table["reserved"].cast(pa.string())
        values, value_column = [], table["value"].combine_chunks()
        for field, start, end in zip(fields, bounds[:-1], bounds[1:], strict=True):
            first_value = start + NUM_RESERVED_FEATURES
            own = value_column.slice(first_value, end - first_value)
            if (
                pc.unique(names.slice(start, end - start)).to_pylist() != [field.name]
                or reserved.slice(start, NUM_RESERVED_FEATURES).to_pylist() != list(_RESERVED)
                or own.null_count
                or pc.count_distinct(own).as_py() != len(own)
            ):
                raise InputError(
                    f"rows {start} to {end - 1} are not the features of this field; the vocabulary was edited or "
                    "belongs to another processor",
                    source=str(path),
                    field=field.name,
                )
            values.append(own)
        return cls(fields, values, table["count"].to_numpy())


class _ValueCounter:
    """Counts the values of one field over batches, holding little more than the distinct ones."""

    def __init__(self) -> None:
        self.num_missing = 0
        self._parts: list[pa.Table] = []
        self._held = 0

    def add(self, values: pa.Array) -> None:
        self.num_missing += values.null_count
        counted = pc.value_counts(values.drop_null())
        self._parts.append(pa.table({"value": counted.field(0), "count": counted.field(1)}))
        self._held += len(counted)
        if self._held > _MERGE_AT:
            self._merge()

    def _merge(self) -> pa.Table:
        merged = pa.concat_tables(self._parts).group_by("value").aggregate([("count", "sum")])
        merged = merged.rename_columns({"count_sum": "count"}).select(["value", "count"])
        self._parts = [merged]
        # Only what comes on top of the distinct values counts, or a large field would merge at every batch.
        self._held = 0
        return merged

    def result(self, min_count: int) -> tuple[pa.Array, np.ndarray, int]:
        """Values seen at least `min_count` times, their counts, and how many rows hold the others."""
        merged = self._merge().sort_by([("count", "descending"), ("value", "ascending")])
        enough = pc.greater_equal(merged["count"], min_count)
        kept = merged.filter(enough)
        num_rare = (pc.sum(merged["count"]).as_py() or 0) - (pc.sum(kept["count"]).as_py() or 0)
        return kept["value"].combine_chunks(), kept["count"].to_numpy().astype(np.int64), num_rare
