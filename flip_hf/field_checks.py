"""Checks fields against the label column, and a processor's fields against a model's."""

import dataclasses
from collections.abc import Collection, Sequence

from flip_hf.fields import FieldConfig


def check_label(
    label: str | None, fields: Collection[str | None], group_field: str | None = None, section: str = ""
) -> None:
    """Raises ValueError if the label column is one of the fields, or the column that groups the rows.

    Args:
        label: name of the label column; None passes the check.
        fields: names of the fields.
        group_field: the column that groups the rows, if any.
        section: prefix of the settings' names in the error message, such as "data.".
    """
    if label is None:
        return
    if label == group_field:
        raise ValueError(f"{section}group_field: {label!r} is the label; name a column such as user_id")
    if label in fields:
        raise ValueError(
            f"{section}fields names {label!r}, which is the label: the model would read the answer. Leave it out of "
            f"the fields, or set {section}label"
        )


def check_fields(fields: Sequence[FieldConfig], model_fields: Sequence[FieldConfig]) -> None:
    """Raises ValueError, naming the first difference, unless a processor and a model have the same fields.

    Args:
        fields: the processor's fields.
        model_fields: `model.config.fields`.
    """
    own, others = ([f.name for f in some] for some in (fields, model_fields))
    if own != others:
        difference = f"the processor has {', '.join(map(repr, own))} and the model {', '.join(map(repr, others))}"
    elif changed := [(a, b) for a, b in zip(fields, model_fields, strict=True) if a != b]:
        field, other = changed[0]
        name = next(f.name for f in dataclasses.fields(field) if getattr(field, f.name) != getattr(other, f.name))
        difference = (
            f"field {field.name!r} has {name}={getattr(field, name)!r} in the processor and {getattr(other, name)!r} "
            "in the model"
        )
    else:
        return
    raise ValueError(
        f"the processor's fields are not the model's: {difference}. Load both from the same folder. After "
        "processor.extend, resize the model and save both"
    )
