"""What loading a checkpoint says of weights that are missing, left out or unexpected."""

import json
import logging

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertForMaskedLM

from flip_hf import FlipConfig, FlipForCTR, FlipForPreTraining, FlipModel


@pytest.fixture
def said(caplog):
    """The warnings of a call, and nothing that transformers logs besides."""

    def call(load):
        caplog.clear()
        transformers_log = logging.getLogger("transformers.modeling_utils")
        before = list(transformers_log.filters)
        transformers_log.addHandler(caplog.handler)
        try:
            with caplog.at_level(logging.WARNING):
                load()
        finally:
            transformers_log.removeHandler(caplog.handler)
        assert transformers_log.filters == before
        return [record.getMessage() for record in caplog.records]

    return call


@pytest.fixture(scope="module")
def pretrained_folder(ctr_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining") / "model"
    FlipForPreTraining(FlipConfig.from_pretrained(ctr_folder)).save_pretrained(folder)
    return folder


def test_what_is_left_out_on_purpose_is_not_reported(ctr_folder, pretrained_folder, said):
    for mode in ("joint", "id", "text"):
        assert said(lambda mode=mode: FlipForCTR.from_pretrained(ctr_folder, mode=mode)) == []
        assert said(lambda mode=mode: FlipModel.from_pretrained(ctr_folder, mode=mode)) == []
        assert said(lambda mode=mode: FlipModel.from_pretrained(pretrained_folder, mode=mode)) == []
    assert said(lambda: FlipForPreTraining.from_pretrained(pretrained_folder)) == []


def test_a_model_that_was_never_finetuned_is_one_line(pretrained_folder, said):
    (line,) = said(lambda: FlipForCTR.from_pretrained(pretrained_folder))
    assert line == (
        f"{pretrained_folder} was saved by FlipForPreTraining, which does not learn clicks and lacks fusion.id_weight, "
        "text_head.1.bias, text_head.1.weight, which were newly initialised: finetune it before you use its logits"
    )


def test_unexpected_weights_are_one_line(ctr_folder, tmp_path, said):
    FlipForCTR.from_pretrained(ctr_folder).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    extra = {f"flip.text_model.encoder.layer.0.adapter{i}": weights["text_head.1.bias"].clone() for i in range(5)}
    save_file(weights | extra, file, metadata={"format": "pt"})
    assert said(lambda: FlipForCTR.from_pretrained(tmp_path)) == [
        f"{tmp_path} has weights that FlipForCTR does not use: "
        + ", ".join(f"flip.text_model.encoder.layer.0.adapter{i}" for i in range(3))
        + " and 2 more"
    ]
    # Their tower is not built.
    assert said(lambda: FlipForCTR.from_pretrained(tmp_path, mode="id")) == []


def test_weights_of_another_shape_are_one_line(ctr_folder, tmp_path, said):
    FlipForCTR.from_pretrained(ctr_folder).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"embedding_dim": 8, "mode": "id"}))
    (line,) = said(lambda: FlipForCTR.from_pretrained(tmp_path, ignore_mismatched_sizes=True))
    assert line.startswith(f"{tmp_path}: these weights have another shape and are newly initialised: flip.backbone.")


def test_a_text_encoder_s_heads_and_later_layers_are_not_reported(ctr_folder, tmp_path, said):
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    saved = FlipConfig.from_pretrained(ctr_folder)
    BertForMaskedLM(BertConfig(**size, vocab_size=saved.text_config.vocab_size)).save_pretrained(tmp_path)

    def build():
        config = FlipConfig(text_config=AutoConfig.from_pretrained(tmp_path), text_layers=2, fields=saved.fields)
        return FlipForCTR.from_text_pretrained(str(tmp_path), config)

    assert said(build) == []
    weights = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.attention.self.query.scale"
    weights[name] = weights["bert.embeddings.LayerNorm.bias"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert said(build) == [f"{tmp_path} holds weights that its configuration does not have: {name}"]
