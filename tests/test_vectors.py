"""Vector fields: reading, fitting, what models make of them."""

import json
import logging

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from finetuned import finetuned
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import BertConfig, pipeline

from flip_hf import (
    FieldConfig,
    FlipConfig,
    FlipCTRCollator,
    FlipForCTR,
    FlipForPreTraining,
    FlipPretrainingCollator,
    FlipProcessor,
)
from flip_hf.data.schema import Fallback, InputError
from flip_hf.data.vector_columns import canonical_vectors
from flip_hf.data.vector_fitting import VectorStatistics
from flip_hf.export import OnnxScorer, export_onnx, export_program
from flip_hf.fields import IGNORED_LABEL, MASK_ID

FIELDS = [
    FieldConfig("user"),
    FieldConfig("cover", kind="vector", size=3),
    FieldConfig("title"),
    FieldConfig("price", kind="vector", size=1),
]


def rows(count=40):
    random = np.random.default_rng(0)
    return [
        {
            "user": i % 5,
            "cover": None if i % 8 == 3 else random.normal(size=3).astype(np.float32).tolist(),
            "title": f"film {i % 4}",
            "price": None if i % 10 == 1 else float(i),
            "label": i % 2,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def fitted(wordpiece):
    return FlipProcessor.fit(rows(), FIELDS, wordpiece, label="label")


def config(processor, **options):
    text = BertConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return FlipConfig(text_config=text, fields=processor.fields, embedding_dim=8, projection_dim=8, **options)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1, 2], None, [3, -4]]),
        pa.array([[1.0, 2.0], None, [3.0, -4.0]], pa.list_(pa.float16(), 2)),
        pa.array([[1, 2], [], [3, -4]], pa.large_list(pa.float64())),
        pa.array(["[1, 2]", "", " [3.0,-4e0] "]),
        pa.chunked_array([pa.array(["[1,2]"]), pa.array([None, "[3, -4]"], pa.string())]).dictionary_encode(),
    ],
)
def test_vectors_are_read_from_lists_and_json(column):
    vectors, flags = canonical_vectors(column, "cover", 2)
    np.testing.assert_array_equal(vectors, np.array([[1, 2], [np.nan, np.nan], [3, -4]], np.float32))
    assert vectors.dtype == np.float32
    assert flags.tolist() == [0, Fallback.MISSING, 0]


@pytest.mark.parametrize("column", [pa.array([1.5, None]), pa.array(["1.5", None]), pa.array(["[1.5]", None])])
def test_a_vector_of_size_1_may_be_a_plain_number(column):
    vectors, flags = canonical_vectors(column, "price", 1)
    np.testing.assert_array_equal(vectors, np.array([[1.5], [np.nan]], np.float32))
    assert flags.tolist() == [0, Fallback.MISSING]


@pytest.mark.parametrize(
    ("column", "row", "message"),
    [
        (pa.array([[1, 2], [1, 2, 3]]), 1, "3 numbers"),
        (pa.array([[1, 2], None, [1, None]]), 2, "missing, NaN"),
        (pa.array([[1, 2], [1.0, float("nan")]]), 1, "missing, NaN"),
        (pa.array([[float("inf"), 2.0]]), 0, "infinite"),
        (pa.array([[1e300, 2.0]]), 0, "infinite as a float32"),
        (pa.array([["a", "b"]]), 0, "list of numbers"),
        (pa.array(["[1, 2]", "1, 2"]), 1, "as JSON"),
        (pa.array(["[1, 2]", "[1, x]"]), 1, "can't be read"),
        (pa.array([1.5, 2.5]), 0, "a list of 2 numbers"),
    ],
)
def test_a_vector_that_cant_be_read_is_named(column, row, message):
    with pytest.raises(InputError, match=message) as error:
        canonical_vectors(column, "cover", 2, first_row=10, source="log.csv")
    assert (error.value.field, error.value.row, error.value.source) == ("cover", 10 + row, "log.csv")


@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 60), st.just(3)), elements=st.floats(-1e3, 1e3, width=32)),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
@example(values=np.array([[0, 0, 1], [1e-45, 1e-39, 1]], np.float32), cuts=[])
@settings(max_examples=60, deadline=None)
def test_statistics_do_not_depend_on_the_batches(values, cuts):
    statistics = VectorStatistics(3)
    for part in np.split(values, sorted(cuts)):
        statistics.add(np.concatenate([part, np.full((1, 3), np.nan, np.float32)]))
    mean, scale = statistics.result()
    exact = values.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-5, atol=1e-4)
    deviation = exact.std(axis=0)
    varies = deviation > 1e-2
    np.testing.assert_allclose(scale[varies], deviation[varies], rtol=1e-3)
    assert (scale > 0).all()


def test_statistics_of_a_constant_and_of_nothing():
    statistics = VectorStatistics(2)
    assert [part.tolist() for part in statistics.result()] == [[0, 0], [1, 1]]
    statistics.add(np.array([[0.1, 1], [0.1, 3]], np.float32))
    mean, scale = statistics.result()
    np.testing.assert_allclose(mean, [0.1, 2], rtol=1e-6)
    np.testing.assert_allclose(scale, [1, 1])


def frames(tmp_path):
    frame = pd.DataFrame(rows())
    table = pa.Table.from_pylist(rows())
    pq.write_table(table, tmp_path / "rows.parquet")
    text = frame.assign(cover=[None if v is None else json.dumps(v) for v in frame["cover"]])
    text.to_csv(tmp_path / "rows.csv", index=False)
    stacked = {name: frame[name].tolist() for name in frame} | {
        "cover": [None if v is None else np.array(v, np.float32) for v in frame["cover"]]
    }
    return {
        "frame": frame,
        "table": table,
        "dataset": Dataset.from_list(rows()),
        "stream": IterableDataset.from_generator(rows),
        "columns": stacked,
        "parquet": str(tmp_path / "rows.parquet"),
        "csv": str(tmp_path / "rows.csv"),
    }


@pytest.mark.parametrize("form", ["frame", "table", "dataset", "columns", "parquet", "csv"])
def test_every_form_of_rows_makes_the_same_vectors(form, fitted, wordpiece, tmp_path):
    given_rows = frames(tmp_path)[form]
    other = FlipProcessor.fit(given_rows, FIELDS, wordpiece, label="label")
    for name in ("cover", "price"):
        for mine, expected in zip(other.vectors.scales[name], fitted.vectors.scales[name], strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-6)
    encoded = fitted.encode_dataset(given_rows).with_format("numpy")[:]
    expected = fitted.encode(rows())
    np.testing.assert_allclose(
        np.stack(encoded["vectors"]),
        np.stack(expected["vectors"].to_numpy(zero_copy_only=False)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_stream_is_encoded_like_a_table(fitted, tmp_path):
    streamed = list(fitted.encode_dataset(frames(tmp_path)["stream"]))
    expected = fitted.encode(rows())["vectors"].to_pylist()
    np.testing.assert_allclose([row["vectors"] for row in streamed], np.array(expected, np.float32), rtol=1e-6)


def test_vectors_are_standardised_and_missing_ones_are_nan(fitted):
    vectors = np.stack(fitted.encode(rows())["vectors"].to_numpy(zero_copy_only=False))
    covers, prices = vectors[:, :3], vectors[:, 3:]
    for part, every in ((covers, 8), (prices, 10)):
        missing = np.isnan(part).all(axis=1)
        assert missing.sum() == len(rows()) // every
        assert not np.isnan(part[~missing]).any()
        np.testing.assert_allclose(part[~missing].mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(part[~missing].std(axis=0), 1, atol=1e-5)


def test_the_text_leaves_vectors_out(fitted):
    encoded = fitted.encode(rows(4))
    text = fitted.tokenizer.decode(encoded["input_ids"][0].as_py())
    assert "user is" in text
    assert "title is" in text
    assert "cover" not in text
    assert "price" not in text
    owners = {place for row in encoded["token_field_ids"].to_pylist() for place in row}
    # By their places among all fields.
    assert owners == {-1, 0, 2}


def test_a_collator_gathers_the_vectors_that_are_there(fitted):
    batch = FlipCTRCollator(fitted)(fitted.encode(rows(10), with_label=True))
    assert {name: tuple(v.shape) for name, v in batch["vectors"].items()} == {"cover": (1, 10, 3), "price": (1, 10, 1)}
    places = batch["vector_places"]
    assert places[:, 0].tolist() == places[:, 2].tolist() == [-1] * 10
    assert places[:, 1].tolist() == [0, 1, 2, -1, 4, 5, 6, 7, 8, 9]
    assert places[:, 3].tolist() == [0, -1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert set(FlipCTRCollator(fitted, mode="text")(fitted.encode(rows(4)))) == {"input_ids", "attention_mask"}
    called = fitted(rows(10), return_tensors="pt")
    torch.testing.assert_close(called["vectors"]["cover"], batch["vectors"]["cover"])
    assert fitted(rows(10))["vector_places"] == places.tolist()


def test_a_table_and_a_list_of_rows_make_the_same_batch(fitted):
    table = fitted.encode(rows(6), with_label=True)
    from_table, from_list = FlipCTRCollator(fitted)(table), FlipCTRCollator(fitted)(table.to_pylist())
    for name in ("cover", "price"):
        torch.testing.assert_close(from_table["vectors"][name], from_list["vectors"][name])


@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_models_read_vectors(fitted, mode):
    torch.manual_seed(0)
    model = FlipForCTR(config(fitted, mode=mode)).eval()
    batch = FlipCTRCollator.from_model(fitted, model)(fitted.encode(rows(12), with_label=True))
    plain = model(**batch).logits
    changed = rows(12)
    changed[5]["cover"] = [9.0, 9.0, 9.0]
    other = model(**FlipCTRCollator.from_model(fitted, model)(fitted.encode(changed, with_label=True))).logits
    differs = (plain - other).abs() > 1e-6
    assert differs.tolist() == [mode != "text" and i == 5 for i in range(12)]


def test_a_projection_by_hand(fitted):
    torch.manual_seed(0)
    model = FlipForCTR(config(fitted, mode="id")).eval()
    for bias in ("hidden_bias", "output_bias"):
        torch.nn.init.normal_(getattr(model.flip.vector_projection.projections[0], bias))
    batch = FlipCTRCollator.from_model(fitted, model)(fitted.encode(rows(5)))
    embeddings = model.flip.encode_tabular(**batch).field_embeddings
    table = model.flip.feature_embeddings.weight[:, :8]
    mlp = model.flip.vector_projection.projections[0]
    for row in range(5):
        expected = table[batch["feature_ids"][row, 1]]
        if row != 3:
            hidden = torch.relu(mlp.hidden_weight @ batch["vectors"]["cover"][0, row] + mlp.hidden_bias)
            expected = expected + mlp.output_weight @ hidden + mlp.output_bias
        torch.testing.assert_close(embeddings[row, 1], expected)


def test_a_model_with_vectors_asks_for_them(fitted):
    model = FlipForCTR(config(fitted, mode="id"))
    batch = FlipCTRCollator.from_model(fitted, model)(fitted.encode(rows(3)))
    with pytest.raises(ValueError, match=r"vector_places.*FlipCTRCollator"):
        model(feature_ids=batch["feature_ids"])


def test_pretraining_masks_no_vector(fitted):
    torch.manual_seed(0)
    collator = FlipPretrainingCollator(fitted, text_mask_ratio=1.0, tabular_mask_ratio=1.0)
    batch = collator(fitted.encode(rows(16)))
    assert (batch["masked_feature_ids"] == MASK_ID).all(dim=0).tolist() == [True, False, True, False]
    assert (batch["mtm_labels"] == IGNORED_LABEL).all(dim=0).tolist() == [False, True, False, True]
    output = FlipForPreTraining(config(fitted))(**batch)
    output.loss.backward()
    assert output.loss.isfinite()


def test_a_masked_position_shows_no_vector(fitted):
    torch.manual_seed(0)
    model = FlipForPreTraining(config(fitted)).eval()
    batch = FlipPretrainingCollator(fitted)(fitted.encode(rows(3)))
    ids = batch["feature_ids"].clone()
    ids[:, 1] = MASK_ID
    extra = {name: batch[name] for name in ("vectors", "vector_places")}
    embeddings = model.flip.encode_tabular(ids, **extra).field_embeddings
    torch.testing.assert_close(embeddings[:, 1], model.flip.feature_embeddings.embed(ids)[:, 1])


def test_processor_and_model_round_trip(fitted, tmp_path):
    torch.manual_seed(0)
    model = FlipForCTR(config(fitted, mode="id")).eval()
    for part in (fitted, model):
        part.save_pretrained(tmp_path)
    loaded = FlipProcessor.from_pretrained(tmp_path)
    assert loaded.fields == fitted.fields
    assert loaded.content_hash() == fitted.content_hash()
    again = FlipForCTR.from_pretrained(tmp_path).eval()
    batches = [FlipCTRCollator.from_model(p, model)(p.encode(rows(9))) for p in (fitted, loaded)]
    torch.testing.assert_close(model(**batches[0]).logits, again(**batches[1]).logits)


def test_scales_decide_how_rows_are_encoded(fitted, wordpiece):
    doubled = [row | {"cover": None if row["cover"] is None else [2 * v for v in row["cover"]]} for row in rows()]
    other = FlipProcessor.fit(doubled, FIELDS, wordpiece, label="label")
    assert other.fields == fitted.fields
    assert other.content_hash() != fitted.content_hash()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("cover.mean"), "cover.mean"),
        (lambda t: t.update({"cover.scale": np.ones(4, np.float32)}), "not float32"),
        (lambda t: t.update({"cover.mean": np.ones(3, np.float64)}), "not float32"),
        (lambda t: t.update({"else.mean": np.ones(3, np.float32)}), "belongs to no field"),
        (lambda t: t.update({"cover.scale": np.array([1, np.nan, 1], np.float32)}), "NaN"),
        (lambda t: t.update({"cover.scale": np.array([1, 0, 1], np.float32)}), "positive"),
    ],
)
def test_a_file_of_vectors_that_was_edited_is_refused(fitted, tmp_path, change, message):
    from safetensors.numpy import load_file, save_file

    fitted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "vectors.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "vectors.safetensors")
    with pytest.raises(InputError, match=message):
        FlipProcessor.from_pretrained(tmp_path)


def test_a_vocabulary_grows_beside_vectors(fitted, wordpiece):
    processor = FlipProcessor.fit(rows(), FIELDS, wordpiece, label="label")
    torch.manual_seed(0)
    model = FlipForCTR(config(processor, mode="id")).eval()
    before = model(**FlipCTRCollator.from_model(processor, model)(processor.encode(rows(6)))).logits
    growth = processor.extend([row | {"title": "a new film"} for row in rows(6)])
    model.resize_feature_embeddings(growth)
    after = model(**FlipCTRCollator.from_model(processor, model)(processor.encode(rows(6)))).logits
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "vector"}, "needs size"),
        ({"kind": "vector", "size": 0}, "at least 1"),
        ({"kind": "vector", "size": 100_000}, "above the limit"),
        ({"kind": "categorical", "size": 3}, "size is a setting of the kinds vector"),
        ({"kind": "vector", "size": 3, "vector_size": 3}, "vector_size"),
    ],
)
def test_settings_of_vector_fields(settings, message):
    with pytest.raises(ValueError, match=message):
        FieldConfig("cover", **settings)


def test_fields_must_leave_something_for_each_view(wordpiece):
    with pytest.raises(ValueError, match="kind='vector'"):
        FlipProcessor.fit(rows(), [FIELDS[1]], wordpiece)


def test_a_log_says_nothing_of_vectors_that_are_there(fitted, caplog):
    with caplog.at_level(logging.WARNING):
        fitted.encode_dataset(rows())
    assert "cover 5 missing" in caplog.text
    assert "oov" not in caplog.text


@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_onnx_and_programs_read_vectors(fitted, mode, tmp_path):
    torch.manual_seed(0)
    model = finetuned(FlipForCTR(config(fitted, mode=mode))).eval()
    path = export_onnx(model, tmp_path / "model.onnx")
    scorer = OnnxScorer(path)
    assert {"vectors.cover", "vectors.price"} <= set(scorer.inputs) or mode == "text"
    for count in (1, 7):
        batch = FlipCTRCollator.from_model(fitted, model)(fitted.encode(rows(count)))
        with torch.no_grad():
            expected = model(**batch).logits.sigmoid()
        np.testing.assert_allclose(scorer(batch), expected, atol=1e-5)
        torch.testing.assert_close(export_program(model).module()(**batch).sigmoid(), expected)


def test_a_pipeline_scores_vectors(fitted, tmp_path):
    torch.manual_seed(0)
    model = finetuned(FlipForCTR(config(fitted))).eval()
    for part in (model, fitted):
        part.save_pretrained(tmp_path)
    score = pipeline("ctr-prediction", model=str(tmp_path))
    batch = FlipCTRCollator.from_model(fitted, model)(fitted.encode(rows(9)))
    with torch.no_grad():
        expected = model(**batch).logits.sigmoid()
    found = [row["probability"] for row in score(rows(9))]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    one = {name: value for name, value in rows(9)[4].items() if name != "label"}
    assert score(one)["probability"] == pytest.approx(found[4], abs=1e-5)
    budget = score(rows(9), text_budget=0.5)
    assert len(budget) == 9


def test_vectors_start_as_small_as_embeddings(fitted):
    torch.manual_seed(0)
    config_ = config(fitted, mode="id", feature_initializer_range=0.05, vector_hidden_dim=512)
    projection = FlipForCTR(config_).flip.vector_projection.projections[0]
    with torch.no_grad():
        added = projection(torch.randn(2000, 3))
    assert 0.04 < added.std() < 0.06


def test_onnx_tells_fields_with_vectors_apart_whatever_their_names(wordpiece, tmp_path):
    random = np.random.default_rng(0)
    raw = [
        {"user": i % 5, "zz": random.normal(size=3).tolist(), "aa": random.normal(size=3).tolist()} for i in range(20)
    ]
    fields = [FieldConfig("user"), *(FieldConfig(name, kind="vector", size=3) for name in ("zz", "aa"))]
    processor = FlipProcessor.fit(raw, fields, wordpiece)
    torch.manual_seed(0)
    model = finetuned(FlipForCTR(config(processor, mode="id"))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = FlipCTRCollator.from_model(processor, model)(processor.encode(raw))
    with torch.no_grad():
        expected = model(**batch).logits.sigmoid()
    np.testing.assert_allclose(OnnxScorer(export_onnx(model, tmp_path / "model.onnx"))(batch), expected, atol=1e-5)
    swapped = {**batch, "vectors": {"zz": batch["vectors"]["aa"], "aa": batch["vectors"]["zz"]}}
    with torch.no_grad():
        assert (model(**swapped).logits.sigmoid() - expected).abs().max() > 1e-3


def test_a_processor_without_vectors_leaves_no_vectors_of_another(fitted, wordpiece, tmp_path):
    fitted.save_pretrained(tmp_path)
    FlipProcessor.fit(rows(), ["user", "title"], wordpiece).save_pretrained(tmp_path)
    assert not (tmp_path / "vectors.safetensors").exists()
