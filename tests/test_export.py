"""What is exported computes what the model computes, whole or not at all."""

import sys
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import BertConfig

from flip_hf import FieldConfig, FlipConfig, FlipCTRCollator, FlipForCTR, FlipForPreTraining, FlipProcessor
from flip_hf import export as exporting
from flip_hf.backbones import BACKBONES
from flip_hf.export import OnnxScorer, export_onnx, export_program
from flip_hf.nn.sharded_embeddings import sharded_features

onnx = pytest.importorskip("onnx")

TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
# Both towers, and every kind of input that the graph treats in its own way.
SETTINGS = {
    "id": {"backbone": "deepfm"},
    "text": {"text_pooling": "cls"},
    "joint": {"fusion": "gated"},
}
NAMES = {
    "id": ["feature_ids"],
    "text": ["input_ids", "attention_mask"],
    "joint": ["feature_ids", "input_ids", "attention_mask"],
}
LINEAR_LAYERS_OF_TEXT = 6


@pytest.fixture(scope="module")
def rows(click_rows):
    genres = [["drama", "comedy"], ["drama"], []]
    return [
        {
            "user_id": click_rows["user_id"][i],
            "title": click_rows["title"][i],
            "genre": genres[i % 3],
            "seen": click_rows["title"][: i % 4],
            "plot": "film " * (i % 40),
        }
        for i in range(100)
    ]


@pytest.fixture(scope="module")
def processor(rows, wordpiece):
    fields = [
        "user_id",
        "title",
        FieldConfig("genre", kind="multi_categorical", max_values=3),
        FieldConfig("seen", kind="sequence", share_embedding="title", target="title", max_values=4),
        FieldConfig("plot", kind="text"),
    ]
    return FlipProcessor.fit(rows, fields, wordpiece)


def new_model(processor, mode, **settings):
    """Weights of a size at which errors show."""
    torch.manual_seed(0)
    text = BertConfig(**TEXT, vocab_size=len(processor.tokenizer))
    settings = {"embedding_dim": 4, **settings}
    model = FlipForCTR(FlipConfig(text_config=text, fields=processor.fields, mode=mode, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def models(processor):
    return {mode: new_model(processor, mode, **settings) for mode, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return {mode: export_onnx(model, folder / "new" / f"{mode}.onnx") for mode, model in models.items()}


def batches(processor, rows, mode):
    """One row and several, short texts and long ones, padding at the end of a row and in the place of a text."""
    encoded = processor.encode(rows).to_pylist()
    for chosen, multiple in (([0], 1), ([39], 1), ([0, 39], 8), (range(5), 1), (range(100), 8)):
        batch = FlipCTRCollator(processor, mode, pad_to_multiple_of=multiple)([encoded[i] for i in chosen])
        if mode != "id":
            batch["attention_mask"][-1, 1:] = 0
        assert sorted(batch) == sorted(NAMES[mode])
        yield batch


@torch.no_grad()
def logits_of(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_program_gives_the_models_logits(models, processor, rows, mode):
    program = export_program(models[mode])
    module = program.module()
    lengths = set()
    for batch in batches(processor, rows, mode):
        logits = module(**batch)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, logits_of(models[mode], batch), rtol=1e-5, atol=1e-5)
        lengths.add(batch["input_ids"].shape[1] if mode != "id" else 0)
    assert len(lengths) > 2 or mode == "id"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_program_of_every_backbone(processor, rows, backbone):
    model = new_model(processor, "id", backbone=backbone)
    module = export_program(model).module()
    for batch in batches(processor, rows, "id"):
        torch.testing.assert_close(module(**batch), logits_of(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_file_of_every_backbone(processor, rows, backbone, tmp_path):
    model = new_model(processor, "id", backbone=backbone)
    score = OnnxScorer(export_onnx(model, tmp_path / "model.onnx"), num_threads=1)
    for batch in batches(processor, rows, "id"):
        expected = logits_of(model, batch).sigmoid()
        torch.testing.assert_close(torch.from_numpy(score(batch)), expected, rtol=1e-5, atol=1e-5)


def test_exporting_leaves_the_model_as_it_was(processor, rows):
    model = new_model(processor, "joint", embedding_dim=2).train()
    model.flip.text_model.eval()
    program = export_program(model)
    assert model.training
    assert not model.flip.text_model.training
    assert all(p.requires_grad for p in model.parameters())
    (batch, *_) = batches(processor, rows, "joint")
    torch.testing.assert_close(program.module()(**batch), logits_of(model.eval(), batch), rtol=1e-5, atol=1e-5)


def test_a_program_of_less_precision_gives_single_precision(processor, rows):
    model = new_model(processor, "joint").to(torch.bfloat16)
    (batch, *_) = batches(processor, rows, "joint")
    logits = export_program(model).module()(**batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, logits_of(model, batch).float(), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"the model is in torch\.bfloat16.*dtype=torch\.float32"):
        export_onnx(model, "never written.onnx")


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_file_gives_the_models_probabilities(models, files, processor, rows, mode):
    score = OnnxScorer(files[mode], num_threads=1)
    assert score.inputs == NAMES[mode]
    graph = onnx.load(files[mode]).graph
    assert [value.name for value in graph.output] == ["logits"]
    axes = [d.dim_param for value in graph.input for d in value.type.tensor_type.shape.dim if d.dim_param]
    assert set(axes) == ({"batch"} if mode == "id" else {"batch", "length"})
    for batch in batches(processor, rows, mode):
        expected = logits_of(models[mode], batch)
        (logits,) = score._session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        probabilities = score({**batch, "labels": torch.zeros(len(expected))})
        assert probabilities.dtype == np.float32
        assert probabilities.shape == (len(expected),)
        np.testing.assert_allclose(probabilities, expected.double().sigmoid(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(score({name: value.numpy() for name, value in batch.items()}), probabilities)


def test_what_a_processor_returns_is_scored(models, files, processor, rows):
    score = OnnxScorer(files["joint"])
    expected = logits_of(models["joint"], dict(processor(rows[:7], return_tensors="pt"))).sigmoid()
    for kind in ("pt", "np", None):
        np.testing.assert_allclose(score(processor(rows[:7], return_tensors=kind)), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"the batch lacks input_ids, attention_mask, which this model reads"):
        score({"feature_ids": np.zeros((1, 9))})


def test_a_file_says_nothing_of_the_machine_that_wrote_it(files):
    for path in files.values():
        content = path.read_bytes()
        assert not any(part in content for part in (b".py", str(path.parent).encode(), sys.prefix.encode()))
        assert sorted(p.name for p in path.parent.iterdir()) == sorted(p.name for p in files.values())


def test_the_text_tower_in_8_bits(models, files, processor, rows, tmp_path, caplog):
    path = export_onnx(models["joint"], tmp_path / "int8.onnx", int8=True)
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]
    assert not [record for record in caplog.records if record.name == "root"]
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") == LINEAR_LAYERS_OF_TEXT
    # The ID-based model's layers and all embeddings are what they were.
    small = [weight for weight in graph.initializer if weight.data_type == onnx.TensorProto.INT8 and weight.dims]
    assert {tuple(w.dims) for w in small if len(w.dims) == 2} == {(32, 32), (32, 256), (256, 32)}
    # Of four bytes of each weight one is left, beside some operators more.
    assert files["joint"].stat().st_size - path.stat().st_size > 2 * (4 * 32 * 32 + 2 * 32 * 256)
    full, score = OnnxScorer(files["joint"]), OnnxScorer(path)
    for batch in batches(processor, rows, "joint"):
        errors = np.abs(score(batch) - full(batch))
        assert 0 < errors.max() < 0.005
    # Far less than rows differ from each other.
    assert errors.max() < 0.2 * full(batch).std()


@pytest.mark.parametrize("int8", [False, True])
def test_weights_too_large_for_one_file_lie_beside_it(models, files, processor, rows, tmp_path, monkeypatch, int8):
    monkeypatch.setattr(exporting, "_MOST_INLINE_BYTES", 0)
    path = tmp_path / "one" / "model.onnx"
    export_onnx(models["text"], path, int8=int8)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    path.parent.rename(tmp_path / "other")
    score, whole = OnnxScorer(tmp_path / "other" / "model.onnx"), OnnxScorer(files["text"])
    for batch in batches(processor, rows, "text"):
        np.testing.assert_allclose(score(batch), whole(batch), atol=0.03 if int8 else 1e-6)


def test_a_file_that_could_not_be_written_leaves_the_old_one(models, tmp_path, monkeypatch):
    def broken(self, destination, **kwargs):
        destination.write_bytes(b"half")
        raise OSError("no space left on device")

    (tmp_path / "model.onnx").write_bytes(b"old")
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        export_onnx(models["id"], tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_what_is_not_installed_is_named(models, monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"need {name}: pip install 'flip_hf\[serve\]'"):
        export_onnx(models["id"], tmp_path / "model.onnx")
    if name == "onnxruntime":
        with pytest.raises(ImportError, match=r"pip install 'flip_hf\[serve\]'"):
            OnnxScorer(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", [export_program, lambda model: export_onnx(model, "never written.onnx")])
def test_what_can_not_be_served_is_not_exported(processor, tmp_path, export):
    text = BertConfig(**TEXT, vocab_size=len(processor.tokenizer))
    config = FlipConfig(text_config=text, fields=processor.fields, embedding_dim=4)
    pretrained = FlipForPreTraining(config)
    pretrained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"saved by FlipForPreTraining, which does not learn clicks.*Finetune it"):
        export(FlipForCTR.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="only a FlipForCTR can be exported for serving, not a FlipForPreTraining"):
        export(pretrained)
    # One of two processes, as far as the model is told.
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_world_size", return_value=2),
        mock.patch("torch.distributed.get_rank", return_value=0),
        sharded_features(),
    ):
        sharded = new_model(processor, "id")
    with pytest.raises(ValueError, match="the feature table is sharded: save the model, load it unsharded"):
        export(sharded)


def test_a_file_must_be_there_and_ours(models, tmp_path):
    with pytest.raises(ValueError, match=r"int8=True quantizes the text tower, but a model in mode='id' has none"):
        export_onnx(models["id"], tmp_path / "model.onnx", int8=True)
    with pytest.raises(FileNotFoundError, match=r"model\.onnx: no such file; export_onnx"):
        OnnxScorer(tmp_path / "model.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["logits"])], "other", [value], [])
    graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1]))
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"other\.onnx is not a model that export_onnx wrote"):
        OnnxScorer(tmp_path / "other.onnx")
