"""Standard JSON: without NaN and infinities, which Python writes by default but RFC 8259 does not allow."""

import json
import math
from collections.abc import Mapping
from typing import Any


def settings_json(value: Any, **options: Any) -> str:
    """Serialises settings as JSON.

    Args:
        value: any value that `json.dumps` takes.
        options: as in `json.dumps`, such as `indent`.

    Raises:
        ValueError: a number is NaN or infinite. Writing null instead would change the setting.
    """
    return json.dumps(value, allow_nan=False, **options)


def measures_json(value: Any, **options: Any) -> str:
    """Serialises measurements as JSON, with null for NaN and infinite numbers.

    Args:
        value: any value that `json.dumps` takes.
        options: as in `json.dumps`, such as `indent`.
    """
    return settings_json(_with_nulls(value), **options)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_nulls(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
