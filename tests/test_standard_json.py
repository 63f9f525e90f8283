"""JSON that any reader takes."""

import json
import math

import pytest

from flip_hf.standard_json import measures_json, settings_json


def refuse(name):
    raise AssertionError(f"{name} is no standard JSON")


def test_measures_without_a_value_are_null():
    value = {"auc": math.nan, "list": [math.inf, 1.5, (-math.inf, "NaN")], "deep": {"a": {"b": math.nan}}, "n": 3}
    read = json.loads(measures_json(value, indent=1), parse_constant=refuse)
    assert read == {"auc": None, "list": [None, 1.5, [None, "NaN"]], "deep": {"a": {"b": None}}, "n": 3}
    assert math.isnan(value["auc"]), "the value itself stays"


def test_options_are_those_of_json():
    assert (
        measures_json({"b": {1}, "a": "é"}, default=sorted, sort_keys=True, ensure_ascii=False)
        == '{"a": "é", "b": [1]}'
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_settings_are_refused_rather_than_changed(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        settings_json(value)
    assert settings_json({"a": [1, 0.5, None]}) == '{"a": [1, 0.5, null]}'
