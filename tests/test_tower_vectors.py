"""Vectors of text towers: served from memory, and for an index."""

import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from finetuned import finetuned
from transformers import BertConfig, pipeline

from flip_hf import CTRPredictionPipeline, FieldConfig, FlipConfig, FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.integrations.ray import BatchScorer

USER, ITEM = ["user_id", "gender", "age"], ["title", "genre"]
TWO = {"user": USER, "item": ITEM}
THREE = {"user": ["user_id"], "person": ["gender", "age"], "item": ITEM}
SIZE = 32
SERVING = (Path(__file__).parents[1] / "docs" / "tutorials" / "serving.md").read_text(encoding="utf-8")


def make_model(processor, **settings):
    """Weights of a size at which errors show."""
    torch.manual_seed(0)
    size = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = BertConfig(**size, vocab_size=300)
    settings = {"text_towers": TWO, "embedding_dim": 4, **settings}
    model = finetuned(FlipForCTR(FlipConfig(text_config=text, fields=processor.fields, **settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


class Encoded:
    """Counts the texts that an encoder reads."""

    def __init__(self, model):
        self.number = self.calls = 0
        model.flip.text_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.number += len(kwargs["input_ids"])
        self.calls += 1


@pytest.fixture
def frame(click_rows):
    return pd.DataFrame(click_rows).drop(columns="label")


def probabilities(results, name="probability"):
    return np.array([result[name] for result in results])


def distinct(processor, model, frame, towers=None):
    """How many texts the towers read, or some of them."""
    batch = FlipCTRCollator.from_model(processor, model)(processor.encode(frame))
    places = [list(model.config.towers).index(tower) for tower in towers or model.config.towers]
    return len(torch.unique(batch["input_ids"][:, places].flatten(0, 1), dim=0))


@pytest.mark.parametrize("mode", ["text", "joint"])
@pytest.mark.parametrize("towers", [TWO, THREE, [USER, ITEM]], ids=["two", "three", "unnamed"])
def test_probabilities_are_those_without_a_cache(processor, frame, mode, towers):
    model = make_model(processor, mode=mode, text_towers=towers)
    plain = CTRPredictionPipeline(model, processor, tower_cache=0, batch_size=32)
    expected = probabilities(plain(frame))
    assert np.ptp(expected) > 0.01
    cached = CTRPredictionPipeline(model, processor, batch_size=32)
    encoded, texts = Encoded(model), distinct(processor, model, frame)
    cold = probabilities(cached(frame))
    np.testing.assert_allclose(cold, expected, rtol=0, atol=1e-6)
    assert encoded.number == texts
    warm = probabilities(cached(frame.sample(frac=1, random_state=0).sort_index()))
    # Known users and items are served without the encoder.
    assert encoded.number == texts
    np.testing.assert_array_equal(warm, cold)
    one = cached(frame.iloc[7].to_dict())["probability"]
    assert encoded.number == texts
    assert one == pytest.approx(cold[7], abs=1e-6)
    if mode == "joint":
        of_towers = cached(frame, towers=True)
        for name in ("id_probability", "text_probability"):
            wanted = probabilities(plain(frame, towers=True), name)
            np.testing.assert_allclose(probabilities(of_towers, name), wanted, rtol=0, atol=1e-6)


def test_vectors_in_half_precision_are_kept_as_they_are(processor, frame):
    model = make_model(processor).to(torch.bfloat16)
    expected = probabilities(CTRPredictionPipeline(model, processor, tower_cache=0)(frame))
    cached = CTRPredictionPipeline(model, processor)
    cold = probabilities(cached(frame))
    np.testing.assert_allclose(cold, expected, rtol=0, atol=2e-2)
    np.testing.assert_array_equal(probabilities(cached(frame)), cold)


def test_the_cache_is_bounded_and_forgets_what_was_not_used_for_longest(processor, frame):
    model = make_model(processor)
    films = frame.drop_duplicates("title").head(4)[ITEM]
    assert len(films) == 4
    pipe, encoded = CTRPredictionPipeline(model, processor, tower_cache=3), Encoded(model)
    pipe.tower_vectors(films.iloc[:3], "item")
    pipe.tower_vectors(films.iloc[:1], "item")
    assert (encoded.number, len(pipe._tower_vectors)) == (3, 3)
    pipe.tower_vectors(films.iloc[3:], "item")
    assert (encoded.number, len(pipe._tower_vectors)) == (4, 3)
    # The second was used before the first and the third.
    pipe.tower_vectors(films.iloc[[0, 2, 3]], "item")
    assert encoded.number == 4
    pipe.tower_vectors(films.iloc[1:2], "item")
    assert encoded.number == 5


@pytest.mark.parametrize("bound", [1, 2, 7])
def test_a_batch_may_hold_more_texts_than_the_cache(processor, frame, bound):
    model = make_model(processor)
    expected = probabilities(CTRPredictionPipeline(model, processor, tower_cache=0)(frame))
    pipe = CTRPredictionPipeline(model, processor, tower_cache=bound, batch_size=64)
    for _ in range(2):
        np.testing.assert_allclose(probabilities(pipe(frame)), expected, rtol=0, atol=1e-6)
    assert len(pipe._tower_vectors) == bound


def test_without_a_cache_every_row_is_encoded(processor, frame):
    model = make_model(processor)
    pipe, encoded = CTRPredictionPipeline(model, processor, tower_cache=0), Encoded(model)
    pipe(frame)
    assert encoded.number == 2 * len(frame)
    pipe.tower_vectors(frame, "item")
    pipe.tower_vectors(frame, "item")
    assert encoded.number == 2 * len(frame) + 2 * distinct(processor, model, frame, ["item"])


def step(model, **options):
    model.train()
    optimizer = torch.optim.AdamW(model.flip.text_model.parameters(), lr=0.01, **options)
    for parameter in model.flip.text_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


CHANGES = {
    "a step of training": step,
    "a step of a fused optimizer": lambda model: step(model, fused=True),
    "a step of an optimizer of several tensors at once": lambda model: step(model, foreach=True),
    "other weights that are loaded": lambda model: model.load_state_dict(
        {name: value + 0.1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    ),
    "other weights in the place of these": lambda model: model.load_state_dict(
        {name: value + 0.1 if value.is_floating_point() else value for name, value in model.state_dict().items()},
        assign=True,
    ),
    "a change behind PyTorch's back": lambda model: [p.data.add_(0.1) for p in model.flip.text_model.parameters()],
    "another precision": lambda model: model.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_noticed(processor, frame, change):
    model = make_model(processor, head_dropout=0.0)
    pipe = CTRPredictionPipeline(model, processor)
    before = probabilities(pipe(frame))
    CHANGES[change](model)
    after = probabilities(pipe(frame))
    expected = probabilities(CTRPredictionPipeline(model, processor, tower_cache=0)(frame))
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-5)
    if change != "another precision":
        assert np.abs(after - before).max() > 1e-3
    assert not model.training


@pytest.mark.parametrize("towers", [TWO, THREE], ids=["two", "three"])
def test_vectors_of_a_tower_need_its_fields_alone(processor, frame, towers):
    model = make_model(processor, text_towers=towers)
    batch = FlipCTRCollator.from_model(processor, model)(processor.encode(frame))
    pipe = CTRPredictionPipeline(model, processor)
    with torch.no_grad():
        together = model.flip(**batch).text_representation.unflatten(1, (len(towers), SIZE))
    for place, (tower, names) in enumerate(towers.items()):
        vectors = pipe.tower_vectors(frame[names], tower, batch_size=50)
        assert (vectors.dtype, vectors.shape) == (np.float32, (300, SIZE))
        np.testing.assert_allclose(vectors, together[:, place].numpy(), rtol=0, atol=1e-5)
        with torch.no_grad():
            of_batch = model.tower_vectors(batch, tower)
        assert of_batch.dtype == torch.float32
        np.testing.assert_allclose(of_batch.numpy(), vectors, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(pipe.tower_vectors(frame, tower), vectors)


def test_an_index_of_items_warms_the_cache(processor, frame):
    model = make_model(processor)
    pipe, encoded = CTRPredictionPipeline(model, processor), Encoded(model)
    pipe.tower_vectors(frame[ITEM], "item")
    pipe.tower_vectors(frame[USER], "user")
    assert encoded.number == distinct(processor, model, frame)
    pipe(frame)
    assert encoded.number == distinct(processor, model, frame)


def test_ids_that_the_text_hides_are_hidden_from_the_index_too(click_rows, wordpiece):
    fields = [FieldConfig("user_id", show_oov=False), FieldConfig("title", show_oov=False), "genre"]
    processor = FlipProcessor.fit(click_rows, fields, wordpiece)
    towers = {"user": ["user_id"], "item": ITEM}
    model = make_model(processor, text_towers=towers)
    pipe = CTRPredictionPipeline(model, processor)
    unseen = [{"title": title, "genre": "drama"} for title in ("The Third Man", "Stalker", None)]
    vectors = pipe.tower_vectors(unseen, "item")
    assert (vectors == vectors[0]).all()
    whole = [{"user_id": 1, **row} for row in unseen]
    batch = FlipCTRCollator.from_model(processor, model)(processor.encode(whole))
    with torch.no_grad():
        np.testing.assert_allclose(model.tower_vectors(batch, "item").numpy(), vectors, rtol=0, atol=1e-5)


def test_fields_of_vectors_stay_out_of_the_towers(frame, wordpiece):
    rows = frame.assign(cover=[[float(i % 7), 1.0] for i in range(len(frame))])
    fields = [*USER, FieldConfig("cover", kind="vector", size=2), *ITEM]
    processor = FlipProcessor.fit(rows, fields, wordpiece)
    model = make_model(processor)
    pipe = CTRPredictionPipeline(model, processor)
    expected = probabilities(CTRPredictionPipeline(model, processor, tower_cache=0)(rows))
    np.testing.assert_allclose(probabilities(pipe(rows)), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(pipe.tower_vectors(frame[ITEM], "item"), pipe.tower_vectors(rows, "item"))


@pytest.mark.parametrize("form", ["frame", "dicts", "columns", "arrow", "one row"])
def test_rows_of_an_index_may_come_in_any_form(processor, frame, form):
    pipe = CTRPredictionPipeline(make_model(processor), processor)
    items = frame[ITEM].head(9)
    forms = {
        "frame": items,
        "dicts": items.to_dict("records"),
        "columns": items.to_dict("list"),
        "arrow": pa.Table.from_pandas(items),
        "one row": items.iloc[0].to_dict(),
    }
    expected = pipe.tower_vectors(items, "item")
    found = pipe.tower_vectors(forms[form], "item")
    np.testing.assert_array_equal(found, expected[: len(found)])
    assert len(found) == (1 if form == "one row" else 9)
    assert pipe.tower_vectors(items.head(0), "item").shape == (0, SIZE)


def test_errors_say_what_is_wrong(processor, frame):
    pipe = CTRPredictionPipeline(make_model(processor), processor)
    with pytest.raises(ValueError, match=r"text_towers has no tower 'items' \(did you mean 'item'\?\)"):
        pipe.tower_vectors(frame, "items")
    with pytest.raises(ValueError, match=r"'title'.*missing"):
        pipe.tower_vectors(frame[["genre"]], "item")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        pipe.tower_vectors(frame, "item", batch_size=0)
    for settings in ({"text_towers": None}, {"mode": "id"}):
        other = make_model(processor, **settings)
        with pytest.raises(ValueError, match=r"tower 'item': a model in mode=.* has no text towers"):
            CTRPredictionPipeline(other, processor).tower_vectors(frame, "item")
        with pytest.raises(ValueError, match=r"tower 'item': a model in mode=.* has no text towers"):
            other.tower_vectors({}, "item")
    with pytest.raises(ValueError, match="tower_cache=-1 must be 0 or more"):
        CTRPredictionPipeline(pipe.model, processor, tower_cache=-1)
    ids = torch.zeros(3, 5, dtype=torch.int64)
    for model in (pipe.model, pipe.model.flip):
        with pytest.raises(ValueError, match=r"tower_vectors must have the shape \(B, 2, 32\), but have \(3, 32\)"):
            model(feature_ids=ids, tower_vectors=torch.zeros(3, SIZE))
    with pytest.raises(ValueError, match="tower_vectors need text_towers; pass input_ids"):
        make_model(processor, text_towers=None)(feature_ids=ids, tower_vectors=torch.zeros(3, 2, SIZE))


def test_a_model_takes_vectors_in_the_place_of_texts(processor, frame):
    model, rows = make_model(processor), frame.head(20)
    pipe = CTRPredictionPipeline(model, processor)
    vectors = np.stack([pipe.tower_vectors(rows, tower) for tower in TWO], axis=1)
    batch = FlipCTRCollator.from_model(processor, model)(processor.encode(rows))
    with torch.no_grad():
        found = model(feature_ids=batch["feature_ids"], tower_vectors=torch.from_numpy(vectors))
        expected = model(**batch)
    for name in ("logits", "id_logits", "text_logits"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_a_budget_of_texts_and_a_cache_go_together(processor, frame):
    model = make_model(processor)
    plain = CTRPredictionPipeline(model, processor, tower_cache=0, text_budget=0.3)(frame)
    cached = CTRPredictionPipeline(model, processor, text_budget=0.3)(frame)
    np.testing.assert_allclose(probabilities(cached), probabilities(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["joint", "text", "id"])
def test_pipelines_by_name_have_the_cache(processor, frame, tmp_path, mode):
    for part in (make_model(processor), processor):
        part.save_pretrained(tmp_path)
    plain = pipeline("ctr-prediction", model=str(tmp_path), mode=mode, tower_cache=0)
    cached = pipeline("ctr-prediction", model=str(tmp_path), mode=mode)
    expected = probabilities(plain(frame))
    np.testing.assert_allclose(probabilities(cached(frame)), expected, rtol=0, atol=1e-6)
    scorer = BatchScorer(tmp_path, mode, tower_cache=10)
    scored = scorer(pa.Table.from_pandas(frame))["probability"].to_numpy()
    np.testing.assert_allclose(scored, expected, rtol=0, atol=1e-6)


def test_a_pipeline_is_sent_to_another_process_without_its_vectors(processor, frame):
    pipe = CTRPredictionPipeline(make_model(processor), processor)
    expected = pipe(frame)
    sent = pickle.loads(pickle.dumps(pipe))
    assert (len(pipe._tower_vectors) > 0, len(sent._tower_vectors)) == (True, 0)
    assert sent(frame) == expected


def test_threads_share_a_cache(processor, frame):
    model = make_model(processor)
    expected = probabilities(CTRPredictionPipeline(model, processor, tower_cache=0)(frame))
    pipe = CTRPredictionPipeline(model, processor, tower_cache=5, batch_size=8)
    parts = [frame.iloc[start : start + 30] for start in range(0, 300, 30)] * 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: probabilities(pipe(part)), parts))
    np.testing.assert_allclose(np.concatenate(found), np.tile(expected, 3), rtol=0, atol=1e-6)
    assert len(pipe._tower_vectors) == 5


@pytest.mark.parametrize("on_disk", ["flip.text_model.encoder", "flip.text_model"])
def test_a_text_encoder_that_is_offloaded_is_called_for_every_row(processor, frame, tmp_path, on_disk):
    model = make_model(processor)
    model.save_pretrained(tmp_path / "model")
    parts = ["flip.feature_embeddings", "flip.field_pooling", "flip.backbone", "text_head", "fusion"]
    parts += ["flip.text_model.embeddings", "flip.text_model.encoder"] if "encoder" in on_disk else ["flip.text_model"]
    places = dict.fromkeys(parts, "cpu") | {on_disk: "disk"}
    loaded = FlipForCTR.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded")
    pipe = CTRPredictionPipeline(loaded, processor)
    expected = probabilities(CTRPredictionPipeline(model, processor)(frame))
    np.testing.assert_allclose(probabilities(pipe(frame)), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="the text encoder is offloaded or spread over devices"):
        pipe.tower_vectors(frame, "item")


def test_the_documented_retrieval_runs(processor, frame, tmp_path, monkeypatch):
    model = make_model(processor)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "runs" / "towers" / "model")
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", SERVING, flags=re.DOTALL) if "liked" in block)
    items, user = frame[ITEM].drop_duplicates().reset_index(drop=True), frame.loc[0, USER].to_dict()
    found = {"items": items, "user": user, "liked": 3}
    exec(compile(example, "serving.md", "exec"), found)
    assert found["nearest"][0] == 3
    assert found["similarity"][3] == pytest.approx(1, abs=1e-5)
    ranked = found["ranked"]
    assert sorted(ranked.index) == list(range(len(items)))
    assert ranked["probability"].is_monotonic_decreasing
    expected = CTRPredictionPipeline(model, processor, tower_cache=0)(items.assign(**user))
    np.testing.assert_allclose(ranked.sort_index()["probability"], probabilities(expected), rtol=0, atol=1e-6)
