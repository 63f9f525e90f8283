"""Settings: which names exist, and what is said of one that does not."""

import copy
import json
import logging

import pytest
import torch
from example_runs import script
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

from flip_hf import FlipConfig, FlipForCTR, FlipForPreTraining
from flip_hf.backbones import BACKBONES, build_backbone
from flip_hf.runs.command_line import run_parser
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.settings import (
    DataSettings,
    EvaluateSettings,
    FinetuneSettings,
    ModelSettings,
    PredictSettings,
    PretrainSettings,
)

RUNS = [PretrainSettings, FinetuneSettings, EvaluateSettings, PredictSettings]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbon": "deepfm"}, r"no setting 'backbon' \(did you mean 'backbone'\?\)"),
        ({"temperature": 0.2}, r"no setting 'temperature' \(did you mean 'contrastive_temperature'\?\)"),
        ({"top_k": 3}, r"no setting 'top_k' \(known: .*backbone, "),
        ({"objectives": {"icll": 1.0}}, r"no setting 'objectives.icll' \(did you mean 'objectives.icl'\?\)"),
    ],
)
def test_a_caller_s_unknown_setting_is_refused(ctr_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        FlipConfig(**settings)
    saved = FlipConfig.from_pretrained(ctr_folder).to_dict()
    with pytest.raises(ValueError, match=message):
        FlipConfig.from_dict(saved, **settings)
    with pytest.raises(ValueError, match=message):
        FlipConfig.from_pretrained(ctr_folder, **settings)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(ctr_folder, **settings)
    loaded = FlipConfig.from_pretrained(ctr_folder)
    for cls in (FlipForCTR, AutoModelForSequenceClassification):
        for given in ({}, {"config": loaded}):
            with pytest.raises(ValueError, match=message):
                cls.from_pretrained(ctr_folder, **given, **settings)


def test_settings_of_transformers_are_known(ctr_folder):
    settings = {
        "architectures": ["FlipForCTR"],
        "attn_implementation": "eager",
        "dtype": "float32",
        "id2label": {0: "click"},
        "name_or_path": "here",
        "num_labels": 1,
        "output_attentions": True,
        "return_dict": False,
        "transformers_version": "5.0",
    }
    config = FlipConfig(**settings)
    assert config.dtype == torch.float32
    assert {name: getattr(config, name) for name in settings if name not in ("dtype", "attn_implementation")} == {
        name: value for name, value in settings.items() if name not in ("dtype", "attn_implementation")
    }
    # Not a choice: a click is one label, 0 or 1.
    assert FlipConfig(problem_type="regression").problem_type == "multi_label_classification"
    model = FlipForCTR.from_pretrained(ctr_folder, attn_implementation="eager", dtype="float64")
    assert (model.dtype, model.config.text_config._attn_implementation) == (torch.float64, "eager")


def test_settings_that_replace_saved_ones_are_checked(ctr_folder):
    for settings in ({"mode": "idd"}, {"mtm_loss": "ncee"}, {"embedding_dim": 0}):
        with pytest.raises(ValueError, match=f"FlipConfig: {next(iter(settings))}="):
            FlipConfig.from_pretrained(ctr_folder, **settings)


def test_a_configuration_survives_copies_and_round_trips(ctr_folder):
    config = FlipConfig.from_pretrained(ctr_folder)
    expected = config.to_dict()
    assert copy.deepcopy(config).to_dict() == expected
    assert FlipConfig.from_dict(expected).to_dict() == expected
    assert FlipConfig(**expected).to_dict() == expected
    assert AutoConfig.from_pretrained(ctr_folder).to_dict() == expected | {"_name_or_path": str(ctr_folder)}
    assert FlipConfig.from_json_file(ctr_folder / "config.json").fields == config.fields


@pytest.fixture
def newer_folder(ctr_folder, tmp_path):
    """A checkpoint of a later version, which has further settings."""
    folder = tmp_path / "newer"
    FlipForCTR.from_pretrained(ctr_folder).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"tower_norm": "layer", "objectives": {**values["objectives"], "rtd": 0.5}}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_file_s_unknown_settings_are_named_ignored_and_kept(newer_folder, caplog):
    def warnings():
        found = [r.getMessage() for r in caplog.records if "does not know" in r.getMessage()]
        caplog.clear()
        return found

    with caplog.at_level(logging.WARNING):
        config = FlipConfig.from_pretrained(newer_folder)
        assert warnings() == [
            "config.json: this version of flip_hf does not know the settings 'tower_norm', 'objectives.rtd' and "
            "ignores them; another version may have written them"
        ]
        assert FlipConfig.from_json_file(newer_folder / "config.json").tower_norm == "layer"
        assert len(warnings()) == 1
        assert type(FlipForCTR.from_pretrained(newer_folder, mode="id")) is FlipForCTR
        assert len(warnings()) == 1
    config.save_pretrained(newer_folder.parent / "again")
    again = json.loads((newer_folder.parent / "again" / "config.json").read_text())
    assert (again["tower_norm"], again["objectives"]["rtd"]) == ("layer", 0.5)
    # What can't be computed is no smaller fault for being saved.
    with pytest.raises(ValueError, match="objectives 'rtd' are not among mlm, mtm, icl, text_mlm"):
        FlipForPreTraining.from_pretrained(newer_folder)
    with pytest.raises(ValueError, match="no setting 'tower_norm'"):
        FlipConfig.from_pretrained(newer_folder, tower_norm="none")


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_refuses_an_option_it_does_not_have(name):
    with pytest.raises(ValueError, match=rf"backbone '{name}' has no option 'hiden_sizes' \((did you|known: )"):
        build_backbone(name, 2, 4, {"hiden_sizes": [8]})


def test_the_pipeline_names_the_nearest_setting(ctr_folder):
    with pytest.raises(TypeError, match=r"ctr-prediction has no setting 'text_budgt' \(did you mean 'text_budget'\?\)"):
        pipeline("ctr-prediction", model=str(ctr_folder), text_budgt=0.5)
    with pytest.raises(TypeError, match=r"no setting 'towrs' \(did you mean 'towers'\?\)"):
        pipeline("ctr-prediction", model=str(ctr_folder))([], towrs=True)


# ----- the scripts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbon": "deepfm"}, r"model\.options has no setting 'backbon' \(did you mean 'backbone'\?\)"),
        ({"objectives": {"icll": 1}}, r"model\.options has no setting 'objectives.icll'"),
        ({"mode": "id"}, r"model\.options\.mode can't be set: set mode \(finetuning"),
        ({"fields": []}, r"model\.options\.fields can't be set: set data\.fields instead"),
        ({"text_layers": 1}, r"model\.options\.text_layers can't be set: set model\.text_layers instead"),
        ({"text_config": {}}, r"model\.options\.text_config can't be set: set model\.text_encoder instead"),
        ({"embedding_dim": 0}, r"^model\.options: FlipConfig: embedding_dim=0 must be at least 1$"),
        ({"embedding_dim": "abc"}, r"^model\.options: Field 'embedding_dim' expected int, got str \(value: 'abc'\)$"),
        ({"objectives": 5}, r"^model\.options: Field 'objectives' expected a dict, got int$"),
        ({"mtm_loss": "x"}, r"^model\.options: FlipConfig: mtm_loss='x' is not one of nce, "),
        ({"dtype": "abc"}, r"^model\.options: .*'abc'"),
    ],
)
def test_options_of_the_model_are_checked_first(options, message):
    with pytest.raises(ValueError, match=message):
        ModelSettings(options=options)


@pytest.mark.parametrize("kind", [PretrainSettings, FinetuneSettings])
def test_options_of_the_backbone_are_checked_first(kind, tmp_path):
    for options, message in (
        (
            {"backbone_options": {"hiden_sizes": [8]}},
            r"'dcnv2' has no option 'hiden_sizes' \(did you mean 'hidden_sizes",
        ),
        ({"backbone": "deepfn"}, "backbone='deepfn' is not one of lr, fm"),
        ({"backbone_options": {"hidden_sizes": "a"}}, r"model\.options\.backbone_options={'hidden_sizes': 'a'}: "),
    ):
        with pytest.raises(ValueError, match=message):
            kind(tmp_path, model=ModelSettings(options=options))
    # The saved configuration says which backbone it is.
    FinetuneSettings(
        tmp_path, pretrained="org/name", model=ModelSettings(options={"backbone_options": {"cin_sizes": [8]}})
    )


def test_settings_of_fields_are_checked_first():
    with pytest.raises(ValueError, match=r"field 'x': unknown settings 'knd' \(did you mean 'kind'\?\)"):
        DataSettings(source="movielens-100k", fields=["user_id", {"name": "x", "knd": "numeric"}])


NOW = "training.epochs is now training.num_train_epochs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainng.seed", "3"], "unrecognized arguments: --trainng.seed 3 (did you mean training.seed?)"),
        (["--output-dri=x"], "unrecognized arguments: --output_dri=x (did you mean output_dir?)"),
        (["--data", '{"feilds": ["a"]}'], "Group 'data' does not accept option 'feilds' (did you mean data.fields?)"),
        ({"trainng": {"seed": 3}}, "Option 'trainng.seed' is not accepted (did you mean training.seed?)"),
        ({"training": {"sed": 3}}, "Group 'training' does not accept option 'sed' (did you mean training.seed?)"),
        ({"pretraind": "x"}, "Option 'pretraind' is not accepted (did you mean pretrained?)"),
        ({"zzz": 1}, "Option 'zzz' is not accepted"),
        ({"masking": 1}, "Option 'masking' is not accepted (finetuning has no setting masking; pretraining has)"),
        (
            ["--training.warmup", "3"],
            "unrecognized arguments: --training.warmup 3 (did you mean training.warmup_ratio?)",
        ),
        (["--training.epochs", "3"], f"unrecognized arguments: --training.epochs 3 ({NOW})"),
        ({"training": {"epochs": 3}}, f"Group 'training' does not accept option 'epochs' ({NOW})"),
    ],
)
def test_an_unknown_flag_or_key_is_refused_with_the_nearest(tmp_path, capsys, arguments, message):
    if isinstance(arguments, dict):
        (tmp_path / "run.yaml").write_text(json.dumps(arguments))
        arguments = ["--config", str(tmp_path / "run.yaml")]
    with pytest.raises(SystemExit):
        parse_run(FinetuneSettings, ["--output_dir", "x", *arguments])
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


@pytest.mark.parametrize(
    ("kind", "other", "flags", "only"),
    [
        (PretrainSettings, "pretraining has no setting mode; finetuning has", ["--output_dir", "x"], "--mode"),
        (FinetuneSettings, "finetuning has no setting masking; pretraining has", ["--output_dir", "x"], "--masking.x"),
        (EvaluateSettings, "evaluation has no setting keep; prediction has", ["--model", "a/b"], "--keep"),
    ],
)
def test_a_setting_of_another_script_is_called_that(capsys, kind, other, flags, only):
    with pytest.raises(SystemExit):
        parse_run(kind, [*flags, only, "1"])
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {only} 1 ({other})\n")


@pytest.mark.parametrize(
    ("name", "value"), [("data.csv.null_values", "NA"), ("data.histories", "liked_titles"), ("data.fields", "age")]
)
def test_a_value_in_the_place_of_a_list_is_shown_as_one(capsys, name, value):
    with pytest.raises(SystemExit):
        parse_run(FinetuneSettings, ["--output_dir", "x", f"--{name}", value])
    assert capsys.readouterr().err.endswith(f"\nWrite a list, such as [{value}]\n")


@pytest.mark.parametrize("kind", RUNS)
def test_help_describes_every_setting(kind):
    parser = run_parser(kind, "What it does.\n\npython it.py --config it.yaml")
    options = {name: action for name, action in parser._option_string_actions.items() if "+" not in name}
    assert {"--help", "--config"} < set(options)
    assert [name for name, action in options.items() if len(action.help or "") < 10] == []
    shown = parser.format_help()
    assert shown.splitlines()[:4] == [
        f"usage: {parser.prog} [--config FILE.yaml] [--SETTING VALUE ...]",
        "",
        "What it does.",
        "",
    ]
    assert "\npython it.py --config it.yaml\n" in shown
    settings = [name for name in options if name not in ("--help", "-h", "--config", "--print_config")]
    settings = [name for name in settings if not any(other.startswith(f"{name}.") for other in options)]
    assert " ".join(shown.split()).count("type: ") == len(settings)
    assert "<class" not in shown


def test_help_of_a_script_is_its_docstring(capsys):
    with pytest.raises(SystemExit):
        script("predict")(["--help"])
    shown = capsys.readouterr().out
    assert "\npython examples/predict.py --model runs/flip/model --input impressions.csv --output scores" in shown
