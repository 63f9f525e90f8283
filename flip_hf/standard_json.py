"""JSON without NaN and infinities: Python writes them by default, but the standard (RFC 8259) does not know them."""

import json
import math
from collections.abc import Mapping
from typing import Any


def settings_json(value: Any, **options: Any) -> str:
    """JSON of settings.

    Args:
        value: any value that `json.dumps` takes.
        options: as of `json.dumps`, such as `indent`.

    Raises:
        ValueError: a number is NaN or infinite; null in its place would be another setting.
    """
    return json.dumps(value, allow_nan=False, **options)


def measures_json(value: Any, **options: Any) -> str:
    """JSON of measurements. NaN and infinite numbers become null: they are no measurements.

    Args:
        value: any value that `json.dumps` takes.
        options: as of `json.dumps`, such as `indent`.
    """
    return settings_json(_with_nulls(value), **options)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_nulls(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
