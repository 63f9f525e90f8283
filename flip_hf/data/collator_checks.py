"""Checks, before training or scoring, that the rows, the collator and the model fit together."""

from typing import Any

import datasets
import numpy as np

from flip_hf.data.collators import FlipCTRCollator, FlipPretrainingCollator
from flip_hf.data.encoded_rows import (
    EncodedRows,
    check_column,
    ragged_column,
    refuse_shared_numbers,
    row_numbers,
    unpadded_texts,
)
from flip_hf.field_checks import check_fields


def check_training_rows(rows: datasets.Dataset, collator: Any) -> None:
    """Raises ValueError unless a collator can make batches of all rows, and the rows have labels for finetuning.

    If batches depend on row numbers, different rows must not share one. They do if datasets were encoded separately and
    then concatenated. Collators of other packages are not checked.

    Args:
        rows: the encoded training rows.
        collator: `FlipCTRCollator` or `FlipPretrainingCollator`.
    """
    if not isinstance(collator, FlipCTRCollator | FlipPretrainingCollator):
        return
    for name in collator.needed_columns:
        check_column(name in rows.column_names, name)
    if isinstance(collator, FlipCTRCollator) and "label" not in rows.column_names:
        raise ValueError(
            "the training rows have no column 'label'; encode them with "
            "processor.encode_dataset(dataset, with_label=True). The processor must know the name of the "
            "label column from fitting: FlipProcessor.fit(..., label='label')"
        )
    if not collator.reads_numbers:
        return
    numbers = row_numbers(rows.select_columns(["row"]).with_format("arrow")[:])
    if (numbers[1:] > numbers[:-1]).all():
        return
    views = [name for name in ("feature_ids", "input_ids", "attention_mask") if name in collator.columns]
    table = EncodedRows(rows, views)

    def contents(places: np.ndarray) -> list[np.ndarray]:
        part = table.__getitems__(places.tolist())
        texts = [unpadded_texts(part).padded(-1)] if "input_ids" in part.column_names else []
        return [ragged_column(part, "feature_ids").padded(-1), *texts]

    refuse_shared_numbers(numbers, contents)


_COLLATORS: dict[str, Any] = {cls.model_class: cls for cls in (FlipCTRCollator, FlipPretrainingCollator)}


def find_flip_model(model: Any) -> tuple[Any, str] | None:
    """Returns the FLIP model that `model` is or wraps (as PEFT does).

    Returns:
        The model, and "FlipForCTR" or "FlipForPreTraining" (also for subclasses); None if there is no FLIP model.
    """
    found = ((m, cls.__name__) for m in model.modules() for cls in type(m).__mro__ if cls.__name__ in _COLLATORS)
    return next(found, None)


def check_collator(collator: Any, model: Any) -> None:
    """Raises ValueError unless a collator makes the inputs of a model. Collators of other packages are not checked.

    Args:
        collator: `FlipCTRCollator` or `FlipPretrainingCollator`.
        model: `FlipForCTR`, `FlipForPreTraining`, or a wrapper around one, such as PEFT's.
    """
    found = find_flip_model(model)
    if found is None or not isinstance(collator, FlipCTRCollator | FlipPretrainingCollator):
        return
    flip, name = found
    config: Any = flip.config
    if collator.model_class != name:
        raise ValueError(
            f"{type(collator).__name__} makes batches for {collator.model_class}, but the model is a {name}: use "
            f"{_COLLATORS[name].__name__}(processor)"
        )
    # The towers' names make no difference to a batch.
    groups = [None if a.towers is None else list(a.towers.values()) for a in (collator, config)]
    if collator.mode not in ("joint", config.mode) or (config.mode != "id" and groups[0] != groups[1]):
        of_collator, of_model = (f"mode={a.mode!r} and text_towers={a.towers}" for a in (collator, config))
        raise ValueError(
            f"the collator has {of_collator}, but the model has {of_model}: use "
            "FlipCTRCollator.from_model(processor, model)"
        )
    check_fields(collator.fields, config.fields)
