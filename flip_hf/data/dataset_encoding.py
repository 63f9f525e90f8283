"""Encodes a whole dataset in batches."""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import datasets
import pyarrow as pa

from flip_hf.data.arrow_files import open_files
from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.fallbacks import FallbackReport
from flip_hf.data.feature_vectors import FeatureVectors
from flip_hf.data.files import is_place, rows_located, shown
from flip_hf.data.in_threads import in_threads
from flip_hf.data.row_batches import BATCH_ROWS, num_threads
from flip_hf.data.schema import InputError
from flip_hf.data.tables import as_arrow, refuse_transform, typed_columns
from flip_hf.data.vocabulary import FeatureVocabulary

# Smaller than a batch of a stored dataset, so that a stream's first rows arrive soon.
_STREAMED_ROWS = 1000
# Part of datasets' cache key. Increase it when an encoding change gives different results for the same rows.
_ENCODER = 3

logger = logging.getLogger(__name__)


class RowEncoder(Protocol):
    """The methods of `FlipProcessor` that `encode_dataset` and `flip_hf.scoring` need."""

    vocabulary: FeatureVocabulary
    vectors: FeatureVectors

    def columns_read(self, with_label: bool = False, group_field: str | None = None) -> list[str]:
        """Returns the names of the raw columns that encoding reads."""

    def select_columns(
        self,
        rows: Any,
        *,
        first_row: int = 0,
        with_label: bool = False,
        source: str | None = None,
        group_field: str | None = None,
    ) -> pa.Table:
        """Selects these columns of rows in any form."""

    def encode(
        self,
        rows: Any,
        *,
        first_row: int = 0,
        with_label: bool = False,
        with_text: bool = True,
        with_vectors: bool = True,
        source: str | None = None,
        group_field: str | None = None,
    ) -> pa.Table:
        """Encodes rows to both views."""

    def content_hash(self) -> str:
        """Returns a hash of everything that determines how a row is encoded."""


def encode_dataset(
    processor: RowEncoder,
    dataset: Any,
    *,
    with_label: bool,
    source: str | None = None,
    csv: CSVFormat | None = None,
    group_field: str | None = None,
) -> Any:
    """Implements `FlipProcessor.encode_dataset`, with its arguments, result and errors."""
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        parts = {
            name: encode_dataset(
                processor,
                part,
                with_label=with_label,
                source=name if source is None else f"{source} ({name})",
                group_field=group_field,
            )
            for name, part in dataset.items()
        }
        return type(dataset)(parts)
    if isinstance(dataset, datasets.IterableDataset):
        return _encode_stream(processor, dataset, with_label, source, group_field)
    if is_place(dataset):
        source = source or shown(dataset)
        columns = processor.columns_read(with_label, group_field)
        with rows_located(dataset, columns, csv=csv):
            rows_of_files = open_files(dataset, columns, csv=csv)
            return encode_dataset(
                processor, rows_of_files, with_label=with_label, source=source, group_field=group_field
            )
    if not isinstance(dataset, datasets.Dataset):
        dataset = processor.select_columns(dataset, with_label=with_label, source=source, group_field=group_field)
    if len(dataset) == 0:
        raise InputError("there are no rows to encode; check the file, or the filter that made the rows", source=source)

    # Columns that are not fields need not be read.
    columns = processor.columns_read(with_label, group_field)
    is_table = isinstance(dataset, pa.Table)
    raw = dataset if is_table else as_arrow(dataset.select_columns(columns))

    def rows(start: int, number: int) -> pa.Table:
        return raw.slice(start, number) if is_table else raw[start : start + number]

    def encode(start: int) -> pa.Table:
        batch = rows(start, BATCH_ROWS)
        return processor.encode(batch, first_row=start, with_label=with_label, source=source, group_field=group_field)

    def starts() -> Iterator[int]:
        # Built before the threads need them, and only if datasets has no cached result.
        processor.vocabulary.make_indices()
        yield from range(0, len(dataset), BATCH_ROWS)

    # The next batches are encoded while datasets writes one.
    batches = in_threads(encode, starts(), num_threads())
    with contextlib.closing(batches):
        encoded = (
            datasets.Dataset(pa.concat_tables(batches))
            if is_table
            else _map(processor, raw, batches, [with_label] if group_field is None else [with_label, group_field])
        )
    _report_fallbacks(processor, encoded.with_format("arrow"), rows, source)
    return encoded.with_format("numpy")


def _map(
    processor: RowEncoder, raw: datasets.Dataset, batches: Iterator[pa.Table], settings: Sequence[Any]
) -> datasets.Dataset:
    """Stores the batches as a dataset in datasets' cache, next to `raw`. `settings` are part of the cache key."""

    def next_batch(indices: list[int]) -> pa.Table:
        batch = next(batches)
        if batch["row"][0].as_py() != indices[0]:
            raise RuntimeError(f"datasets asks for row {indices[0]}, but the next one is row {batch['row'][0]}")
        return batch

    parts = [_ENCODER, raw._fingerprint, processor.content_hash(), *settings]
    content = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
    return raw.map(
        next_batch,
        batched=True,
        with_indices=True,
        batch_size=BATCH_ROWS,
        writer_batch_size=BATCH_ROWS,
        input_columns=[],
        remove_columns=raw.column_names,
        new_fingerprint=content[:32],
        # Cached rows may hold vector keys that only the process that encoded them can resolve.
        load_from_cache_file=False if processor.vectors.features else None,
        desc="Encoding",
    )


def _encode_stream(
    processor: RowEncoder,
    dataset: datasets.IterableDataset,
    with_label: bool,
    source: str | None,
    group_field: str | None,
) -> datasets.IterableDataset:
    report = FallbackReport(processor.vocabulary)
    where = source or "the stream"

    features = dataset.features

    def encode(columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows = typed_columns(columns, features)
        settings: dict[str, Any] = {"with_label": with_label, "source": source, "group_field": group_field}
        table = processor.select_columns(rows, first_row=numbers[0], **settings)
        encoded = processor.encode(table, first_row=numbers[0], **settings)
        report.add(encoded, table.slice)
        report.warn(where)
        found: dict[str, list[Any]] = encoded.to_pydict()
        return found

    # If a stream does not know its columns, take them from its first row.
    names = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    nothing = pa.table({name: pa.array([], pa.string()) for name in processor.columns_read(with_label, group_field)})
    schema = processor.encode(nothing, with_label=with_label, group_field=group_field).schema
    # Not as Arrow tables, because batches of a filtered stream may then differ in their types.
    refuse_transform(dataset)
    encoded = dataset.with_format(None).map(
        encode,
        batched=True,
        with_indices=True,
        batch_size=_STREAMED_ROWS,
        remove_columns=names,
        features=datasets.Features.from_arrow_schema(schema),
    )
    return encoded.with_format("numpy")


def _report_fallbacks(
    processor: RowEncoder, encoded: datasets.Dataset, rows: Callable[[int, int], pa.Table], source: str | None
) -> None:
    report = FallbackReport(processor.vocabulary)
    read = encoded.select_columns(["feature_ids", "fallbacks"])
    for start in range(0, len(read), BATCH_ROWS):
        report.add(read[start : start + BATCH_ROWS], rows, start)
    where = source or "the dataset"
    if report.counts:
        logger.warning("%s: fallbacks in %d rows: %s", where, report.num_rows, report.counted())
    report.warn(where)
