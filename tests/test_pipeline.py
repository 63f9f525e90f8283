"""The pipeline "ctr-prediction" serves what the model and its processor compute."""

import math
import time
import types

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, pipeline

from flip_hf import (
    CTRPredictionPipeline,
    FieldConfig,
    FlipConfig,
    FlipCTRCollator,
    FlipForCTR,
    FlipForPreTraining,
    FlipModel,
    FlipProcessor,
)
from flip_hf.data.schema import InputError

TASK = "ctr-prediction"
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def make_config(processor, **settings):
    text_config = BertConfig(**TEXT, vocab_size=len(processor.tokenizer))
    return FlipConfig(
        text_config=text_config,
        fields=processor.fields,
        embedding_dim=4,
        projection_dim=8,
        backbone_options={"hidden_sizes": [8]},
        **settings,
    )


def new_model(cls, processor, **settings):
    """A model whose towers disagree."""
    torch.manual_seed(0)
    model = cls(make_config(processor, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, click_rows, field_names, wordpiece):
    folder = tmp_path_factory.mktemp("joint")
    processor = FlipProcessor.fit(click_rows, field_names, wordpiece, label="label")
    for part in (new_model(FlipForCTR, processor), processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipes(folder):
    return {mode: pipeline(TASK, model=folder, model_kwargs={"mode": mode}) for mode in ("joint", "id", "text")}


@pytest.fixture
def pipe(pipes):
    pipes["joint"].fallbacks.clear()
    return pipes["joint"]


@pytest.fixture(scope="module")
def rows(click_rows, field_names):
    return [dict(zip(field_names, row, strict=True)) for row in zip(*(click_rows[n] for n in field_names), strict=True)]


@torch.no_grad()
def expected(folder, rows, mode="joint"):
    """Probabilities row by row, by the model and the processor themselves."""
    model, processor = FlipForCTR.from_pretrained(folder, mode=mode), FlipProcessor.from_pretrained(folder)
    return [model(**processor([row], return_tensors="pt")).logits.double().sigmoid().item() for row in rows]


def probabilities(results):
    results = list(results)
    assert all(list(result) == ["probability"] and type(result["probability"]) is float for result in results)
    return [result["probability"] for result in results]


@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_probabilities_are_those_of_the_model_in_the_order_of_the_rows(pipes, folder, rows, mode):
    pipe = pipes[mode]
    assert type(pipe) is CTRPredictionPipeline
    assert not pipe.model.training
    wanted = expected(folder, rows[:40], mode)
    assert np.ptp(wanted) > 0.01
    assert probabilities(pipe(rows[:40])) == pytest.approx(wanted, abs=1e-6)
    assert probabilities(pipe(rows[:40], batch_size=7)) == pytest.approx(wanted, abs=1e-6)
    assert probabilities([pipe(rows[3])]) == pytest.approx(wanted[3:4], abs=1e-6)


def test_rows_may_come_in_any_form(pipe, folder, rows):
    rows = rows[:20]
    wanted = pytest.approx(probabilities(pipe(rows)), abs=1e-6)
    frame = pd.DataFrame(rows)
    for form in (
        tuple(rows),
        frame,
        frame.iloc[::-1].iloc[::-1],
        pa.Table.from_pylist(rows),
        pa.RecordBatch.from_pylist(rows),
        datasets.Dataset.from_list(rows),
    ):
        result = pipe(form)
        assert type(result) is list
        assert probabilities(result) == wanted, type(form)
    for stream in ((row for row in rows), iter(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        result = pipe(stream)
        assert isinstance(result, types.GeneratorType)
        assert probabilities(result) == wanted, type(stream)
    assert pipe([]) == []
    assert list(pipe(iter([]))) == []
    reordered = [{**dict(reversed(row.items())), "an extra column": 1, "label": 1} for row in rows]
    assert probabilities(pipe(reordered)) == wanted
    assert probabilities(pipe.predict(rows)) == wanted


def test_a_row_may_hold_several_values(click_rows, wordpiece):
    log = {**click_rows, "genre": [["drama", "comedy"], ["drama"], []] * 100}
    fields = ["user_id", FieldConfig("genre", kind="multi_categorical")]
    processor = FlipProcessor.fit(log, fields, wordpiece)
    pipe = CTRPredictionPipeline(new_model(FlipForCTR, processor), processor)
    row = {"user_id": 3, "genre": ["drama", "comedy"]}
    assert pipe(row)["probability"] == pytest.approx(pipe([row, row])[1]["probability"], abs=1e-6)
    several = {"user_id": [3, 4], "genre": [["drama"], ["comedy"]]}
    with pytest.raises(InputError, match=r"field 'user_id', row 0.*one value per row"):
        pipe(several)


def test_rows_of_like_length_share_a_batch(pipe, rows, monkeypatch):
    shapes = []
    real = pipe.model.forward
    monkeypatch.setattr(pipe.model, "forward", lambda **batch: shapes.append(batch["input_ids"].shape) or real(**batch))
    short, long = {**rows[0], "title": "42"}, {**rows[0], "title": "film " * 60}
    results = pipe([short, long] * 4, batch_size=4)
    assert [shape[0] for shape in shapes] == [4, 4]
    assert shapes[0][1] < 40 < shapes[1][1]
    assert results[0] != results[1]
    assert results[::2] == [results[0]] * 4
    assert results[1::2] == [results[1]] * 4


def test_a_stream_is_read_a_bounded_chunk_ahead(pipe, rows):
    taken = []

    def stream():
        for i in range(300):
            taken.append(i)
            yield rows[i % len(rows)]

    results = pipe(stream(), batch_size=2)
    assert taken == []
    first = next(results)
    assert len(taken) == 32
    rest = list(results)
    assert len(taken) == 300
    wanted = probabilities(pipe([rows[i % len(rows)] for i in range(300)]))
    assert probabilities([first, *rest]) == pytest.approx(wanted, abs=1e-6)


def test_towers_are_shown_where_there_are_two(pipes, pipe, folder, rows):
    results = pipe(rows[:10], towers=True)
    assert list(results[0]) == ["probability", "id_probability", "text_probability"]
    for mode, name in (("joint", "probability"), ("id", "id_probability"), ("text", "text_probability")):
        found = [result[name] for result in results]
        assert found == pytest.approx(expected(folder, rows[:10], mode), abs=1e-6)
    assert pipeline(TASK, model=folder, towers=True)(rows[0]) == pytest.approx(results[0], abs=1e-6)
    for mode in ("id", "text"):
        with pytest.raises(ValueError, match=f"towers=True needs a model with both towers; .* mode='{mode}'"):
            pipes[mode](iter(rows), towers=True)
    with pytest.raises(ValueError, match="needs a model with both towers"):
        pipeline(TASK, model=folder, mode="id", towers=True)


def test_one_tower_serves_alone(pipes, folder, rows, monkeypatch):
    for mode in ("id", "text"):
        alone = pipeline(TASK, model=folder, mode=mode)
        names = {name for name, _ in alone.model.named_modules()}
        assert names == {name for name, _ in pipes[mode].model.named_modules()}
        assert any("text_model" in name for name in names) == (mode == "text")
        assert any("feature_embeddings" in name for name in names) == (mode == "id")
        assert probabilities(alone(rows[:10])) == pytest.approx(expected(folder, rows[:10], mode), abs=1e-6)
    # The ID-based model's rows get no text at all.
    template = type(alone.processor.template)
    monkeypatch.setattr(template, "assemble", lambda *_: pytest.fail("the ID-based model reads no text"))
    assert len(pipes["id"](rows)) == len(rows)
    # A model that the caller holds stays whole.
    model, processor = FlipForCTR.from_pretrained(folder), FlipProcessor.from_pretrained(folder)
    CTRPredictionPipeline(model, processor, mode="id")
    assert model.config.mode == "joint"
    assert model.flip.text_model is not None
    with pytest.raises(ValueError, match="a model in mode='id' has no tower for mode='text'"):
        pipeline(TASK, model=folder, model_kwargs={"mode": "id"}, mode="text")


def test_fallbacks_are_counted_and_errors_name_the_row(pipe, rows):
    pipe({**rows[0], "user_id": "never seen", "gender": None})
    list(pipe([{**rows[0], "user_id": "never seen", "gender": "M"}] * 3 + [rows[1]]))
    assert pipe.fallbacks["user_id"] == {"oov": 4}
    assert pipe.fallbacks["gender"]["missing"] >= 1
    assert "age" not in pipe.fallbacks
    bad = [*rows[:40], {**rows[0], "age": 20.5}]
    with pytest.raises(InputError, match=r"field 'age', row 40, value 20\.5: an id must be"):
        pipe(bad)
    with pytest.raises(InputError, match=r"field 'age', row 40, value 20\.5"):
        list(pipe(iter(bad), batch_size=1))
    without = {name: value for name, value in rows[0].items() if name != "age"}
    with pytest.raises(InputError, match=r"field 'age'.*the column is missing"):
        pipe(without)
    with pytest.raises(InputError, match="field 'age', row 1: the row lacks this field"):
        pipe([rows[0], without])
    with pytest.raises(InputError, match=r"value 'impressions\.csv': rows must be a dict"):
        pipe("impressions.csv")
    with pytest.raises(InputError, match="value 3: rows must be a dict"):
        pipe(3)
    with pytest.raises(ValueError, match="batch_size=-1 must be"):
        pipe(rows, batch_size=-1)
    with pytest.raises(TypeError, match="tower"):
        pipe(rows, tower=True)


def test_arrow_data_of_any_library_is_scored(pipe, rows):
    wanted = pytest.approx(probabilities(pipe(rows)), abs=1e-6)
    frame, table = pl.DataFrame(rows), pa.Table.from_pylist(rows)
    assert probabilities(pipe(frame)) == wanted
    reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=7))
    stream = pipe(reader, batch_size=2)
    assert isinstance(stream, types.GeneratorType)
    assert probabilities(stream) == wanted


def test_ids_that_are_spelled_otherwise_than_in_training_are_warned_of_once(folder, rows, caplog):
    pipe = pipeline(TASK, model=folder, mode="id")
    served = [{**row, "user_id": f"{row['user_id']}.0"} for row in rows[:30]]
    seen = pipe.processor.vocabulary.values[0][0].as_py()
    for row in served:
        pipe(row)
    warned = [m for m in caplog.messages if "user_id" in m]
    assert warned == [
        f"the 10 rows so far, field 'user_id': 100% of the rows unseen (0% in training); "
        f"seen in training: {seen!r}; here: {served[0]['user_id']!r}"
    ]


def test_what_was_saved_loads_again(pipe, folder, rows, tmp_path):
    pipe.save_pretrained(tmp_path / "joint")
    again = pipeline(TASK, model=str(tmp_path / "joint"))
    assert probabilities(again(rows[:5])) == probabilities(pipe(rows[:5]))
    pipeline(TASK, model=folder, mode="id").save_pretrained(tmp_path / "id")
    alone = pipeline(TASK, model=tmp_path / "id")
    assert alone.model.config.mode == "id"
    assert probabilities(alone(rows[:5])) == pytest.approx(expected(folder, rows[:5], "id"), abs=1e-6)
    assert not list((tmp_path / "joint").glob("*.py"))
    with pytest.raises(ValueError, match="push_to_hub"):
        pipe.save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("cls", [FlipForPreTraining, FlipModel])
@pytest.mark.parametrize("settings", [{}, {"mode": "id"}, {"model_kwargs": {"mode": "id"}}], ids=str)
def test_a_model_that_has_not_learned_clicks_is_not_served(processor, tmp_path, cls, settings):
    for part in (new_model(cls, processor), processor):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"saved by {cls.__name__}, which does not learn clicks.*Finetune it"):
        pipeline(TASK, model=tmp_path, **settings)


def test_what_does_not_belong_together_is_refused(folder, processor, click_rows):
    model = FlipForCTR.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"lacks fusion\.bias, fusion\.oov_weights, which were newly initialised"):
        pipeline(TASK, model=folder, model_kwargs={"fusion": "gated"})
    with pytest.raises(ValueError, match="needs a FlipForCTR, not a FlipModel"):
        CTRPredictionPipeline(model.flip, processor)
    with pytest.raises(ValueError, match="not a BertForSequenceClassification"):
        pipeline(TASK, model=BertForSequenceClassification(BertConfig(**TEXT)), processor=processor)
    with pytest.raises(ValueError, match=r"processor=FlipProcessor\.from_pretrained\(folder\); got NoneType"):
        CTRPredictionPipeline(model)
    processor.extend({name: [*values[:2], None] for name, values in click_rows.items()} | {"user_id": [901, 902, 903]})
    with pytest.raises(ValueError, match="fields are not the model's"):
        CTRPredictionPipeline(model, processor)


def test_a_model_trained_in_between_is_served_without_dropout_or_gradients(folder, processor, rows, monkeypatch):
    model = FlipForCTR.from_pretrained(folder)
    pipe = CTRPredictionPipeline(model, processor)
    before = probabilities(pipe(rows[:8]))
    outputs = []
    real = pipe._forward
    monkeypatch.setattr(pipe, "_forward", lambda batch: outputs.append(real(batch)) or outputs[-1])
    model.train()
    model(**FlipCTRCollator(processor)(processor.encode(rows[:8]))).logits.sum().backward()
    assert probabilities(pipe(rows[:8])) == pytest.approx(before, abs=1e-6)
    assert not outputs[0].logits.requires_grad


@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_a_model_is_served_once_it_was_trained_and_not_because_it_was_saved(processor, click_rows, tmp_path, mode):
    new_model(FlipForPreTraining, processor).save_pretrained(tmp_path / "pretrained")
    FlipForCTR.from_pretrained(tmp_path / "pretrained", mode=mode).save_pretrained(tmp_path / "saved")
    fresh = FlipForCTR(make_config(processor, mode=mode))
    models = [fresh, FlipForCTR.from_pretrained(tmp_path / "pretrained", mode=mode)]
    if mode == "text":  # of the other modes the perturbed backbone looks as if it had learned
        models.append(FlipForCTR.from_pretrained(tmp_path / "saved"))
    log = pa.table(click_rows)
    encoded = processor.encode(log, with_label=True)
    for model in models:
        with pytest.raises(ValueError, match="its probabilities mean nothing"):
            CTRPredictionPipeline(model, processor)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(**FlipCTRCollator(processor, mode)(encoded)).loss.backward()
        optimizer.step()
        assert len(CTRPredictionPipeline(model, processor)(log)) == len(encoded)
        model.save_pretrained(tmp_path / "trained")
        assert FlipForCTR.from_pretrained(tmp_path / "trained").needs_finetuning is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_device(folder, rows, dtype):
    pipe = pipeline(TASK, model=folder, dtype=dtype, device="cpu")
    assert pipe.dtype == dtype
    assert pipe.model.fusion.id_weight.dtype == torch.float32
    assert "CTRPredictionPipeline" in repr(pipe)
    assert probabilities(pipe(rows[:10])) == pytest.approx(expected(folder, rows[:10]), abs=0.02)


def test_one_row_is_quick_without_a_text_encoder(pipes, rows):
    pipe = pipes["id"]
    pipe(rows[0])
    seconds = []
    for _ in range(20):
        # The time that this thread computes, and not the time that it waits for others on a busy machine.
        start = time.thread_time()
        pipe(rows[0])
        seconds.append(time.thread_time() - start)
    # A few milliseconds.
    assert min(seconds) < 0.05


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1.0])
def test_a_text_budget_reads_the_texts_of_the_rows_least_sure(pipe, click_rows, share, monkeypatch):
    rows = pd.DataFrame(click_rows).to_dict("records")
    joint, ids = (pipe(rows), pipeline(TASK, model=pipe.model, processor=pipe.processor, mode="id")(rows))
    read = []
    real = pipe.model.flip.encode_text
    monkeypatch.setattr(pipe.model.flip, "encode_text", lambda ids, *rest: read.append(len(ids)) or real(ids, *rest))
    found = pipe(rows, text_budget=share, batch_size=64, towers=True)

    # Of the rows that are as sure as single precision can say the first ones count.
    logits = np.array([math.log(row["probability"] / (1 - row["probability"])) for row in ids], np.float32)
    chosen = set(np.argsort(np.abs(logits), kind="stable")[: math.ceil(share * len(rows))].tolist())
    assert sum(read) == len(chosen)
    for i, result in enumerate(found):
        expected = (joint if i in chosen else ids)[i]["probability"]
        assert result["probability"] == pytest.approx(expected, abs=1e-6)
        assert result["id_probability"] == pytest.approx(ids[i]["probability"], abs=1e-6)
        assert (result["text_probability"] is None) == (i not in chosen)


def test_a_text_budget_of_a_stream_and_of_one_row(pipe, click_rows):
    rows = pd.DataFrame(click_rows).to_dict("records")
    streamed = list(pipe((row for row in rows), batch_size=8, text_budget=0.5))
    parts = [pipe(rows[i : i + 128], batch_size=8, text_budget=0.5) for i in range(0, len(rows), 128)]
    assert streamed == [result for part in parts for result in part]
    assert pipe(rows[0], text_budget=0.01) == pipe(rows[0])


def test_a_text_budget_needs_both_towers_and_a_share(pipe, click_rows):
    alone = pipeline(TASK, model=pipe.model, processor=pipe.processor, mode="id")
    with pytest.raises(ValueError, match=r"text_budget=0.5 needs a model with both towers"):
        alone([], text_budget=0.5)
    with pytest.raises(ValueError, match=r"text_budget=1.5 must be a share of the rows"):
        pipe([], text_budget=1.5)


def test_a_dict_of_splits_says_to_take_one(folder, click_rows):
    pipe, log = pipeline(TASK, model=folder), datasets.Dataset.from_dict(click_rows).select(range(3))
    for splits in (
        datasets.DatasetDict(train=log, test=log),
        datasets.IterableDatasetDict({name: log.to_iterable_dataset() for name in ("train", "test")}),
    ):
        with pytest.raises(InputError, match="several splits, 'train', 'test'; select one, such as rows"):
            pipe(splits)
