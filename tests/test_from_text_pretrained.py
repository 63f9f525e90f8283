"""A new model around a pretrained text encoder, in one call."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, BertConfig

from flip_hf import FlipConfig, FlipCTRCollator, FlipForCTR, FlipForPreTraining, FlipModel, FlipProcessor
from flip_hf.runs.build import new_model
from flip_hf.runs.settings import ModelSettings

SMALL = {"embedding_dim": 8, "projection_dim": 16, "backbone_options": {"hidden_sizes": [16]}}


@pytest.fixture
def encoder(processor, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(1)
    config = BertConfig(vocab_size=len(processor.tokenizer), **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


@pytest.mark.parametrize("cls", [FlipModel, FlipForPreTraining, FlipForCTR])
def test_the_configuration_is_built(encoder, processor, cls):
    model = cls.from_text_pretrained(encoder, processor=processor, text_layers=1, backbone="deepfm", **SMALL)
    assert model.config.fields == processor.fields
    assert model.config.text_config.hidden_size == 32
    assert model.config.text_base_model == "encoder"
    assert (model.config.backbone, model.config.embedding_dim) == ("deepfm", 8)
    saved, taken = load_file(f"{encoder}/model.safetensors"), model.base_model.text_model.state_dict()
    assert {name.split(".")[2] for name in taken if name.startswith("encoder.layer")} == {"0"}
    for name, value in taken.items():
        assert torch.equal(value, saved[name]), name


@pytest.mark.parametrize("has_config", [False, True])
def test_pretraining_knows_how_often_features_were_seen(encoder, processor, has_config):
    given = SMALL
    if has_config:
        text_config = AutoConfig.from_pretrained(encoder)
        given = {"config": FlipConfig(text_config=text_config, fields=processor.fields, **SMALL)}
    model = FlipForPreTraining.from_text_pretrained(encoder, processor=processor, **given)
    mtm = model.objectives["mtm"]
    expected = processor.feature_counts.clamp(min=1)
    expected[:2] = 0
    assert torch.equal(mtm.cumulative_counts.diff()[mtm.feature_slots], expected)
    assert len(expected.unique()) > 2, "or uniform counts would pass"


def test_settings_of_loading_reach_the_text_encoder(encoder, processor, click_rows):
    settings = {"dtype": torch.bfloat16, "attn_implementation": "eager", "local_files_only": True, **SMALL}
    model = FlipForCTR.from_text_pretrained(encoder, processor=processor, **settings)
    assert model.flip.text_model.dtype == torch.bfloat16
    assert model.flip.text_model.config._attn_implementation == "eager"
    assert model.flip.feature_embeddings.weight.dtype == torch.float32
    encoded = processor.encode_dataset(Dataset.from_dict(click_rows).select(range(1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**FlipCTRCollator(processor)([encoded[0]]), output_attentions=True).attentions is not None


@pytest.mark.parametrize("settings", [{"mode": "id"}, {"text_weights": False}], ids=str)
def test_weights_that_are_not_asked_for_are_not_read(encoder, processor, settings, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(AutoModel, "from_pretrained", read)
    model = FlipForCTR.from_text_pretrained(encoder, processor=processor, **settings, **SMALL)
    assert model.config.text_base_model is None
    assert (model.flip.text_model is None) == ("mode" in settings)


def test_code_of_a_text_encoder_runs_only_for_who_says_so(encoder, processor, monkeypatch):
    asked = []

    def loading(load):
        def noting(path, **kwargs):
            asked.append(kwargs["trust_remote_code"])
            return load(path, **kwargs)

        return noting

    for cls in (AutoConfig, AutoModel):
        monkeypatch.setattr(cls, "from_pretrained", loading(cls.from_pretrained))
    FlipForCTR.from_text_pretrained(encoder, processor=processor, **SMALL)
    assert asked == [False] * 3
    FlipForCTR.from_text_pretrained(encoder, processor=processor, trust_remote_code=True, **SMALL)
    assert asked[3:] == [True] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_layer": 1}, "has no setting 'text_layer' .*text_layers"),
        ({"revison": "main"}, "has no setting 'revison' .*revision"),
        ({"objectives": {"mlmm": 1.0}}, r"has no setting 'objectives\.mlmm'"),
        ({"text_config": {}}, "from_text_pretrained sets text_config itself"),
        ({"processor": None}, "FlipForPreTraining.from_text_pretrained needs processor="),
        ({"backbone": "dcnv3"}, "dcnv3"),
        ({"text_layers": 7}, "text_layers=7, but the text encoder has 2 layers"),
    ],
    ids=str,
)
def test_what_nobody_knows_is_refused(encoder, processor, settings, message):
    with pytest.raises(ValueError, match=message):
        FlipForPreTraining.from_text_pretrained(encoder, **{"processor": processor, **settings})


def test_a_configuration_has_the_processors_fields_and_all_the_settings(encoder, processor, click_rows):
    text_config = AutoConfig.from_pretrained(encoder)
    other = FlipProcessor.fit(click_rows, [f.name for f in processor.fields][:2], processor.tokenizer)
    config = FlipConfig(text_config=text_config, fields=other.fields, **SMALL)
    with pytest.raises(ValueError, match="the processor's fields are not the model's"):
        FlipForCTR.from_text_pretrained(encoder, config, processor)
    with pytest.raises(ValueError, match="set 'text_layers' in the config that you pass"):
        FlipForCTR.from_text_pretrained(encoder, config, text_layers=1)


@pytest.mark.parametrize("text_pretrained", [True, False])
def test_a_run_builds_the_model_so(encoder, processor, text_pretrained):
    settings = ModelSettings(text_encoder=encoder, text_layers=1, text_pretrained=text_pretrained, options=SMALL)
    model = new_model(FlipForPreTraining, settings, processor)
    weights = load_file(f"{encoder}/model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(model.get_input_embeddings().weight, weights) == text_pretrained
    assert model.config.text_config.num_hidden_layers == 1
    assert model.objectives["mtm"].cumulative_counts[-1] > len(processor.feature_counts)
