"""Encoded rows for a student model: a teacher's click logits, and labels that some rows may lack."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flip_hf.data.encoded_rows import Rows, column_values
from flip_hf.data.schema import canonical_labels, plain_array
from flip_hf.fields import IGNORED_LABEL

TEACHER_COLUMN = "teacher_logit"
"""The column of encoded rows that holds the teacher's click logit."""


def labels_or_ignored(column: pa.Array | pa.ChunkedArray, field: str) -> np.ndarray:
    """Reads labels as `canonical_labels` does, float32 (rows,). Null and NaN become `IGNORED_LABEL`.

    Args:
        column: the values.
        field: name of the column, for error messages.

    Raises:
        InputError: any other value is not a label.
    """
    column = plain_array(column)
    missing = pc.is_null(column, nan_is_null=True)
    labels = np.full(len(column), IGNORED_LABEL, np.float32)
    if not pa.types.is_null(column.type):
        # Replace missing labels by 0 instead of removing them, so that errors count the given rows.
        zero = pa.scalar(0).cast(column.type)
        is_known = ~np.asarray(missing.to_numpy(zero_copy_only=False), bool)
        labels[is_known] = canonical_labels(pc.if_else(missing, zero, column), field)[is_known]
    return labels


def teacher_logits(rows: Rows) -> np.ndarray:
    """Returns the teacher's logits of encoded rows, float32 (rows,).

    Raises:
        ValueError: a logit is not a finite number.
    """
    values = column_values(rows, TEACHER_COLUMN)
    try:
        logits = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the column {TEACHER_COLUMN!r} must hold a teacher's click logits: {error}") from error
    if not np.isfinite(logits).all():
        row = int((~np.isfinite(logits)).argmax())
        raise ValueError(
            f"row {row} of the batch has the {TEACHER_COLUMN} {logits[row]}; give each row the teacher's click logit, "
            "which must be finite, or remove the column"
        )
    return logits


def student_rows(
    labelled: datasets.Dataset, unlabelled: datasets.Dataset | None, logits: np.ndarray
) -> datasets.Dataset:
    """Concatenates labelled and unlabelled rows, numbers them anew, and adds the teacher's logits.

    Args:
        labelled: encoded rows with a label.
        unlabelled: encoded rows of the same processor without a label; None for none.
        logits: the teacher's click logits of the labelled rows, then of the unlabelled ones, float32 (rows,).

    Raises:
        ValueError: the numbers of logits and rows differ.
    """
    rows = labelled
    if unlabelled is not None:
        unknown = np.full(len(unlabelled), np.nan, np.float32)
        unlabelled = unlabelled.add_column("label", unknown)
        rows = datasets.concatenate_datasets([labelled.select_columns(unlabelled.column_names), unlabelled])
        rows = rows.remove_columns("row").add_column("row", np.arange(len(rows)))
    if len(logits) != len(rows):
        raise ValueError(f"there are {len(logits)} teacher logits for {len(rows)} rows; give one logit per row")
    return rows.add_column(TEACHER_COLUMN, logits.astype(np.float32)).with_format("numpy")
