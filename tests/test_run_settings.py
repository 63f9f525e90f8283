"""Settings are checked when they are made, before anything is read."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from flip_hf.backbones import BACKBONES
from flip_hf.runs import settings as run_settings
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.settings import (
    DataSettings,
    EvaluateSettings,
    FinetuneSettings,
    MaskingSettings,
    ModelSettings,
    PredictSettings,
    PretrainSettings,
)
from flip_hf.training.ranges import RANGES, Range
from flip_hf.training.settings import TrainingSettings

SECTIONS = {"data": DataSettings, "model": ModelSettings, "masking": MaskingSettings, "training": TrainingSettings}


def test_every_number_has_a_range():
    numbers = set()
    for kind in (*SECTIONS.values(), PretrainSettings, FinetuneSettings, EvaluateSettings, PredictSettings):
        hints = get_type_hints(kind, vars(run_settings))
        numbers |= {f.name for f in fields(kind) if {int, float} & {hints[f.name], *get_args(hints[f.name])}}
    assert numbers == set(RANGES)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_number_out_of_its_range_is_refused(section):
    kind = SECTIONS[section]
    for name in [f.name for f in fields(kind) if f.name in RANGES]:
        bounds = RANGES[name]
        for wrong in (bounds.low - 1, math.nan, *([math.inf] if bounds.is_finite else [])):
            with pytest.raises(ValueError, match=rf"^{section}\.{name}={wrong} must be {bounds}$"):
                kind(**{name: wrong})
        kind(**{name: bounds.low + (0 if bounds.has_low else 1)})


def test_a_share_of_a_field_is_checked_too():
    TrainingSettings(oov_dropout={"user_id": 0.5})
    with pytest.raises(ValueError, match=r"training\.oov_dropout={'user_id': 1\.0} must be 0 or more and below 1"):
        TrainingSettings(oov_dropout={"user_id": 1.0})


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        (Range(1), [1, 2.5], [0.99, -1, math.inf, math.nan], "1 or more"),
        (Range(0, has_low=False), [1e-300], [0, -1], "above 0"),
        (Range(0, 1), [0, 0.5, 1], [-1e-9, 1 + 1e-9], "from 0 to 1"),
        (Range(0, 1, has_high=False), [0, 0.999], [1], "0 or more and below 1"),
        (Range(0, 1, has_low=False), [1], [0, 2], "above 0 and at most 1"),
    ],
)
def test_a_range_is_what_it_says(bounds, inside, outside, text):
    assert str(bounds) == text
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)


def test_the_label_is_no_field():
    for settings in ({"fields": ["user_id", "label"]}, {"label": "a", "fields": ["b", {"name": "a", "min_count": 2}]}):
        with pytest.raises(ValueError, match=r"data\.fields names '(label|a)', which is the label: .* set data\.label"):
            DataSettings(train_file=Path("a.csv"), **settings)
    DataSettings(train_file=Path("a.csv"), label="clicked", fields=["label"])


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    return tmp_path / "run"


def test_a_folder_without_a_model_is_refused(run_folder, tmp_path):
    with pytest.raises(ValueError, match=r"model=.*/run: this folder holds no model, .* did you mean .*/run/model\?$"):
        EvaluateSettings(str(run_folder))
    with pytest.raises(
        ValueError, match=r"pretrained=.*: this folder holds no model, because config\.json is missing$"
    ):
        FinetuneSettings(tmp_path / "new", pretrained=str(tmp_path))
    for name in (str(tmp_path / "missing"), "runs/misspelt/model"):
        with pytest.raises(ValueError, match=rf"model={name}: this folder does not exist, and the name is not that"):
            PredictSettings(name, Path("a.csv"), Path("b.csv"))
    EvaluateSettings(str(run_folder / "model"))
    EvaluateSettings("org/name")


def test_a_run_does_not_overwrite_what_it_starts_from(run_folder, tmp_path):
    (tmp_path / "link").symlink_to(run_folder)
    for output in (run_folder, tmp_path / "link", run_folder / "model"):
        with pytest.raises(ValueError, match="this run would overwrite it: choose another output_dir"):
            FinetuneSettings(output, pretrained=str(run_folder / "model"))
    FinetuneSettings(tmp_path / "new", pretrained=str(run_folder / "model"))


def test_an_evaluation_does_not_overwrite_its_rows(run_folder, tmp_path):
    rows = tmp_path / "test.csv"
    rows.write_text("user_id,label\n1,0\n")
    with pytest.raises(ValueError, match=r"output=.*test\.csv would overwrite the input .*test\.csv"):
        EvaluateSettings(str(run_folder / "model"), rows, data=DataSettings(test_file=rows))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": 5}, "training: 5 must be a mapping of settings, such as training: {num_train_epochs: ...}"),
        ({"model": None}, "model: None must be a mapping of settings, such as model: {text_encoder: ...}"),
        ({"data": {"csv": [1]}}, "data.csv: [1] must be a mapping of settings, such as data.csv: {delimiter: ...}"),
    ],
)
def test_a_value_in_the_place_of_settings_is_refused(tmp_path, settings, message):
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_run(FinetuneSettings, ["--output_dir", "x", "--config", str(tmp_path / "run.yaml")])


def test_an_output_folder_that_is_a_file_or_below_one_is_refused(run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            ValueError, match=f"^output_dir={folder}: {tmp_path}/file is a file; choose another folder$"
        ):
            PretrainSettings(folder)
    with pytest.raises(ValueError, match=r"output=.*/file is a file; choose another folder$"):
        EvaluateSettings(str(run_folder / "model"), tmp_path / "file" / "metrics.json")
    PretrainSettings(tmp_path / "new" / "run")


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_can_be_built_to_be_checked(tmp_path, name):
    PretrainSettings(tmp_path / "run", model=ModelSettings(options={"backbone": name}))
