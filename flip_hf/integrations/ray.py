"""Callables from Arrow tables to Arrow tables, for engines such as Ray Data that map tables over many machines."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from flip_hf.data.schema import InputError
from flip_hf.modeling_flip import FlipForCTR
from flip_hf.pipeline import CTRPredictionPipeline
from flip_hf.processing_flip import FlipProcessor


class BatchEncoder:
    """Encodes tables of rows as `FlipProcessor.encode` does.

    Args:
        processor: folder or Hub repository of the processor.
        with_label: whether to read the label too.
        row_column: column of row numbers, whole numbers that are unique in the whole log. The encoded rows have them as
            `row`. Pretraining and `oov_dropout` need `row`, because it determines the masks.
    """

    def __init__(self, processor: str | Path, with_label: bool = False, row_column: str | None = None) -> None:
        self.processor = FlipProcessor.from_pretrained(processor)
        self.with_label = with_label
        self.row_column = row_column

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Encodes a table.

        Without `row_column`, the encoded rows have no column `row`, because the table's place in the log is unknown.

        Args:
            rows: raw rows with the columns of the processor's fields.

        Raises:
            InputError: as in `FlipProcessor.encode`, with row numbers counted within the table; or `row_column` is
                missing or does not hold whole numbers.
        """
        name = self.row_column
        numbers = None if name is None else _row_numbers(rows, name)
        if name is not None and name not in [field.name for field in self.processor.fields]:
            rows = rows.drop_columns([name])
        encoded = self.processor.encode(rows, with_label=self.with_label)
        place = encoded.column_names.index("row")
        return encoded.remove_column(place) if numbers is None else encoded.set_column(place, "row", numbers)


def _row_numbers(rows: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in rows.column_names:
        raise InputError(
            f"the column of row numbers is missing; the table has the columns {rows.column_names}", field=name
        )
    column = rows[name]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise InputError(
            f"row numbers must be whole numbers without missing values; this column is {column.type}", field=name
        )
    return column.cast(pa.int64())


class BatchScorer:
    """Adds a column of click probabilities to tables of rows.

    Args:
        model: folder or Hub repository of a finetuned `FlipForCTR` and its processor.
        mode: score with both towers ("joint") or with one ("id", "text"); the default is the saved mode.
        kwargs: settings of `CTRPredictionPipeline`, such as `text_budget`, `batch_size` or `device`.
    """

    def __init__(self, model: str | Path, mode: str | None = None, **kwargs: Any) -> None:
        loaded = FlipForCTR.from_pretrained(model, mode=mode)
        self.predict = CTRPredictionPipeline(loaded, FlipProcessor.from_pretrained(model), **kwargs)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Returns the table with a new column `probability`, float32.

        Args:
            rows: raw rows with the columns of the processor's fields.

        Raises:
            InputError: as in `FlipProcessor.encode`, with row numbers counted within the table.
            ValueError: the table already has a column `probability`.
        """
        if "probability" in rows.column_names:
            raise ValueError("the table already has a column 'probability'; rename it to make room for the scores")
        # An engine may send a table without rows.
        results: Any = self.predict(rows) if len(rows) else []
        scores = pa.array([result["probability"] for result in results], pa.float32())
        return rows.append_column("probability", scores)
