"""Checks of a FLIP model's `config.json`, which a stranger may have written."""

import math
import re
from typing import Any

from transformers import PreTrainedConfig

from flip_hf.fields import FieldConfig, is_whole, printable

# No tensor's size overflows within these limits. The second, larger one is for feature tables.
_LARGEST_NUMBER = 1 << 30
_MOST_FEATURES = 1 << 40
# transformers builds lists of this length when it builds a configuration.
_COUNTED_OUT = re.compile(r".*(layers?|labels)")
_MOST_COUNTED_OUT = 1 << 16
_DEEPEST = 16
_DTYPES = ("None", "float64", "float32", "bfloat16", "float16")
# The harmless values of each key. With other values, transformers downloads and runs code from the Hub, replaces
# classes in the whole process, or reads files that have not been checked.
ONLY_CALLERS_SET: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), (None, "eager", "sdpa", "flex_attention")),
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), (None, "eager", "batched_mm", "grouped_mm")),
    **dict.fromkeys(("quantization_config", "fusion_config", "transformers_weights"), (None,)),
}
# Models that consist of other models, which they would download by the name in the configuration.
_COMPOSITES = ("flip", "timm_backbone", "timm_wrapper")
_NAMES_OF_PARTS = ("backbone", "backbone_config")


def check_config_file(values: Any, model_type: str) -> None:
    """Raises ValueError if `config.json` is not that of a FLIP model or has a dangerous or absurd value.

    Args:
        values: the content of `config.json`.
        model_type: the required `model_type`; a file without one is accepted.
    """
    kind = values.get("model_type", model_type) if isinstance(values, dict) else type(values).__name__
    if kind != model_type:
        raise ValueError(f"config.json describes a model of type {kind!r:.80}, not {model_type!r}")
    _check_values(values, "", 0)
    FieldConfig.check_saved(values.get("fields"), "config.json")


def _check_values(value: Any, place: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"config.json: {place} is nested too deeply")
    if isinstance(value, list | tuple):
        for item in value:
            _check_values(item, place, depth + 1)
    elif isinstance(value, dict):
        for name, inner in value.items():
            key = str(name)
            inner_place = f"{place}.{printable(key)}" if place else printable(key)
            _check_setting(key, inner, inner_place)
            _check_values(inner, inner_place, depth + 1)
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"config.json: {place} is NaN; set it to a number")
    elif is_whole(value) and abs(value) > (_MOST_FEATURES if place.startswith("fields.") else _LARGEST_NUMBER):
        raise ValueError(f"config.json: {place} is too large for any model")


def _check_setting(key: str, value: Any, place: str) -> None:
    if key in ONLY_CALLERS_SET and value not in ONLY_CALLERS_SET[key]:
        raise ValueError(
            f"config.json: {place} is refused, because transformers would run or read what it names; remove it. To use "
            f"it, pass {key.lstrip('_')} to from_pretrained"
        )
    if key in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") not in _DTYPES:
        raise ValueError(f"config.json: {place}={value!r:.80} is not one of {', '.join(_DTYPES)}")
    is_text = place.startswith("text_config.")
    if is_text and (key in _NAMES_OF_PARTS or (key == "model_type" and value in _COMPOSITES)):
        raise ValueError(f"config.json: {place}={value!r:.80} is not a setting of a text encoder; remove it")
    if key.startswith("__") or callable(getattr(PreTrainedConfig, key, None)):
        raise ValueError(f"config.json: {place} is not a setting; remove it")
    if _COUNTED_OUT.fullmatch(key) and is_whole(value) and value > _MOST_COUNTED_OUT:
        raise ValueError(f"config.json: {place} is too large; the limit is {_MOST_COUNTED_OUT}")
