"""Vectors of texts: held against transformers alone, whatever the batch; computed once, by whoever comes first."""

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import sqlite3

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, LlamaConfig, RobertaConfig, T5Config

from flip_hf import FlipCTRCollator, FlipForCTR, FlipModel, FlipProcessor, fetch, text_vectors
from flip_hf.data.text_features import text_key
from flip_hf.fetch import FetchError
from flip_hf.nn.pooling import last_pooling
from flip_hf.text_vectors import TextVectorizer
from flip_hf.vector_cache import VectorCache

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
TEXTS = ["a film", "It's a Wonderful Life (1946), drama", "fargo", "the film number 42 ! " * 20, "", "heat & fargo"]


@pytest.fixture(autouse=True)
def in_single_precision(tmp_path, monkeypatch):
    """A cache of its own, and numbers that can be compared closely."""
    monkeypatch.setenv("FLIP_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_vectors, "computes_bf16", lambda: False)


def save_encoder(folder, tokenizer, config=None, seed=0):
    torch.manual_seed(seed)
    model = AutoModel.from_config(config or BertConfig(**SIZE, vocab_size=len(tokenizer), max_position_embeddings=128))
    with torch.no_grad():
        # At the size of fresh weights, all texts are alike.
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def plain(tmp_path, wordpiece):
    return save_encoder(tmp_path / "encoder", wordpiece)


def as_sentence_transformer(
    folder, modules=("Transformer", "Pooling", "Normalize"), pooling=None, inner="", **settings
):
    """Adds what sentence-transformers saves beside an encoder; with `inner`, in the layout of its first versions."""
    if inner:
        (folder / inner).mkdir()
        for path in [p for p in folder.iterdir() if p.is_file()]:
            path.rename(folder / inner / path.name)
    listed = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else inner,
            "type": kind if "." in kind else f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    pooling = pooling or {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if settings:
        (folder / inner / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


@torch.no_grad()
def reference(folder, texts, pooling="mean", normalize=True, max_length=128, layers=None):
    """The vectors by transformers alone, a text at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        output = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        )
        states = output.hidden_states[layers][0] if layers else output.last_hidden_state[0]
        vector = {"mean": states.mean(dim=0), "cls": states[0], "last": states[-1]}[pooling]
        vectors.append(vector / vector.norm() if normalize else vector)
    return torch.stack(vectors).numpy()


def assert_close(vectors, expected, atol=1e-3):
    assert vectors.dtype == np.float16
    assert vectors.shape == expected.shape
    np.testing.assert_allclose(vectors.astype(np.float32), expected, rtol=1e-3, atol=atol)


def never(*args, **kwargs):
    raise AssertionError("encoded again")


def entries(vectorizer):
    path = fetch.cache_dir() / "text-vectors" / f"{vectorizer.identity}.sqlite3"
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT count(*) FROM vectors").fetchone()[0]
    finally:
        connection.close()


@pytest.mark.parametrize("batch_size", [1, 2, 256])
@pytest.mark.parametrize("pooling", [None, "mean", "cls", "last"])
def test_a_plain_encoder_is_pooled_and_normalised(plain, pooling, batch_size):
    vectorizer = TextVectorizer(plain, pooling=pooling, batch_size=batch_size)
    expected = reference(plain, TEXTS, pooling or "mean")
    # Ten times what the comparison lets pass.
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    assert (vectorizer.size, vectorizer.pooling, vectorizer.normalize) == (32, pooling or "mean", True)
    assert vectorizer.max_length == 128
    assert_close(vectorizer(TEXTS), expected)


def test_settings_change_vectors_and_identity(plain):
    plainly = TextVectorizer(plain)
    others = {
        "first layers": (TextVectorizer(plain, text_layers=2), {"layers": 2}),
        "length": (TextVectorizer(plain, max_length=8), {"max_length": 8}),
        "norm": (TextVectorizer(plain, normalize=False), {"normalize": False}),
        "pooling": (TextVectorizer(plain, pooling="cls"), {"pooling": "cls"}),
    }
    assert len({plainly.identity, *(v.identity for v, _ in others.values())}) == 1 + len(others)
    for vectorizer, settings in others.values():
        assert_close(vectorizer(TEXTS), reference(plain, TEXTS, **settings), atol=3e-3)
    # What is asked for is what it is without asking.
    same = TextVectorizer(str(plain), text_layers=3, pooling="mean", normalize=True, batch_size=1, max_length=1000)
    assert same.identity == plainly.identity


@pytest.mark.parametrize("tokenizer", ["byte_bpe", "unigram"])
def test_other_tokenizers_and_encoders(tmp_path, tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    # Its positions depend on the padding's id.
    config = RobertaConfig(**SIZE, vocab_size=len(tokenizer), pad_token_id=1, max_position_embeddings=130)
    folder = save_encoder(tmp_path / "encoder", tokenizer, config)
    assert_close(TextVectorizer(folder, batch_size=3)(TEXTS), reference(folder, TEXTS))


def test_a_decoder_is_pooled_by_its_last_token(tmp_path, wordpiece):
    config = LlamaConfig(**SIZE, vocab_size=len(wordpiece), pad_token_id=0)
    folder = as_sentence_transformer(
        save_encoder(tmp_path / "encoder", wordpiece, config),
        pooling={"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True},
    )
    assert_close(TextVectorizer(folder)(TEXTS), reference(folder, TEXTS, "last"))


def test_last_pooling_reads_the_last_token_of_each_row():
    states = torch.arange(12.0).reshape(2, 3, 2)
    pooled = last_pooling(states, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert pooled.tolist() == [[2, 3], [10, 11]]


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode_mean_tokens": True}, ("mean", True)),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            ("cls", False),
        ),
        (["Transformer", "Pooling"], {"pooling_mode_lasttoken": True}, ("last", False)),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode": "cls"}, ("cls", True)),
        (["Transformer", "Pooling"], {"pooling_mode": ["mean"]}, ("mean", False)),
        (["Transformer", "Pooling"], {}, ("mean", False)),
        (
            ["sentence_transformers.base.modules.transformer.Transformer", "Pooling", "Normalize"],
            {"pooling_mode": "mean"},
            ("mean", True),
        ),
    ],
)
@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_sentence_transformer_is_what_its_files_say(plain, modules, pooling, expected, inner):
    folder = as_sentence_transformer(plain, modules, pooling, inner, max_seq_length=9, do_lower_case=False)
    vectorizer = TextVectorizer(folder)
    assert (vectorizer.pooling, vectorizer.normalize, vectorizer.max_length) == (*expected, 9)
    assert_close(vectorizer(TEXTS), reference(folder / inner, TEXTS, *expected, max_length=9), atol=3e-3)


def test_a_sentence_transformer_may_lower_case_and_may_not_limit_lengths(tmp_path, byte_bpe):
    config = BertConfig(**SIZE, vocab_size=len(byte_bpe), max_position_embeddings=100)
    folder = as_sentence_transformer(save_encoder(tmp_path / "encoder", byte_bpe, config), do_lower_case=True)
    vectorizer = TextVectorizer(folder)
    # As the encoder has no more positions; the tokenizer allows 128.
    assert vectorizer.max_length == 100
    assert_close(vectorizer(TEXTS), reference(folder, [text.lower() for text in TEXTS], max_length=100))
    assert not np.allclose(reference(folder, ["Heat"]), reference(folder, ["heat"]), atol=1e-2)


def test_the_same_encoder_has_the_same_identity_wherever_it_lies(plain, tmp_path):
    identity = TextVectorizer(plain).identity
    copied = shutil.copytree(plain, tmp_path / "elsewhere")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9", "_name_or_path": "/home"}))
    assert TextVectorizer(copied).identity == identity
    as_sentence_transformer(copied, max_seq_length=128)
    assert TextVectorizer(copied).identity == identity
    assert len(identity) == 32
    int(identity, 16)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_each_file_that_decides_a_vector_decides_the_identity(plain, tmp_path, wordpiece, file):
    identity = TextVectorizer(plain).identity
    if file == "model.safetensors":
        save_encoder(plain, wordpiece, seed=1)
    elif file == "config.json":
        config = json.loads((plain / file).read_text())
        (plain / file).write_text(json.dumps(config | {"hidden_act": "relu"}))
    else:
        tokenizer = json.loads((plain / file).read_text())
        tokenizer["normalizer"]["lowercase"] = False
        (plain / file).write_text(json.dumps(tokenizer))
    assert TextVectorizer(plain).identity != identity


def test_the_tokenizers_own_lengths_are_left_out(plain):
    identity, vectors = TextVectorizer(plain).identity, TextVectorizer(plain)(TEXTS)
    tokenizer = json.loads((plain / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {
        **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0},
        **{"pad_type_id": 0, "pad_token": "[PAD]"},
    }
    (plain / "tokenizer.json").write_text(json.dumps(tokenizer))
    vectorizer = TextVectorizer(plain)
    assert vectorizer.identity == identity
    np.testing.assert_array_equal(vectorizer._encode(TEXTS, lambda count: None), vectors)


def test_a_flip_model_gives_its_text_tower(ctr_folder, click_rows):
    vectorizer = TextVectorizer(ctr_folder)
    processor = FlipProcessor.from_pretrained(ctr_folder)
    model = FlipModel.from_pretrained(ctr_folder, mode="text")
    rows = {name: values[:7] for name, values in click_rows.items()}
    batch = FlipCTRCollator(processor, "text")(processor.encode(rows))
    with torch.no_grad():
        expected = model.eval()(**batch).text_representation
    texts = []
    for i in range(7):
        values = [None if (value := rows[field.name][i]) is None else str(value) for field in processor.fields]
        texts.append(processor.template.sentence(values))
    assert vectorizer.size == 16
    assert_close(vectorizer(texts), torch.nn.functional.normalize(expected, dim=1).numpy())
    assert_close(TextVectorizer(ctr_folder, normalize=False)(texts), expected.numpy(), atol=3e-3)


def test_a_flip_models_settings_are_those_of_its_text_tower(tmp_path, ctr_folder, click_rows, wordpiece):
    model = FlipForCTR.from_pretrained(ctr_folder)
    config = model.config.to_dict() | {
        "mode": "text",
        "text_towers": [["user_id", "gender", "age"], ["title", "genre"]],
    }
    config = type(model.config).from_dict(config)
    config.text_config.num_hidden_layers = 2
    towers = FlipForCTR(config)
    towers.save_pretrained(tmp_path / "towers")
    FlipProcessor.from_pretrained(ctr_folder).save_pretrained(tmp_path / "towers")
    towers.flip.text_model.save_pretrained(tmp_path / "alone")
    wordpiece.save_pretrained(tmp_path / "alone")
    assert_close(TextVectorizer(tmp_path / "towers")(TEXTS), reference(tmp_path / "alone", TEXTS))
    first = TextVectorizer(tmp_path / "towers", text_layers=1)
    assert_close(first(TEXTS), reference(tmp_path / "alone", TEXTS, layers=1))

    FlipForCTR.from_pretrained(ctr_folder, text_pooling="cls").save_pretrained(tmp_path / "cls")
    assert TextVectorizer(tmp_path / "cls").pooling == "cls"
    FlipForCTR.from_pretrained(ctr_folder, mode="id").save_pretrained(tmp_path / "id")
    with pytest.raises(ValueError, match="mode='id' has no text encoder"):
        TextVectorizer(tmp_path / "id")


def test_half_precision_is_used_where_the_machine_computes_in_it(plain, monkeypatch):
    single = TextVectorizer(plain)._encode(TEXTS, lambda count: None)
    monkeypatch.setattr(text_vectors, "computes_bf16", lambda: True)
    half = TextVectorizer(plain)(TEXTS)
    assert not np.array_equal(half, single)
    assert_close(half, single.astype(np.float32), atol=2e-2)


def test_size_and_identity_need_no_weights_and_cached_texts_no_encoder(plain, monkeypatch):
    fresh = TextVectorizer(plain)(TEXTS)
    monkeypatch.setattr(text_vectors, "load_text_encoder", never)
    vectorizer = TextVectorizer(plain)
    assert vectorizer.size == 32
    # Fresh or cached, the same numbers.
    np.testing.assert_array_equal(vectorizer(TEXTS[::-1]), fresh[::-1])
    with pytest.raises(AssertionError, match="encoded again"):
        vectorizer(["new"])


def test_repeated_texts_are_encoded_once(plain, monkeypatch):
    vectorizer, seen = TextVectorizer(plain, batch_size=2), []
    encode = vectorizer._encode
    monkeypatch.setattr(vectorizer, "_encode", lambda texts, done: seen.extend(texts) or encode(texts, done))
    texts = ["b", "a", "b", "c", "a", "b"]
    vectors = vectorizer(texts)
    assert seen == ["b", "a", "c"]
    assert_close(vectors, reference(plain, texts))
    np.testing.assert_array_equal(vectorizer(["c", "c"]), vectors[[3, 3]])
    assert entries(vectorizer) == 3


def test_a_copy_in_another_process_has_no_weights_of_its_own(plain, monkeypatch):
    vectorizer = TextVectorizer(plain)
    vectors, known = vectorizer(TEXTS), vectorizer._encoder
    copied = pickle.loads(pickle.dumps(vectorizer))
    assert "_encoder" not in copied.__dict__
    assert vectorizer._encoder is known
    assert copied.identity == vectorizer.identity
    np.testing.assert_array_equal(copied._encode(TEXTS, lambda count: None), vectors)


@pytest.mark.parametrize(("cached", "is_shown"), [(0, True), (7, True), (8, False), (10, False)])
def test_long_encodings_show_their_progress(plain, monkeypatch, cached, is_shown):
    texts, bars = [f"film {i}" for i in range(10)], []

    class Bar(contextlib.nullcontext):
        def __init__(self, total, desc, leave, disable):
            super().__init__(self)
            self.total, self.is_shown, self.done = total, not disable, 0
            bars.append(self)

        def update(self, count):
            self.done += count

    TextVectorizer(plain)(texts[:cached])
    monkeypatch.setattr(text_vectors, "progress_bar", Bar)
    TextVectorizer(plain, batch_size=2)(texts)
    assert [(bar.total, bar.done, bar.is_shown) for bar in bars] == [(10 - cached, 10 - cached, is_shown)]


def test_no_texts_are_no_vectors(plain):
    vectors = TextVectorizer(plain)([])
    assert vectors.shape == (0, 32)
    assert vectors.dtype == np.float16
    assert not fetch.cache_dir().exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], "text 1 is None, not a string"),
        (["a", "b", float("nan")], "text 2 is nan, not a string"),
        ([7], "text 0 is 7, not a string"),
        (["a", "\ud800"], r"text 1, '\\ud800', is not valid Unicode"),
        ("a text", "'a text' is not in a list"),
    ],
)
def test_what_is_no_text_is_an_error_that_names_its_place(plain, texts, message):
    with pytest.raises(ValueError, match=message):
        TextVectorizer(plain)(texts)


def test_encoding_continues_where_it_was_interrupted(plain, monkeypatch):
    monkeypatch.setattr(text_vectors, "_TEXTS_AT_ONCE", 4)
    texts = [f"film {i}" for i in range(14)]

    def killed():
        vectorizer = TextVectorizer(plain)
        encode, calls = vectorizer._encode, []

        def encode_twice(texts, done):
            calls.append(texts)
            if len(calls) == 3:
                os._exit(9)
            return encode(texts, done)

        vectorizer._encode = encode_twice
        vectorizer(texts)

    torch.set_num_threads(1)
    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9
    vectorizer, seen = TextVectorizer(plain), []
    assert entries(vectorizer) == 8
    encode = vectorizer._encode
    monkeypatch.setattr(vectorizer, "_encode", lambda texts, done: seen.append(texts) or encode(texts, done))
    assert_close(vectorizer(texts), reference(plain, texts))
    assert seen == [texts[8:12], texts[12:]]


def test_vectors_that_another_process_wrote_first_stay(plain, monkeypatch):
    vectorizer = TextVectorizer(plain)
    encode, texts = vectorizer._encode, ["a", "b"]

    def while_another_writes(texts, done):
        path = fetch.cache_dir() / "text-vectors" / f"{vectorizer.identity}.sqlite3"
        with VectorCache(path, 32) as cache:
            cache.add(text_vectors._keys(["a"]), np.ones((1, 32), np.float16))
        return encode(texts, done)

    monkeypatch.setattr(vectorizer, "_encode", while_another_writes)
    vectors = vectorizer(texts)
    assert (vectors[0] == 1).all()
    assert_close(vectors[1:], reference(plain, ["b"]))
    np.testing.assert_array_equal(vectorizer(texts), vectors)


def write_at_once(path, first):
    with VectorCache(path, 8) as cache:
        for start in range(first, first + 200, 20):
            rows = np.arange(start, start + 20)
            keys = text_vectors._keys([str(i) for i in rows])
            cache.add(keys, np.repeat(rows[:, None], 8, axis=1).astype(np.float16))


def test_several_processes_write_at_once(tmp_path):
    path, fork = tmp_path / "folder" / "cache.sqlite3", multiprocessing.get_context("fork")
    # Half of what each writes is written by another one, too.
    processes = [fork.Process(target=write_at_once, args=(path, first)) for first in (0, 100, 200, 300)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    keys, vectors = text_vectors._keys([str(i) for i in range(500)]), np.zeros((500, 8), np.float16)
    with VectorCache(path, 8) as cache:
        assert len(cache.read(keys, vectors, np.arange(500))) == 0
    assert (vectors == np.arange(500)[:, None]).all()


def test_any_whole_number_is_a_key_and_rows_keep_their_order(tmp_path):
    keys, vectors = np.array([-(2**63), 0, 2**63 - 1, -1]), np.zeros((4, 2), np.float16)
    written = np.arange(8, dtype=np.float16).reshape(4, 2)
    with VectorCache(tmp_path / "cache.sqlite3", 2) as cache:
        assert cache.read(keys, vectors, np.array([2, 0])).tolist() == [2, 0]
        cache.add(keys[:3], written[:3])
        assert cache.read(keys, vectors, np.array([3, 2, 1, 0])).tolist() == [3]
    np.testing.assert_array_equal(vectors, [*written[:3], [0, 0]])


def test_encoded_texts_are_found_by_their_keys(plain):
    vectorizer = TextVectorizer(plain)
    vectors = vectorizer(["b", "a"])
    keys = np.array([text_key("a"), text_key("b"), text_key("a")])
    np.testing.assert_array_equal(TextVectorizer(plain).find(keys), vectors[[1, 0, 1]])
    with pytest.raises(OSError, match=r"vectors of 1 texts.*encode their rows again"):
        vectorizer.find(np.array([text_key("a"), text_key("never seen")]))


def test_the_cache_holds_no_texts(plain, tmp_path):
    TextVectorizer(plain)(["confidential words"])
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files
    assert not any(b"confidential" in path.read_bytes() for path in files)


def spoil(path, how):
    content = bytearray(path.read_bytes())
    if how == "empty":
        content = b""
    elif how == "half":
        content = content[: len(content) // 2]
    elif how == "another file":
        content = b"no database " * 1000
    elif how == "one byte":
        # The last page is full of vectors.
        content[-1] ^= 1
    elif how == "one byte less":
        content = content[:-1]
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "half", "another file", "one byte", "one byte less"])
def test_a_damaged_cache_is_an_error_that_names_the_file(plain, how):
    texts = [f"film {i}" for i in range(300)]
    vectorizer = TextVectorizer(plain)
    vectors = vectorizer(texts)
    path = fetch.cache_dir() / "text-vectors" / f"{vectorizer.identity}.sqlite3"
    spoil(path, how)
    with pytest.raises(
        OSError, match=rf"{vectorizer.identity}\.sqlite3: the cache of text vectors is damaged .*delete"
    ):
        vectorizer(texts)
    path.unlink()
    np.testing.assert_array_equal(vectorizer(texts), vectors)


def test_a_cache_that_cannot_be_opened_is_an_error_that_says_what_to_do(plain):
    vectorizer = TextVectorizer(plain)
    path = fetch.cache_dir() / "text-vectors" / f"{vectorizer.identity}.sqlite3"
    path.mkdir(parents=True)
    with pytest.raises(OSError, match=r"sqlite3: the cache of text vectors can't be used .*FLIP_HF_CACHE"):
        vectorizer(["a"])


def test_numbers_that_float16_cannot_hold_are_an_error_and_not_cached(plain):
    vectorizer = TextVectorizer(plain, normalize=False)
    with torch.no_grad():
        vectorizer._encoder.encoder.layer[-1].output.LayerNorm.weight.fill_(1e6)
    with pytest.raises(ValueError, match="the vector of the text 'a film' has numbers that float16 can't hold"):
        vectorizer(["a film"])
    assert entries(vectorizer) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is not one of cls, mean, last"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"text_layers": 4}, "text_layers=4, but the text encoder has 3 layers"),
    ],
)
def test_an_impossible_setting_is_an_error(plain, settings, message):
    with pytest.raises(ValueError, match=message):
        TextVectorizer(plain, **settings)


def dense(folder):
    as_sentence_transformer(folder, ["Transformer", "Pooling", "Dense"])


def foreign_code(folder):
    as_sentence_transformer(folder, ["custom_st.Transformer", "Pooling"])


def climbing(folder):
    as_sentence_transformer(folder)
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["path"] = "../1_Pooling"
    (folder / "modules.json").write_text(json.dumps(listed))


def two_poolings(folder):
    as_sentence_transformer(folder, pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True})


def max_pooling(folder):
    as_sentence_transformer(folder, pooling={"pooling_mode": "max"})


def prompt(folder):
    as_sentence_transformer(folder)
    (folder / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')


def bad_length(folder):
    as_sentence_transformer(folder, max_seq_length="long")


def no_list(folder):
    (folder / "modules.json").write_text('{"0": 1}')


def no_json(folder):
    (folder / "modules.json").write_text("[")


def no_pooling(folder):
    as_sentence_transformer(folder)
    (folder / "1_Pooling" / "config.json").unlink()


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "another"}')


def encoder_and_decoder(folder):
    T5Config(d_model=32, num_layers=1, num_heads=2).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dense, ValueError, r"lists 'Transformer', 'Pooling', 'Dense'; .* add them as a column"),
        (foreign_code, ValueError, "lists 'custom_st.Transformer', 'Pooling'"),
        (climbing, ValueError, r"the path '\.\./1_Pooling' leaves the model's folder"),
        (two_poolings, ValueError, r"pooling 'cls \+ mean' is not one of .* as a column"),
        (max_pooling, ValueError, "pooling 'max' is not one of"),
        (prompt, ValueError, "default_prompt_name puts a prompt before each text"),
        (bad_length, ValueError, "max_seq_length='long' must be a whole number"),
        (no_list, ValueError, "not a list of modules"),
        (no_json, ValueError, "modules.json is not valid JSON"),
        (no_pooling, OSError, "1_Pooling/config.json"),
        (pickled, OSError, "found no model.safetensors"),
        (adapter, ValueError, "adapter_config.json would replace this model"),
        (encoder_and_decoder, ValueError, "a model of type 't5' is not a text encoder"),
    ],
)
def test_what_cannot_be_computed_here_is_an_error(plain, change, kind, message):
    change(plain)
    with pytest.raises(kind, match=message):
        TextVectorizer(plain)(["a"])


def test_an_encoder_that_only_the_hub_has_is_not_downloaded(monkeypatch):
    monkeypatch.setattr(text_vectors, "resolve_pretrained", lambda name: name)
    with pytest.raises(FetchError, match="'org/encoder' is on the Hub; fetch it with `hf download org/encoder`"):
        TextVectorizer("org/encoder")
