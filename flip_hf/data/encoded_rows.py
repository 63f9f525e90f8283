"""Reads encoded rows for collators, from lists of dicts or Arrow tables, and reports rows that can't be read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, get_worker_info

from flip_hf.data.ragged import Ragged
from flip_hf.data.row_batches import BATCH_ROWS
from flip_hf.data.template import NO_FIELD

# Number of rows with shared numbers that are compared at a time.
_COMPARED_ROWS = 1 << 12

Row = Mapping[str, Any]
"""One encoded row, by column name."""

Rows: TypeAlias = Sequence[Row] | pa.Table
"""The encoded rows of a batch: a list of rows, or an Arrow table, which is much faster."""


class Collator(Protocol):
    """Makes batches of encoded rows, such as `FlipCTRCollator` and `FlipPretrainingCollator`."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the encoded rows that the collator reads."""

    def __call__(self, rows: Rows, /) -> dict[str, torch.Tensor]:
        """Makes a batch of rows. The keys are the argument names of the model's `forward`."""


class EncodedRows(TorchDataset[pa.Table]):
    """Dataset from which a DataLoader passes each batch to the collator as one Arrow table.

    Args:
        rows: the output of `FlipProcessor.encode_dataset` or `FlipProcessor.encode`.
        columns: the columns that the collator reads, `collator.columns`. Columns that don't exist are ignored.
    """

    def __init__(self, rows: datasets.Dataset | pa.Table, columns: Sequence[str]) -> None:
        there = [name for name in columns if name in rows.column_names]
        is_table = isinstance(rows, pa.Table)
        self.rows = rows.select(there) if is_table else rows.select_columns(there).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> pa.Table:
        table: pa.Table = self.rows.take(numbers) if isinstance(self.rows, pa.Table) else self.rows[numbers]
        return table


def has_column(rows: Rows, name: str) -> bool:
    """Whether the rows have a column with this name; for a list, whether the first row has it."""
    return name in (rows.column_names if isinstance(rows, pa.Table) else rows[0])


def column_values(rows: Rows, name: str) -> np.ndarray:
    """Returns a column with one value per row, (rows,)."""
    if isinstance(rows, pa.Table):
        column: np.ndarray = rows[name].to_numpy()
        return column
    return np.array(_values(rows, name))


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    try:
        return [row[name] for row in rows]
    except KeyError as error:
        place = next(i for i, row in enumerate(rows) if name not in row)
        raise ValueError(
            f"row {place} of the batch has no {name!r}, but other rows have one; encode all rows in the same way"
        ) from error


def arrow_column(rows: Rows, name: str) -> pa.Array | pa.ChunkedArray:
    """Returns a column as an Arrow array."""
    return rows[name] if isinstance(rows, pa.Table) else pa.array(column_values(rows, name))


def unpadded_texts(rows: Rows) -> Ragged:
    """Returns the rows' tokens without padding, which the `attention_mask` marks if there is one."""
    texts = ragged_column(rows, "input_ids")
    if not has_column(rows, "attention_mask"):
        return texts
    mask = ragged_column(rows, "attention_mask")
    if np.array_equal(mask.lengths, texts.lengths):
        of_row = np.repeat(np.arange(len(texts.lengths)), texts.lengths)
        lengths = np.bincount(of_row[mask.values == 1], minlength=len(texts.lengths))
        within = np.arange(len(of_row)) - np.repeat(texts.lengths.cumsum() - texts.lengths, texts.lengths)
        wrong = of_row[mask.values != (within < lengths[of_row])]
        if not len(wrong) and lengths.all():
            return Ragged(texts.values[mask.values == 1], lengths)
        row = wrong[0] if len(wrong) else lengths.argmin()
    else:
        row = (mask.lengths != texts.lengths).argmax()
    raise ValueError(
        f"the attention_mask of row {row} of the batch must be as long as its input_ids, 1 on tokens and then 0 on "
        "padding, with at least one token; encode the rows with processor.encode or encode_dataset, which do not pad"
    )


def padded_views(rows: pa.Table, pad_token_id: int, multiple: int) -> dict[str, np.ndarray]:
    """Returns both views of rows, padded to the longest row.

    Args:
        rows: the output of `FlipProcessor.encode`.
        pad_token_id: the tokenizer's padding token.
        multiple: the length is rounded up to a multiple of this.

    Returns:
        `feature_ids` int64 (B, P), `input_ids` and `attention_mask` int64 (B, T).
    """
    text = Ragged.of(rows["input_ids"])
    padded = text.padded(pad_token_id, multiple)
    mask = text.mask(padded.shape[1]).astype(np.int64)
    return {"feature_ids": matrix_column(rows, "feature_ids"), "input_ids": padded, "attention_mask": mask}


def matrix_column(rows: Rows, name: str) -> np.ndarray:
    """Returns a column of lists of equal length as an array, (rows, length)."""
    if not isinstance(rows, pa.Table):
        return np.stack([np.asarray(value) for value in _values(rows, name)])
    column = rows[name]
    length = column.type.list_size if pa.types.is_fixed_size_list(column.type) else len(column[0])
    # Concatenation copies, because torch rejects read-only memory.
    values: np.ndarray = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
    return values.reshape(len(rows), length)


def fields_of_tokens(rows: Rows, texts: Ragged) -> Ragged:
    """Returns the field of each token of the texts."""
    fields = ragged_column(rows, "token_field_ids")
    if not np.array_equal(fields.lengths, texts.lengths):
        row = (fields.lengths != texts.lengths).argmax()
        raise ValueError(
            f"row {row} of the batch has {texts.lengths[row]} tokens in input_ids, but {fields.lengths[row]} in "
            "token_field_ids; take both from one call of processor.encode"
        )
    return fields


def ragged_column(rows: Rows, name: str) -> Ragged:
    """Returns a column of lists of whole numbers."""
    wrong: int | None
    if isinstance(rows, pa.Table):
        column = rows[name]
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        # An attention_mask may hold Booleans.
        if is_list and (pa.types.is_integer(column.type.value_type) or pa.types.is_boolean(column.type.value_type)):
            return Ragged.of(column)
        wrong, held = 0, str(column.type)
    else:
        arrays = [np.asarray(value) for value in _values(rows, name)]
        # NumPy gives an empty list a float dtype.
        wrong = next((i for i, a in enumerate(arrays) if a.ndim != 1 or (len(a) and a.dtype.kind not in "iub")), None)
        if wrong is None:
            return Ragged.of(arrays)
        held = f"an array of {arrays[wrong].dtype} in {arrays[wrong].ndim} dimensions"
    raise ValueError(
        f"row {wrong} of the batch must have a list of whole numbers in {name!r}, not {held}: encode rows with "
        "processor.encode_dataset(dataset). If you map the processor, use dataset.map(processor, batched=True)"
    )


def row_numbers(rows: Rows) -> np.ndarray:
    """Returns the row numbers, int64 (rows,). Raises ValueError if they are not whole numbers."""
    numbers = column_values(rows, "row")
    if not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"the column 'row' must hold whole numbers, but it holds {numbers.dtype}, such as {numbers.tolist()[0]!r}"
        )
    return numbers.astype(np.int64)


_PURPOSES = {
    "row": ", on which masks and dropped features depend",
    "token_field_ids": ", which says what field each token belongs to",
}


def check_column(there: bool, name: str) -> None:
    """Raises ValueError if a column of the encoded rows is missing. The message says how to create it."""
    if not there:
        raise ValueError(
            f"the encoded rows lack the column {name!r}{_PURPOSES.get(name, '')}. FlipProcessor.encode and "
            f"encode_dataset create it{'; calling the processor does not' if name in _PURPOSES else ''}. To keep it, "
            "set TrainingArguments(remove_unused_columns=False) for transformers.Trainer, or row_column for "
            "flip_hf.integrations.ray.BatchEncoder"
        )


def check_rows(rows: Any, collator: Any) -> None:
    """Raises ValueError if the rows of a batch have a form that the collator can't read."""
    if not isinstance(rows, pa.Table):
        is_list = isinstance(rows, Sequence | datasets.Dataset) and not isinstance(rows, str | bytes)
        if not is_list or (len(rows) and not isinstance(rows[0], Mapping)):
            held = f"{type(rows).__name__} of {type(rows[0]).__name__}" if is_list else type(rows).__name__
            raise ValueError(
                f"a collator takes encoded rows as a list of dicts or a pyarrow.Table, not a {held}: put a single row "
                "in a list, [row], and columns in a table, pyarrow.table(columns)"
            )
    if not len(rows):
        raise ValueError("the batch has no rows; a collator needs at least one, so leave empty batches out")
    for name in collator.needed_columns:
        check_column(has_column(rows, name), name)
    if (worker := get_worker_info()) is not None:
        check_stream(worker.dataset, worker.num_workers, collator)


def check_stream(rows: Any, num_workers: int, collator: Any) -> None:
    """Raises ValueError if several workers would read one stream, and masks or dropped features depend on row numbers.

    Each worker numbers its rows from 0, so different rows would get equal masks.

    Args:
        rows: the dataset that the DataLoader reads.
        num_workers: its number of workers.
        collator: `FlipCTRCollator` or `FlipPretrainingCollator`; collators of other packages are not checked.
    """
    is_stream = isinstance(rows, datasets.IterableDataset | IterableDataset)
    if is_stream and num_workers > 1 and getattr(collator, "reads_numbers", False):
        raise ValueError(
            f"{num_workers} workers would read one stream, and each would number its rows from 0. Different rows would "
            "then share masks and dropped features, which depend on the number. Set the number of workers "
            "(DataLoader(num_workers=...), TrainingArguments(dataloader_num_workers=...)) to 0 or 1, or encode a "
            "datasets.Dataset instead of a stream"
        )


def refuse_shared_numbers(numbers: np.ndarray, contents: Callable[[np.ndarray], Sequence[np.ndarray]]) -> None:
    """Raises ValueError if different rows share a number, as they would get equal masks. Repeated rows are allowed.

    Args:
        numbers: int64 (rows,), the row numbers.
        contents: returns the contents of the rows at some indices, a list of arrays (indices, ...).
    """
    order = np.argsort(numbers, kind="stable")
    shared = np.flatnonzero(numbers[order[1:]] == numbers[order[:-1]])
    for start in range(0, len(shared), _COMPARED_ROWS):
        places = shared[start : start + _COMPARED_ROWS]
        for values in contents(np.concatenate([order[places], order[places + 1]])):
            differs = (values[: len(places)] != values[len(places) :]).any(axis=1)
            if differs.any():
                number = numbers[order[places[differs.argmax()]]]
                raise ValueError(
                    f"{np.count_nonzero(numbers == number)} different rows share row number {number}, so all of them "
                    "would get the same masks and dropped features, which depend on the number. Encode all rows at "
                    "once with processor.encode_dataset(dataset), or each part with processor.encode(rows, "
                    "first_row=...), or renumber the rows: "
                    "rows.remove_columns('row').add_column('row', list(range(len(rows))))"
                )


def value_tokens(encoded: datasets.Dataset) -> torch.Tensor:
    """Returns the distinct tokens that occur in the rows' values, int64 (tokens,), ascending.

    Args:
        encoded: the output of `FlipProcessor.encode_dataset`.
    """
    seen = np.zeros(0, dtype=bool)
    columns = encoded.with_format("arrow").select_columns(["input_ids", "token_field_ids"])
    for table in columns.iter(batch_size=BATCH_ROWS):
        tokens, owners = (Ragged.of(table[name]).values for name in table.column_names)
        found = np.bincount(tokens[owners != NO_FIELD], minlength=len(seen)) > 0
        found[: len(seen)] |= seen
        seen = found
    return torch.from_numpy(seen.nonzero()[0])
