"""Splits the row groups of Parquet files into portions."""

from collections.abc import Iterator

import pyarrow.parquet as pq


def groups_of_rows(metadata: pq.FileMetaData, num_rows: int) -> Iterator[list[int]]:
    """Yields the indices of a Parquet file's row groups, in portions of at least `num_rows` rows."""
    groups, held = [], 0
    for i in range(metadata.num_row_groups):
        groups.append(i)
        held += metadata.row_group(i).num_rows
        if held >= num_rows:
            yield groups
            groups, held = [], 0
    if groups:
        yield groups
