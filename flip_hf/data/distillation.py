"""Encoded rows for a student: click logits of a teacher beside labels, which some rows may lack."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flip_hf.data.encoded_rows import Rows, column_values
from flip_hf.data.schema import canonical_labels, plain_array
from flip_hf.fields import IGNORED_LABEL

TEACHER_COLUMN = "teacher_logit"
"""The column of encoded rows that holds a teacher's click logit."""


def labels_or_ignored(column: pa.Array | pa.ChunkedArray, field: str) -> np.ndarray:
    """Labels as `canonical_labels` reads them, float32 (rows,), and `IGNORED_LABEL` where a label is null or NaN.

    Args:
        column: the values.
        field: the column's name, for errors.

    Raises:
        InputError: another value is no label.
    """
    column = plain_array(column)
    missing = pc.is_null(column, nan_is_null=True)
    labels = np.full(len(column), IGNORED_LABEL, np.float32)
    if not pa.types.is_null(column.type):
        # Any label in the place of a missing one, so that errors count the rows that were given.
        zero = pa.scalar(0).cast(column.type)
        is_known = ~np.asarray(missing.to_numpy(zero_copy_only=False), bool)
        labels[is_known] = canonical_labels(pc.if_else(missing, zero, column), field)[is_known]
    return labels


def teacher_logits(rows: Rows) -> np.ndarray:
    """The teacher's logits of encoded rows, float32 (rows,).

    Raises:
        ValueError: one of them is no finite number.
    """
    values = column_values(rows, TEACHER_COLUMN)
    try:
        logits = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the column {TEACHER_COLUMN!r} must hold a teacher's click logits: {error}") from error
    if not np.isfinite(logits).all():
        row = int((~np.isfinite(logits)).argmax())
        raise ValueError(
            f"row {row} of the batch has the {TEACHER_COLUMN} {logits[row]}: give each row the click logit that the "
            "teacher has for it, or remove the column"
        )
    return logits


def student_rows(
    labelled: datasets.Dataset, unlabelled: datasets.Dataset | None, logits: np.ndarray
) -> datasets.Dataset:
    """One dataset of labelled and unlabelled rows with the teacher's logits, in this order and numbered in it.

    Args:
        labelled: encoded rows with a label.
        unlabelled: encoded rows of the same processor without a label; None for none.
        logits: the teacher's click logits of the first, then of the second, float32 (rows,).

    Raises:
        ValueError: there are not as many logits as rows.
    """
    rows = labelled
    if unlabelled is not None:
        unknown = np.full(len(unlabelled), np.nan, np.float32)
        unlabelled = unlabelled.add_column("label", unknown)
        rows = datasets.concatenate_datasets([labelled.select_columns(unlabelled.column_names), unlabelled])
        rows = rows.remove_columns("row").add_column("row", np.arange(len(rows)))
    if len(logits) != len(rows):
        raise ValueError(f"there are {len(logits)} logits of the teacher for {len(rows)} rows")
    return rows.add_column(TEACHER_COLUMN, logits.astype(np.float32)).with_format("numpy")
