"""Text features: vectors attached to the values of a field, fitted, saved, found for new values."""

import json
import logging
import pickle

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from example_runs import script
from finetuned import finetuned
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, pipeline

from flip_hf import (
    FieldConfig,
    FlipConfig,
    FlipCTRCollator,
    FlipForCTR,
    FlipForPreTraining,
    FlipPretrainingCollator,
    FlipProcessor,
    TextFeatures,
)
from flip_hf.data.schema import InputError
from flip_hf.data.text_features import NO_KEY, text_key
from flip_hf.export import OnnxScorer, export_onnx
from flip_hf.fetch import FetchError
from flip_hf.hub.push import write_card
from flip_hf.runs.data import load_click_log
from flip_hf.runs.settings import DataSettings
from flip_hf.text_vectors import TextVectorizer

FILMS = {"1": ("heat", "crime"), "2": ("fargo", "crime"), "3": ("kolya", "drama"), "4": ("alien", None)}
NEW = ("9", "a new film", "drama")
FIELDS = [
    FieldConfig("user"),
    FieldConfig("film"),
    FieldConfig("genre"),
    FieldConfig("liked", kind="sequence", share_embedding="film", target="film", max_values=3),
]


def rows(count=24):
    films = list(FILMS)
    return [
        {
            "user": i % 5,
            "film": films[i % 4],
            "title": FILMS[films[i % 4]][0],
            "genre": FILMS[films[i % 4]][1],
            "liked": [films[j % 4] for j in range(i % 4)],
            "label": i % 2,
        }
        for i in range(count)
    ]


def new_row(**values):
    return {"user": 1, "film": NEW[0], "title": NEW[1], "genre": NEW[2], "liked": ["1", NEW[0]], "label": 1} | values


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_HF_CACHE", str(tmp_path / "flip-cache"))


@pytest.fixture
def encoder(workplace, cache):
    return str(workplace / "encoder")


@pytest.fixture
def features(encoder):
    return [TextFeatures("film", encoder=encoder, fields=["title", "genre"])]


@pytest.fixture
def fitted(wordpiece, features):
    return FlipProcessor.fit(rows(), FIELDS, wordpiece, label="label", text_features=features)


def config(processor, **options):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = BertConfig(vocab_size=len(processor.tokenizer), **size)
    return FlipConfig(text_config=text, fields=processor.fields, embedding_dim=8, projection_dim=8, **options)


def vectors_of(processor, raw):
    """The vector of each position, standardised, float32 (B, P, size); NaN where there is none."""
    batch = FlipCTRCollator(processor, mode="id")(processor.encode(raw))
    places, vectors = batch["vector_places"].numpy(), batch["vectors"]["film"][0].numpy()
    return np.where(places[..., None] >= 0, vectors[np.maximum(places, 0)], np.nan)


def expected(encoder, processor, *texts):
    return processor.vectors.scales["film"].apply(TextVectorizer(encoder)(texts))


def test_each_value_has_the_vector_of_its_text_wherever_it_stands(fitted, encoder):
    found = vectors_of(fitted, rows())
    of_films = dict(
        zip(FILMS, expected(encoder, fitted, "heat, crime", "fargo, crime", "kolya, drama", "alien"), strict=True)
    )
    for row, vectors in zip(rows(), found, strict=True):
        np.testing.assert_array_equal(vectors[1], of_films[row["film"]])
        assert np.isnan(vectors[[0, 2]]).all()
        # The most recent first.
        for vector, film in zip(vectors[3:], reversed(row["liked"]), strict=False):
            np.testing.assert_array_equal(vector, of_films[film])
        assert np.isnan(vectors[3 + len(row["liked"]) :]).all()


def test_fitting_sets_the_size_and_the_scale(fitted):
    (features,) = fitted.vectors.features.values()
    assert (features.size, len(features.identity)) == (32, 32)
    assert [f.vector_size for f in fitted.fields] == [None, 32, None, None]
    mean, scale = fitted.vectors.scales["film"]
    of_films = fitted.vectors.values["film"].vectors.astype(np.float64)
    assert of_films.shape == (4, 32)
    np.testing.assert_allclose(mean, of_films.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scale, of_films.std(axis=0), rtol=1e-3)


def test_fitting_does_not_depend_on_the_order_of_the_rows(fitted, wordpiece, features):
    other = FlipProcessor.fit(rows()[::-1], FIELDS, wordpiece, label="label", text_features=features)
    assert other.content_hash() == fitted.content_hash()


def test_a_new_value_has_the_vector_of_its_own_text(fitted, encoder):
    found = vectors_of(fitted, [new_row()])[0]
    np.testing.assert_array_equal(found[1], expected(encoder, fitted, "a new film, drama")[0])
    # In a history a value that nobody described has none.
    assert np.isnan(found[3]).all()
    np.testing.assert_array_equal(found[4], expected(encoder, fitted, "heat, crime")[0])


def test_a_known_value_keeps_the_vector_that_it_was_fitted_with(fitted, encoder):
    found = vectors_of(fitted, [new_row(film="1", title="another title")])[0]
    np.testing.assert_array_equal(found[1], expected(encoder, fitted, "heat, crime")[0])


def test_a_catalog_describes_values_that_no_row_is_fitted_on(wordpiece, features, encoder):
    catalog = pd.DataFrame([dict(zip(("film", "title", "genre"), NEW, strict=True))])
    processor = FlipProcessor.fit(rows(), FIELDS, wordpiece, label="label", text_features=features, catalog=catalog)
    of_new = expected(encoder, processor, "a new film, drama")[0]
    found = vectors_of(processor, [new_row(title="not read", genre=None)])[0]
    np.testing.assert_array_equal(found[1], of_new)
    np.testing.assert_array_equal(found[3], of_new)
    assert processor.encode([new_row()])["feature_ids"][0].as_py()[1] == processor.vocabulary.ranges[1][0][0]


def test_values_that_are_their_own_text_have_vectors_everywhere(wordpiece, encoder):
    fields = [FieldConfig("title"), FieldConfig("liked", kind="sequence", share_embedding="title", max_values=3)]
    own = [{"title": row["title"], "liked": [FILMS[f][0] for f in row["liked"]]} for row in rows()]
    features = [TextFeatures("title", encoder=encoder, fields=["title"])]
    processor = FlipProcessor.fit(own, fields, wordpiece, text_features=features)
    batch = FlipCTRCollator(processor, mode="id")(processor.encode([{"title": "heat", "liked": ["unheard", "fargo"]}]))
    scale = processor.vectors.scales["title"]
    wanted = scale.apply(TextVectorizer(encoder)(["heat", "fargo", "unheard"]))
    found = batch["vectors"]["title"][0][batch["vector_places"][0, :3]].numpy()
    np.testing.assert_array_equal(found, wanted)
    assert batch["vector_places"][0, 3] == -1


def test_the_most_frequent_text_of_a_value_counts_and_the_others_are_told(wordpiece, features, encoder, caplog):
    changed = [row | ({"title": "heatt"} if row["film"] == "1" and i < 5 else {}) for i, row in enumerate(rows())]
    with caplog.at_level(logging.WARNING):
        processor = FlipProcessor.fit(changed, FIELDS, wordpiece, label="label", text_features=features)
    assert "1 of 4 values occur with several values of title, genre" in caplog.text
    assert "value '1' that is 'heat, crime' and not 'heatt, crime'" in caplog.text
    found = vectors_of(processor, [rows()[0]])[0]
    np.testing.assert_array_equal(found[1], expected(encoder, processor, "heat, crime")[0])


def test_a_value_without_any_text_has_no_vector(wordpiece, features):
    silent = [row | ({"title": None, "genre": None} if row["film"] == "4" else {}) for row in rows()]
    processor = FlipProcessor.fit(silent, FIELDS, wordpiece, label="label", text_features=features)
    found = vectors_of(processor, [silent[3], new_row(title=None, genre=None), silent[0]])
    assert np.isnan(found[:2, 1]).all()
    assert not np.isnan(found[2, 1]).any()


def test_rare_values_keep_their_vectors(wordpiece, features, encoder):
    fields = [FieldConfig("user"), FieldConfig("film", min_count=100)]
    processor = FlipProcessor.fit(rows(), fields, wordpiece, label="label", text_features=features)
    assert len(processor.vocabulary.values[1]) == 0
    found = vectors_of(processor, [rows()[1] | {"title": "not read"}])[0]
    np.testing.assert_array_equal(found[1], expected(encoder, processor, "fargo, crime")[0])


def test_a_saved_processor_needs_no_encoder_for_what_it_knows(fitted, tmp_path, monkeypatch):
    fitted.save_pretrained(tmp_path)
    loaded = FlipProcessor.from_pretrained(tmp_path)
    assert loaded.content_hash() == fitted.content_hash()

    def never(*args, **kwargs):
        raise AssertionError("no encoder is needed")

    monkeypatch.setattr(loaded.vectors, "make_source", never)
    np.testing.assert_array_equal(vectors_of(loaded, rows()), vectors_of(fitted, rows()))


def test_another_encoder_encodes_no_new_texts(fitted, tmp_path, workplace, monkeypatch):
    fitted.save_pretrained(tmp_path)
    loaded = FlipProcessor.from_pretrained(tmp_path)

    def other(features):
        return TextVectorizer(workplace / "encoder", pooling="cls")

    monkeypatch.setattr(loaded.vectors, "make_source", other)
    with pytest.raises(ValueError, match=r"text features of 'film'.*differs from the one"):
        loaded.encode([new_row()])


def test_the_place_of_an_encoder_is_not_saved_and_can_be_told(fitted, tmp_path, workplace, encoder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fitted.save_pretrained(tmp_path)
    assert str(workplace) not in (tmp_path / "processor_config.json").read_text()
    loaded = FlipProcessor.from_pretrained(tmp_path)
    with pytest.raises(FetchError, match=r"text features of 'film'.*'encoder'.*set_text_encoder\('film'"):
        loaded.encode([new_row()])
    loaded.set_text_encoder("film", encoder)
    np.testing.assert_array_equal(vectors_of(loaded, [new_row()]), vectors_of(fitted, [new_row()]))
    with pytest.raises(ValueError, match="did you mean 'film'"):
        loaded.set_text_encoder("films", encoder)


def test_the_vectors_of_a_column_attach_alike(wordpiece, tmp_path):
    vectors = {film: np.random.default_rng(int(film)).normal(size=5).tolist() for film in [*FILMS, "9"]}
    with_vectors = [row | {"vector": vectors[row["film"]]} for row in rows()]
    features = [TextFeatures("film", column="vector", size=5)]
    processor = FlipProcessor.fit(with_vectors, FIELDS, wordpiece, label="label", text_features=features)
    processor.save_pretrained(tmp_path)
    for own in (processor, FlipProcessor.from_pretrained(tmp_path)):
        found = vectors_of(own, [with_vectors[5], new_row(vector=vectors["9"])])
        scale = own.vectors.scales["film"]
        wanted = scale.apply(np.array([vectors["2"], vectors["9"]], np.float32))
        np.testing.assert_array_equal(found[:, 1], wanted)
        np.testing.assert_array_equal(found[1, 4], scale.apply(np.array(vectors["1"], np.float32)))
    with pytest.raises(InputError, match="4 numbers"):
        processor.encode([new_row(vector=[1, 2, 3, 4])])


def test_extending_gives_new_values_their_vectors(fitted, encoder, tmp_path):
    torch.manual_seed(0)
    model = FlipForCTR(config(fitted, mode="id")).eval()
    raw = [*rows(4), new_row()]
    before_vectors = vectors_of(fitted, raw)
    before = model(**FlipCTRCollator.from_model(fitted, model)(fitted.encode(rows(6)))).logits
    growth = fitted.extend([new_row(), new_row(film="1", title="not this")])
    model.resize_feature_embeddings(growth)
    after = model(**FlipCTRCollator.from_model(fitted, model)(fitted.encode(rows(6)))).logits
    torch.testing.assert_close(before, after)
    found = vectors_of(fitted, raw)
    np.testing.assert_array_equal(found[:, 1], before_vectors[:, 1])
    # Now that the value is known, a history shows its vector, too.
    np.testing.assert_array_equal(found[-1, 3], expected(encoder, fitted, "a new film, drama")[0])
    fitted.save_pretrained(tmp_path)
    np.testing.assert_array_equal(vectors_of(FlipProcessor.from_pretrained(tmp_path), raw), found)


def test_encoding_a_dataset_and_a_cached_one(fitted, tmp_path, encoder):
    path = tmp_path / "rows.parquet"
    pd.DataFrame([*rows(), new_row()]).to_parquet(path)
    first = fitted.encode_dataset(str(path))
    wanted = FlipCTRCollator(fitted, mode="id")(list(first))
    fitted.save_pretrained(tmp_path / "saved")
    # Another process reads rows that this one has encoded, whose new texts are in the cache alone.
    other = FlipProcessor.from_pretrained(tmp_path / "saved")
    other.set_text_encoder("film", encoder)
    found = FlipCTRCollator(other, mode="id")(list(other.encode_dataset(str(path))))
    torch.testing.assert_close(found["vectors"]["film"], wanted["vectors"]["film"])
    copied = pickle.loads(pickle.dumps(FlipCTRCollator(fitted, mode="id")))
    torch.testing.assert_close(copied(list(first))["vectors"]["film"], wanted["vectors"]["film"])


def test_dropped_ids_keep_their_vectors(fitted):
    collator = FlipCTRCollator(fitted, mode="id", oov_dropout={"film": 0.9}, seed=1)
    batch = collator(fitted.encode(rows()))
    oov = fitted.vocabulary.ranges[1][0][0]
    assert (batch["feature_ids"][:, 1] == oov).float().mean() > 0.7
    assert (batch["vector_places"][:, 1] >= 0).all()


def test_models_add_the_vectors_to_embeddings(fitted):
    torch.manual_seed(0)
    model = FlipForCTR(config(fitted, mode="id")).eval()
    collator = FlipCTRCollator.from_model(fitted, model)
    known, other = (collator(fitted.encode([new_row(title=title)])) for title in ("a film", "the film"))
    assert known["feature_ids"].equal(other["feature_ids"])
    embeddings = [model.flip.encode_tabular(**batch).field_embeddings[0] for batch in (known, other)]
    differs = [bool((a - b).abs().max() > 1e-6) for a, b in zip(*embeddings, strict=True)]
    # The film's own, and the history's, which attends to it.
    assert differs == [False, True, False, True]
    batch = collator(fitted.encode(rows(8), with_label=True))
    model.train()
    model(**batch).loss.backward()
    for parameter in model.flip.vector_projection.parameters():
        assert parameter.grad.abs().sum() > 0


def test_pretraining_hides_the_vector_of_a_masked_field(fitted):
    torch.manual_seed(0)
    model = FlipForPreTraining(config(fitted)).eval()
    collator = FlipPretrainingCollator(fitted, tabular_mask_ratio=1.0)
    batch = collator(fitted.encode(rows(6)))
    extra = {name: batch[name] for name in ("vectors", "vector_places")}
    hidden = model.flip.encode_tabular(batch["masked_feature_ids"], **extra).field_embeddings
    # Of all rows the same: nothing of a row is left.
    torch.testing.assert_close(hidden, hidden[:1].expand_as(hidden))
    output = model(**batch)
    output.loss.backward()
    assert output.loss.isfinite()


def test_onnx_and_pipeline_score_unseen_values(fitted, tmp_path, workplace, monkeypatch):
    # There the encoder's name is that of its folder.
    monkeypatch.chdir(workplace)
    torch.manual_seed(0)
    model = finetuned(FlipForCTR(config(fitted, mode="id"))).eval()
    for part in (model, fitted):
        part.save_pretrained(tmp_path)
    raw = [*rows(5), new_row(), new_row(title="another film")]
    batch = FlipCTRCollator.from_model(fitted, model)(fitted.encode(raw))
    with torch.no_grad():
        wanted = model(**batch).logits.sigmoid()
    assert len(set(wanted.tolist()[-2:])) == 2
    found = [row["probability"] for row in pipeline("ctr-prediction", model=str(tmp_path))(raw)]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(OnnxScorer(export_onnx(model, tmp_path / "model.onnx"))(batch), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("film.keys"), "film.keys"),
        (lambda t: t.update({"film.keys": t["film.keys"][::-1].copy()}), "ascend"),
        (lambda t: t.update({"film.vectors": t["film.vectors"][:, :3].copy()}), "not float16"),
        (lambda t: t.update({"film.value_keys": t["film.value_keys"][:-1]}), "value_keys"),
        (lambda t: t.update({"film.value_keys": t["film.value_keys"] + 1}), "missing"),
        (lambda t: t.update({"film.vectors": np.full_like(t["film.vectors"], np.nan)}), "NaN"),
    ],
)
def test_a_file_of_vectors_that_was_edited_is_refused(fitted, tmp_path, change, message):
    fitted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "vectors.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "vectors.safetensors")
    with pytest.raises(InputError, match=message):
        FlipProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"field": "film"}, "either encoder and fields, or a column"),
        ({"field": "film", "encoder": "e"}, "fields are the columns"),
        ({"field": "film", "encoder": "e", "column": "v", "fields": ["title"]}, "either encoder"),
        ({"field": "film", "column": "v"}, "size=None"),
        ({"field": "film", "column": "v", "size": 4, "text_layers": 1}, "text_layers"),
        ({"field": "nofilm", "column": "v", "size": 4}, "not one of"),
        ({"field": "liked", "column": "v", "size": 4}, "attach them to that one"),
        ({"field": "film", "column": "user", "size": 4}, "can't be a field"),
        ({"field": "film", "column": "v", "sizes": 4}, "did you mean 'size'"),
        ({"encoder": "e", "fields": ["title"]}, "need the field"),
        ({"field": "film", "encoder": "e", "fields": None}, "fields are the columns"),
        ({"field": "film", "encoder": "e", "fields": [1]}, "names of columns"),
        ("film", "a mapping"),
    ],
)
def test_settings_of_text_features(settings, message, wordpiece):
    with pytest.raises(ValueError, match=message):
        FlipProcessor.fit(rows(), FIELDS, wordpiece, text_features=[settings])


def test_a_field_has_one_vector_and_the_label_is_not_its_text(wordpiece, encoder):
    twice = [TextFeatures("film", encoder=encoder, fields=["title"])] * 2
    with pytest.raises(ValueError, match="named twice"):
        FlipProcessor.fit(rows(), FIELDS, wordpiece, text_features=twice)
    leaking = [TextFeatures("film", encoder=encoder, fields=["title", "label"])]
    with pytest.raises(ValueError, match="label"):
        FlipProcessor.fit(rows(), FIELDS, wordpiece, label="label", text_features=leaking)
    data = Dataset.from_list(rows()).remove_columns("title")
    with pytest.raises(InputError, match="title"):
        FlipProcessor.fit(data, FIELDS, wordpiece, text_features=twice[:1])


def test_keys_are_those_of_every_machine():
    assert text_key("heat, crime") == text_key("heat, crime") != text_key("heat")
    assert text_key("") != NO_KEY
    assert text_key("Amélie") == 1934994359264509038


def test_runs_attach_vectors_and_say_so(workplace, cache, tmp_path):
    new = pq.read_table(workplace / "test.parquet").to_pandas().assign(title="a film that nobody has seen")
    new.to_parquet(tmp_path / "new.parquet")
    features = [{"field": "title", "encoder": str(workplace / "encoder"), "fields": ["title", "kind"]}]
    pretrained, finetuned_run = tmp_path / "pretrained", tmp_path / "finetuned"
    common = ["--config", str(workplace / "config.yaml"), "--data.text_features", json.dumps(features)]
    common += ["--data.catalog_file", str(tmp_path / "new.parquet"), "--training.report_to", "[]"]
    script("pretrain")([*common, "--output_dir", str(pretrained)])
    script("finetune")(
        [*common, "--output_dir", str(finetuned_run), "--pretrained", str(pretrained / "model"), "--mode", "id"]
    )
    record = json.loads((finetuned_run / "run.json").read_text())
    (described,) = record["model"]["text_features"]
    assert (described["field"], described["encoder"], described["size"]) == ("title", "encoder", 32)
    processor = FlipProcessor.from_pretrained(finetuned_run / "model")
    # The catalog's title has a vector, and no encoder is needed for it.
    row = new.iloc[:1].to_dict("list")
    assert processor.encode(row)["vector_keys"][0].as_py() != [NO_KEY]
    evaluated = tmp_path / "metrics.json"
    data = ["--data.test_file", str(tmp_path / "new.parquet"), "--output", str(evaluated)]
    script("evaluate_model")(["--model", str(finetuned_run / "model"), *data])
    assert 0 <= json.loads(evaluated.read_text())["metrics"]["auc"] <= 1
    scores = ["--input", str(tmp_path / "new.parquet"), "--output", str(tmp_path / "scores.parquet")]
    script("predict")(["--model", str(finetuned_run / "model"), *scores])
    assert len(pq.read_table(tmp_path / "scores.parquet")) == len(new)
    (tmp_path / "card").mkdir()
    write_card(tmp_path / "card", "org/name", record, {})
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| vectors of title | size 32, encoder encodes the text of title, kind |" in card


def test_runs_refuse_text_features_that_cant_be(workplace, cache, tmp_path):
    def load(**settings):
        files = {f"{name}_file": str(workplace / f"{name}.parquet") for name in ("train", "validation")}
        return load_click_log(DataSettings(**files, fields=["user_id", "title"], label="clicked", **settings))

    with pytest.raises(ValueError, match="did you mean 'fields'"):
        load(text_features=[{"field": "title", "encoder": "e", "field_s": ["kind"]}])
    with pytest.raises(ValueError, match=r"data\.catalog_file"):
        load(catalog_file="items.parquet")
    with pytest.raises(ValueError, match="label"):
        load(text_features=[{"field": "title", "encoder": "e", "fields": ["kind", "clicked"]}])
    log = load(text_features=[{"field": "title", "encoder": str(workplace / "encoder"), "fields": ["kind"]}])
    assert log.splits["train"].column_names == ["user_id", "title", "kind", "clicked"]
    plain = FlipProcessor.fit(str(workplace / "train.parquet"), ["user_id", "title"], str(workplace / "encoder"))
    with pytest.raises(ValueError, match="model to start from has none"):
        load_click_log(
            DataSettings(
                train_file=str(workplace / "train.parquet"),
                validation_file=str(workplace / "validation.parquet"),
                label="clicked",
                text_features=[{"field": "title", "encoder": "e", "fields": ["kind"]}],
            ),
            plain,
        )


def test_a_named_dataset_is_its_own_catalog(workplace, cache, monkeypatch):
    items = {"movie_id": [1, 2, 3, 4] * 5, "title": ["a", "b", "c", "d"] * 5, "label": [0, 1] * 10}
    splits = DatasetDict({n: Dataset.from_dict(items).select(rows) for n, rows in SPLIT_ROWS.items()})
    monkeypatch.setattr("flip_hf.runs.data.load_splits", lambda *args: splits)
    features = [{"field": "movie_id", "encoder": str(workplace / "encoder"), "fields": ["title"]}]
    settings = DataSettings(source="movielens-100k", fields=["movie_id"], text_features=features)
    log = load_click_log(settings)
    assert sorted(set(log.catalog["title"])) == ["a", "b", "c", "d"]
    assert log.catalog.column_names == ["movie_id", "title"]


SPLIT_ROWS = {"train": [0, 4, 8], "validation": [1, 2], "test": [3]}


def test_large_and_close_numbers_of_a_column_stay_apart(wordpiece):
    vectors = [[1e5 * i, 16000 + i / 2] for i in range(4)]
    raw = [row | {"vector": vectors[i % 4]} for i, row in enumerate(rows())]
    features = [TextFeatures("film", column="vector", size=2)]
    processor = FlipProcessor.fit(raw, FIELDS, wordpiece, text_features=features)
    found = vectors_of(processor, raw[:4])[:, 1]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, found[:1] + np.arange(4)[:, None] * (found[1] - found[0]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.std(axis=0), 1, rtol=1e-3)


def test_extending_keeps_the_vectors_of_the_catalog(wordpiece, features, encoder):
    catalog = pd.DataFrame([dict(zip(("film", "title", "genre"), NEW, strict=True))])
    processor = FlipProcessor.fit(rows(), FIELDS, wordpiece, text_features=features, catalog=catalog)
    before = vectors_of(processor, [new_row(title=None)])[0]
    processor.extend([rows()[0] | {"liked": [NEW[0]]}])
    found = vectors_of(processor, [new_row(title=None)])[0]
    np.testing.assert_array_equal(found[[1, 3]], before[[1, 3]])
    assert not np.isnan(found[[1, 3]]).any()


def test_extending_forgets_no_vector_of_rows_that_are_encoded(wordpiece):
    raw = [row | {"vector": [float(row["film"]), 1.0]} for row in rows()]
    features = [TextFeatures("film", column="vector", size=2)]
    processor = FlipProcessor.fit(raw, FIELDS, wordpiece, text_features=features)
    encoded = processor.encode([new_row(vector=[9.0, 2.0])])
    processor.extend(raw[:2])
    assert FlipCTRCollator(processor, mode="id")(encoded)["vector_places"][0, 1] >= 0


def test_rows_on_disk_with_new_vectors_of_a_column_can_be_encoded_again(wordpiece, tmp_path):
    raw = [row | {"vector": [float(row["film"]), 1.0]} for row in rows()]
    features = [TextFeatures("film", column="vector", size=2)]
    pd.DataFrame([new_row(vector=[9.0, 2.0])] * 3).to_parquet(tmp_path / "new.parquet")
    for _ in range(2):
        processor = FlipProcessor.fit(raw, FIELDS, wordpiece, text_features=features)
        encoded = processor.encode_dataset(str(tmp_path / "new.parquet"))
        assert (FlipCTRCollator(processor, mode="id")(list(encoded))["vector_places"][:, 1] >= 0).all()


def test_the_text_encoder_alone_needs_no_vectors(fitted, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = finetuned(FlipForCTR(config(fitted, mode="text"))).eval()
    for part in (model, fitted):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr("flip_hf.processing_flip.make_source", lambda features: pytest.fail("no encoder is needed"))
    (score,) = pipeline("ctr-prediction", model=str(tmp_path))([new_row()])
    assert 0 < score["probability"] < 1


def test_errors_of_a_catalog_name_it(wordpiece, features):
    with pytest.raises(InputError, match="the catalog") as error:
        FlipProcessor.fit(
            rows(), FIELDS, wordpiece, text_features=features, catalog=[{"film": 1.5, "title": "a", "genre": None}]
        )
    assert error.value.source == "the catalog"


def test_an_encoder_may_be_a_path(wordpiece, workplace, cache, tmp_path):
    features = [TextFeatures("film", encoder=workplace / "encoder", fields="title")]
    processor = FlipProcessor.fit(rows(), FIELDS, wordpiece, text_features=features)
    processor.save_pretrained(tmp_path)
    assert FlipProcessor.from_pretrained(tmp_path).content_hash()


def test_a_servers_memory_of_new_texts_is_bounded(fitted, encoder, monkeypatch):
    monkeypatch.setattr("flip_hf.data.feature_vectors.MAX_NEW_TEXTS", 3)
    new = [new_row(film=f"new {i}", title=f"film {i}") for i in range(8)]
    texts = [f"film {i}, drama" for i in range(8)]
    for row, text in zip(new, texts, strict=True):
        np.testing.assert_array_equal(vectors_of(fitted, [row])[0, 1], expected(encoder, fitted, text)[0])
    assert len(fitted.vectors._new["film"]) == 3
    # All of a batch is there, and what was forgotten comes back from the encoder's cache.
    encoded = fitted.encode(new)
    found = FlipCTRCollator(fitted, mode="id")(encoded)
    of_films = found["vectors"]["film"][0].numpy()[found["vector_places"].numpy()[:, 1]]
    np.testing.assert_array_equal(of_films, expected(encoder, fitted, *texts))
