"""Rows in any form, batch by batch."""

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
"""Rows of a batch: enough that a call of Arrow or NumPy costs nothing beside what it does."""
# Batches wait for each other, so what they hold grows with the threads.
_MOST_THREADS = 8


def contents_of(fields: Sequence[FieldConfig]) -> dict[str, Contents]:
    """What the column of each field may hold."""
    return {f.name: KINDS[f.kind].column for f in fields}


def value_batches(
    dataset: Any, fields: Sequence[FieldConfig], label: str | None, source: str | None, csv: CSVFormat | None
) -> Iterator[dict[str, FieldValues]]:
    """The values of each field, batch by batch, read in several threads.

    Args:
        dataset: rows in any form that `FlipProcessor.fit` takes.
        fields: whose values.
        label: a column that may be there too.
        source: where the rows come from, for error messages.
        csv: how CSV files are written.
    """
    columns, optional = [f.name for f in fields], [label] if label else []

    def read(numbered: tuple[int, pa.Table]) -> dict[str, FieldValues]:
        first_row, table = numbered
        return {f.name: KINDS[f.kind].read(table[f.name], f, first_row, source) for f in fields}

    with rows_located(dataset, columns, optional=optional, csv=csv):
        yield from in_threads(read, _numbered(_tables(dataset, fields, label, csv)), num_threads())


def num_threads() -> int:
    """As many threads as torch computes in, at most 8."""
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
        # As Arrow tables, batches of a stream that was filtered may differ in their types.
        refuse_transform(dataset)
        found = dataset.with_format(None).iter(batch_size=BATCH_ROWS)
        typed = (typed_columns(batch, dataset.features) for batch in found)
        return (to_table(batch, columns, optional=optional, contents=contents) for batch in typed)
    return [to_table(dataset, columns, optional=optional, contents=contents)]
