"""Reads rows in any form, batch by batch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
import torch

from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.files import is_place, rows_located, stream_tables
from flip_hf.data.in_threads import in_threads
from flip_hf.data.kinds import KINDS, FieldValues
from flip_hf.data.tables import Contents, as_arrow, refuse_transform, to_table, typed_columns
from flip_hf.fields import FieldConfig

BATCH_ROWS = 1 << 15
"""Rows of a batch: enough to make the overhead of an Arrow or NumPy call negligible."""
# Memory grows with the number of threads, because finished batches wait for earlier ones.
_MOST_THREADS = 8


def contents_of(fields: Sequence[FieldConfig]) -> dict[str, Contents]:
    """Returns what the column of each field may hold, by field name."""
    return {f.name: KINDS[f.kind].column for f in fields}


def value_batches(
    dataset: Any, fields: Sequence[FieldConfig], label: str | None, source: str | None, csv: CSVFormat | None
) -> Iterator[dict[str, FieldValues]]:
    """Yields the values of each field, batch by batch. Several threads read them.

    Args:
        dataset: rows in any form that `FlipProcessor.fit` takes.
        fields: the fields to read.
        label: name of a label column that may exist too.
        source: name of the rows, for error messages.
        csv: format of the CSV files.
    """
    columns, optional = [f.name for f in fields], [label] if label else []

    def read(numbered: tuple[int, pa.Table]) -> dict[str, FieldValues]:
        first_row, table = numbered
        return {f.name: KINDS[f.kind].read(table[f.name], f, first_row, source) for f in fields}

    with rows_located(dataset, columns, optional=optional, csv=csv):
        yield from in_threads(read, _numbered(_tables(dataset, fields, label, csv)), num_threads())


def num_threads() -> int:
    """Returns torch's number of threads, at most 8."""
    return min(torch.get_num_threads(), _MOST_THREADS)


def _numbered(tables: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    first_row = 0
    for table in tables:
        yield first_row, table
        first_row += len(table)


def _tables(
    dataset: Any, fields: Sequence[FieldConfig], label: str | None, csv: CSVFormat | None
) -> Iterable[pa.Table]:
    columns, optional = [f.name for f in fields], [label] if label else []
    if is_place(dataset):
        return stream_tables(dataset, columns, optional=optional, batch_rows=BATCH_ROWS, csv=csv)
    contents = contents_of(fields)
    if isinstance(dataset, datasets.Dataset):
        batches = as_arrow(dataset).iter(batch_size=BATCH_ROWS)
        return (to_table(batch, columns, optional=optional) for batch in batches)
    if isinstance(dataset, datasets.IterableDataset):
        # Not as Arrow tables, because batches of a filtered stream may then differ in their types.
        refuse_transform(dataset)
        found = dataset.with_format(None).iter(batch_size=BATCH_ROWS)
        typed = (typed_columns(batch, dataset.features) for batch in found)
        return (to_table(batch, columns, optional=optional, contents=contents) for batch in typed)
    return [to_table(dataset, columns, optional=optional, contents=contents)]
