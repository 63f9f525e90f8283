"""Folders that nobody vouches for: what loading one gets, and what it takes, opens and runs."""

import json
import os
import pickle
import re
import shutil
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from finetuned import finetuned
from safe_loads import Loads
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from flip_hf import FieldConfig, FlipConfig, FlipForCTR, FlipProcessor
from flip_hf.data.schema import InputError
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.settings import FinetuneSettings

MODELS = ("FlipModel", "FlipForCTR", "FlipForPreTraining")
CONFIG = ("FlipConfig", "FlipForCTR")
MODEL = ("FlipForCTR",)
PROCESSOR = ("FlipProcessor",)
EVERYTHING = ("FlipConfig", *MODELS, "FlipProcessor")

MOST_SECONDS = 60
MOST_BYTES = 300 << 20
"""What a refusal may take: far less than what the folder asks for, and some room for the reading of its files."""


@pytest.fixture(scope="module")
def good(tmp_path_factory, wordpiece):
    """A model and its processor as they are saved."""
    numbers = range(40)
    rows = {
        "user_id": [str(i % 7) for i in numbers],
        "title": [f"film {i % 5}" for i in numbers],
        "tags": [["a", "b"][: i % 3] for i in numbers],
        "label": [i % 2 for i in numbers],
    }
    fields = ["user_id", "title", FieldConfig("tags", kind="sequence", max_values=3)]
    processor = FlipProcessor.fit(rows, fields, wordpiece, label="label")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = FlipConfig(
        text_config=BertConfig(**size, vocab_size=len(wordpiece)),
        fields=processor.fields,
        embedding_dim=4,
        projection_dim=8,
        backbone_options={"hidden_sizes": [8]},
    )
    folder = tmp_path_factory.mktemp("good")
    finetuned(FlipForCTR(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def repo(good, tmp_path):
    """A copy, alone in a folder with a file that no load has business with."""
    shutil.copytree(good, tmp_path / "repo")
    (tmp_path / "neighbour").write_text("private")
    return tmp_path / "repo"


@pytest.fixture(scope="module")
def loads():
    program = Loads()
    yield program
    program.close()


@pytest.fixture(scope="module")
def peak_bytes(loads, good):
    """What loading the good folder takes, the imports included."""
    return loads("FlipForCTR", good)["peak_bytes"]


def assert_harmless(result, repo):
    """It opened nothing beside the folder, ran nothing and did not write to the terminal."""
    assert result["forbidden"] == []
    assert not (repo / "canary").exists()
    beside = [p for p in result["opened"] if p.startswith(str(repo.parent)) and not p.startswith(f"{repo}/")]
    assert beside == []
    assert not [path for path in result["opened"] if path.endswith((".bin", ".py")) and path.startswith(str(repo))]
    assert result["message"].replace("\n", "").isprintable()
    # transformers prints some words bold.
    assert re.sub(r"[\n\r\t]|\x1b\[\d*m", "", result["printed"]).isprintable(), result["printed"]


# ----- ways to spoil a folder


def settings(file, **changes):
    """Other settings in one of the JSON files."""

    def spoil(repo):
        values = json.loads((repo / file).read_text())
        (repo / file).write_text(json.dumps(values | changes))

    return spoil


def config(**changes):
    return settings("config.json", **changes)


def processor_config(**changes):
    return settings("processor_config.json", **changes)


def tokenizer_config(**changes):
    return settings("tokenizer_config.json", **changes)


def text_config(**changes):
    def spoil(repo):
        values = json.loads((repo / "config.json").read_text())
        values["text_config"].update(changes)
        (repo / "config.json").write_text(json.dumps(values))

    return spoil


def field(place, file="config.json", **changes):
    """Other settings of the first field (user_id) or of the last one (tags)."""

    def spoil(repo):
        values = json.loads((repo / file).read_text())
        values["fields"][place].update(changes)
        (repo / file).write_text(json.dumps(values))

    return spoil


def content(file, data):
    def spoil(repo):
        (repo / file).write_bytes(data.encode() if isinstance(data, str) else data)

    return spoil


def link(file, target):
    def spoil(repo):
        (repo / file).unlink()
        (repo / file).symlink_to(target)

    return spoil


def both(*spoilers):
    def spoil(repo):
        for one in spoilers:
            one(repo)

    return spoil


class Canary:
    """What a pickle of it does when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def pickled(file="pytorch_model.bin"):
    return lambda repo: torch.save(Canary(repo / "canary"), repo / file)


def only_pickled(repo):
    (repo / "model.safetensors").unlink()
    pickled()(repo)


def code(repo):
    (repo / "evil.py").write_text(f"open({str(repo / 'canary')!r}, 'w')\nclass Evil: pass\n")


def index(shard, move_to=None):
    """An index instead of the one file, which goes to another place."""

    def spoil(repo):
        names = load_file(repo / "model.safetensors").keys()
        if move_to is None:
            (repo / "model.safetensors").unlink()
        else:
            shutil.move(repo / "model.safetensors", repo / move_to)
        name = str(repo / move_to) if shard == "absolute" else shard
        text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)})
        (repo / "model.safetensors.index.json").write_text(text)

    return spoil


def cut(file, length):
    return lambda repo: os.truncate(repo / file, os.stat(repo / file).st_size + length if length < 0 else length)


def bytes_at(file, place, data):
    def spoil(repo):
        with (repo / file).open("r+b") as opened:
            opened.seek(place)
            opened.write(data)

    return spoil


def weights(tensors):
    return lambda repo: save_file(tensors, repo / "model.safetensors", metadata={"format": "pt"})


def behind_a_link(repo):
    """As the Hub's cache keeps files."""
    (repo / "model.safetensors").rename(repo / "blob")
    (repo / "model.safetensors").symlink_to("blob")


def distributed(repo):
    shutil.copy(repo / "model.safetensors", repo / "shard-00001-model-00001-of-00001.safetensors")
    config(embedding_dim=10**8)(repo)


def vocabulary(change, **options):
    def spoil(repo):
        path = repo / "vocabulary.parquet"
        pq.write_table(change(pq.read_table(path)), path, compression="zstd", **options)

    return spoil


def column(name, make):
    """Another column in the vocabulary: `make(values)` are its values."""

    def change(table):
        return table.set_column(table.column_names.index(name), name, pa.array(make(table[name].to_pylist())))

    return change


def swapped(table):
    rows = np.arange(len(table))
    rows[[3, 12]] = rows[[12, 3]]
    return table.take(rows)


def repeated(values):
    return [*values[:5], values[4], *values[6:]]


def many_rows(repo):
    """Thirty million rows that take 6 kB."""
    path = repo / "vocabulary.parquet"
    schema, number = pq.read_schema(path), 10**6
    part = pa.table([pa.nulls(number, kind) for kind in schema.types[:3]] + [np.zeros(number, np.int64)], schema=schema)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for _ in range(30):
            writer.write_table(part, row_group_size=number)


def many_rows_as_described(repo):
    """As many rows as the fields beside them say that there are."""
    many_rows(repo)
    field(0, "processor_config.json", num_features=3 * 10**7 - 13)(repo)


def long_value(values):
    return ["a" * (150 << 20), *values[1:]]


def one_string(table):
    """One long string, kept once, as the value of all features."""
    values = pa.DictionaryArray.from_arrays(np.zeros(len(table), np.int32), ["a" * (60 << 20)])
    return table.set_column(1, "value", values)


def not_utf8(table):
    values = table["value"].combine_chunks()
    data = values.buffers()[2].to_pybytes().replace(b"film 1", b"film \xff")
    made = pa.StringArray.from_buffers(len(values), values.buffers()[1], pa.py_buffer(data), values.buffers()[0])
    return table.set_column(1, "value", made)


def tokenizer(change):
    def spoil(repo):
        values = json.loads((repo / "tokenizer.json").read_text())
        change(values)
        (repo / "tokenizer.json").write_text(json.dumps(values))

    return spoil


def nested(depth, start="{", end="}"):
    return f'{start}"a":{"[" * depth}{"]" * depth}{end}'


def extra_config(text):
    def spoil(repo):
        values = (repo / "config.json").read_text().rstrip().removesuffix("}")
        (repo / "config.json").write_text(f"{values}, {text}}}")

    return spoil


MANY_FIELDS = [{"name": f"f{i}", "num_features": 2} for i in range(300_000)]
TOKENIZER_FILES = ("vocab_file", "tokenizer_file", "merges_file", "spm_file")
LARGER = r"config.json describes a larger model than the weights\."
REFUSED = "is refused, because transformers would run or read what it names"

REFUSALS = {
    # --- weights
    "a pickle and nothing else": (MODELS, only_pickled, "repo: found no model.safetensors .* not read"),
    "an index that names a pickle": (
        MODEL,
        both(index("pytorch_model.bin"), pickled()),
        r"index.json: 'pytorch_model.bin' is not the name of a safetensors file in the same folder",
    ),
    "an index that climbs": (MODEL, index("../outside.safetensors", "../outside.safetensors"), "index.json: .*outside"),
    "an index that names a place": (
        MODEL,
        index("absolute", "../outside.safetensors"),
        r"index.json: ./.* is not the name of a safetensors file",
    ),
    "an index of a missing file": (MODEL, index("other.safetensors"), "other.safetensors: not a readable safetensors"),
    "an index that is a list": (
        MODEL,
        both(index(""), content("model.safetensors.index.json", "[]")),
        "index.json: not an index of safetensors files",
    ),
    "an index nested too deeply": (
        MODEL,
        both(index(""), content("model.safetensors.index.json", nested(100_000))),
        "index.json: not an index of safetensors files",
    ),
    "a setting that names a pickle": (
        MODEL,
        both(pickled("adapter_model.bin"), config(transformers_weights="adapter_model.bin")),
        f"transformers_weights {REFUSED}",
    ),
    "a distributed checkpoint": (MODEL, distributed, "shard-00001.* a part of a distributed checkpoint"),
    "a header of 10^15 bytes": (
        MODEL,
        content("model.safetensors", struct.pack("<Q", 10**15) + b"{}"),
        "model.safetensors: not a readable safetensors file .*header too large",
    ),
    "a header of 90 million zeros": (
        MODEL,
        both(bytes_at("model.safetensors", 0, struct.pack("<Q", 9 * 10**7)), cut("model.safetensors", 9 * 10**7 + 8)),
        "model.safetensors: not a readable safetensors file",
    ),
    "a cut file": (MODEL, cut("model.safetensors", -5000), "model.safetensors: not a readable .* not fully covered"),
    "an empty file": (MODEL, cut("model.safetensors", 0), "model.safetensors: not a readable safetensors file"),
    "other weights": (MODEL, weights({"x": torch.zeros(3)}), "repo lacks weights that mode='joint' needs"),
    "a tensor that steers the terminal": (
        MODEL,
        lambda repo: save_file(
            load_file(repo / "model.safetensors") | {"\x1b[2Jevil": torch.zeros(1)}, repo / "model.safetensors"
        ),
        r"'\\x1b\[2Jevil' is not a valid name of a tensor",
    ),
    "an adapter": (
        MODEL,
        content("adapter_config.json", '{"base_model_name_or_path": "evil/base", "peft_type": "LORA"}'),
        "adapter_config.json would replace this model",
    ),
    "weights that never end": (MODEL, link("model.safetensors", "/dev/zero"), "repo: found no model.safetensors"),
    # --- sizes in config.json
    "10^12 features": (MODELS, field(0, num_features=10**12), rf"repo: {LARGER}.*\(1000000000013, 4\)"),
    "10^30 features": (CONFIG, field(0, num_features=10**30), "fields.num_features is too large for any model"),
    "10^12 features added": (MODEL, field(0, added_features=[10**12], value_hashes=["a", "b"]), LARGER),
    "features added 10^5 times": (
        CONFIG,
        field(0, added_features=[0] * 10**5),
        "extended 100000 times; the limit is 4096",
    ),
    "11 features more": (MODEL, field(0, num_features=20), r"\(22, 4\) in the weights, but config.json .* \(33, 4\)"),
    "embeddings of 10^9": (MODELS, config(embedding_dim=10**9), LARGER),
    "embeddings of 10^15": (CONFIG, config(embedding_dim=10**15), "embedding_dim is too large for any model"),
    "embeddings of 8": (MODEL, config(embedding_dim=8), "in the weights, but config.json describes"),
    "projections of 10^9": (("FlipForPreTraining",), config(projection_dim=10**9), LARGER),
    "hidden layers of 10^9": (MODEL, config(backbone_options={"hidden_sizes": [10**9]}), LARGER),
    "10^6 hidden layers": (MODEL, config(backbone_options={"hidden_sizes": [8] * 10**6}), LARGER),
    "10^9 cross layers": (CONFIG, config(backbone_options={"cross_layers": 10**9}), "cross_layers is too large; the"),
    "10^9 experts": (MODEL, config(backbone_options={"hidden_sizes": [8], "num_experts": 10**9}), LARGER),
    "10^9 values of a field": (
        CONFIG,
        field(-1, max_values=10**9),
        "'tags': max_values=1000000000 is too large.* 16384",
    ),
    "300,000 fields": (CONFIG, config(fields=MANY_FIELDS), "300000 fields are too many: the limit is 2048"),
    "a text encoder of 10^9": (MODELS, text_config(hidden_size=10**9), LARGER),
    "a text encoder of 10^12": (CONFIG, text_config(hidden_size=10**12), "hidden_size is too large for any model"),
    "10^6 text layers": (
        CONFIG,
        text_config(num_hidden_layers=10**6),
        "num_hidden_layers is too large; the limit is",
    ),
    "60,000 text layers": (MODEL, text_config(num_hidden_layers=60_000), LARGER),
    "10^9 layers counted out": (
        CONFIG,
        config(text_config={"model_type": "gemma2", "num_hidden_layers": 10**9}),
        "num_hidden_layers is too large; the limit is",
    ),
    "10^9 tokens": (MODEL, text_config(vocab_size=10**9), LARGER),
    "10^9 positions": (MODEL, text_config(max_position_embeddings=10**9), LARGER),
    "10^9 labels": (CONFIG, config(num_labels=10**9, id2label=None), "num_labels is too large; the limit is"),
    "10^9 labels of the text": (CONFIG, text_config(num_labels=10**9), "num_labels is too large; the limit is"),
    "10^9 layers to build": (CONFIG, config(text_layers=10**9), "text_layers is too large; the limit is"),
    "another text encoder": (MODEL, config(text_config=None), LARGER),
    # --- other settings in config.json
    "a number as a string": (CONFIG, config(embedding_dim="4"), "FLIP model: .*'embedding_dim' expected int, got str"),
    "a Boolean as a number": (CONFIG, config(embedding_dim=True), "'embedding_dim' expected int, got bool"),
    "a field's number as a string": (CONFIG, field(0, num_features="9"), "'user_id': num_features='9' must be a whole"),
    "a field's Boolean as a number": (CONFIG, field(0, max_tokens=True), "'user_id': max_tokens=True must be a whole"),
    "features taken away": (CONFIG, field(0, added_features=[-5]), r"'user_id': added_features=\[-5\] must be whole"),
    "a number as a name": (CONFIG, field(0, name=5), "a field needs a column name.* got 5"),
    "a list as words": (CONFIG, field(0, text_name=[1]), r"'user_id': text_name=\[1\] must be a string"),
    "numbers as fields": (CONFIG, config(fields=[1, 2]), "a field is a column name or a dict of settings; got 1"),
    "a number for fields": (CONFIG, config(fields=5), "'fields' expected a list, got int"),
    "a text encoder's string": (CONFIG, text_config(hidden_size="16"), "'hidden_size' expected int, got str"),
    "strings as sizes": (MODEL, config(backbone_options={"hidden_sizes": ["8"]}), "repo: the model .* can't be built"),
    "sizes below zero": (MODEL, config(backbone_options={"hidden_sizes": [-8]}), "repo: the model .* can't be built"),
    "no heads": (
        MODEL,
        text_config(num_attention_heads=0),
        "repo: the model in config.json can't be built",
    ),
    "an unknown activation": (MODEL, text_config(hidden_act="os.system"), "repo: the model .* can't be built"),
    "NaN": (CONFIG, config(contrastive_temperature=float("nan")), "contrastive_temperature is NaN"),
    "NaN as a weight": (CONFIG, config(objectives={"mlm": float("nan"), "icl": 1}), "objectives.mlm is NaN"),
    "Infinity": (CONFIG, config(contrastive_temperature=float("inf")), "contrastive_temperature=inf must be positive"),
    "Infinity as a weight": (CONFIG, config(objectives={"mlm": float("inf")}), "objectives=.* need weights of 0 or"),
    "an unknown backbone": (MODELS, config(backbone="evil"), "backbone='evil' is not one of lr, "),
    "an unknown option": (MODEL, config(backbone_options={"evil": 1}), "backbone 'dcnv2' has no option 'evil'"),
    "an unknown objective": (("FlipForPreTraining",), config(objectives={"evil": 1.0}), "objectives 'evil' are not"),
    "an unknown mode": (CONFIG, config(mode="evil"), "mode='evil' is not one of joint, id, text"),
    "text towers of other fields": (CONFIG, config(mode="text", text_towers=[["evil"], ["user_id"]]), "every field ex"),
    "text towers of other pooling": (
        CONFIG,
        config(text_towers=[["user_id"]], text_pooling="cls"),
        "need text_pooling",
    ),
    "words for text towers": (CONFIG, config(mode="text", text_towers=["user_id"]), "'text_towers'"),
    "an unknown setting of a field": (CONFIG, field(0, evil=1), "'evil' .* newer version .* Upgrade flip_hf"),
    "an unknown setting of a field, elsewhere": (
        PROCESSOR,
        field(0, "processor_config.json", evil=1),
        "'evil' .* newer version .* Upgrade flip_hf",
    ),
    "an unknown kind of model": (CONFIG, config(model_type="evil"), "describes a model of type 'evil', not 'flip'"),
    "a kind that steers the terminal": (CONFIG, config(model_type="\x1b[2J"), r"of type '\\x1b\[2J', not 'flip'"),
    "another kind of model": (CONFIG, config(model_type="bert"), "describes a model of type 'bert', not 'flip'"),
    "an unknown text encoder": (CONFIG, text_config(model_type="evil"), "Unrecognized model type for subconfig: evil"),
    "itself as the text encoder": (
        CONFIG,
        config(text_config={"model_type": "flip"}),
        "is not a setting of a text encoder",
    ),
    "a function as the type": (CONFIG, config(dtype="load"), "dtype='load' is not one of None, float64"),
    "the name of a method": (CONFIG, config(to_dict=5), "config.json: to_dict is not a setting"),
    "the name of the class": (CONFIG, config(__class__="x"), "config.json: __class__ is not a setting"),
    # --- what transformers would fetch or run
    "a kernel for attention": (CONFIG, config(attn_implementation="evil/kernel"), f"attn_implementation {REFUSED}"),
    "a kernel, underscored": (CONFIG, config(_attn_implementation="evil/kernel"), f"_attn_implementation {REFUSED}"),
    "a kernel for one tower": (
        CONFIG,
        config(attn_implementation={"text_config": "evil/kernel"}),
        f"attn_implementation {REFUSED}",
    ),
    "a kernel for the text": (
        CONFIG,
        text_config(attn_implementation="evil/kernel"),
        f"text_config.attn_implementation {REFUSED}",
    ),
    "a kernel for experts": (CONFIG, config(experts_implementation="evil/kernel"), f"experts_implementation {REFUSED}"),
    "flash attention": (CONFIG, config(attn_implementation="flash_attention_2"), f"attn_implementation {REFUSED}"),
    "quantization": (CONFIG, config(quantization_config={"quant_method": "gptq"}), f"quantization_config {REFUSED}"),
    "quantization of the text": (
        CONFIG,
        text_config(quantization_config={"quant_method": "fp8"}),
        f"text_config.quantization_config {REFUSED}",
    ),
    "fusion": (CONFIG, config(fusion_config={"patch_embeddings": True}), f"fusion_config {REFUSED}"),
    "code for an unknown text encoder": (
        CONFIG,
        both(code, text_config(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})),
        "Unrecognized model type for subconfig: evil",
    ),
    "a model that fetches another": (
        CONFIG,
        config(text_config={"model_type": "detr", "backbone": "evil/backbone", "use_pretrained_backbone": True}),
        "text_config.backbone='evil/backbone' is not a setting of a text encoder",
    ),
    "a model of timm": (
        CONFIG,
        config(text_config={"model_type": "timm_wrapper", "architecture": "hf-hub:evil/x"}),
        "text_config.model_type='timm_wrapper' is not a setting of a text encoder",
    ),
    # --- config.json as a file
    "JSON nested too deeply": (CONFIG, content("config.json", nested(100_000)), "config.json is nested too deeply"),
    "JSON nested deeply": (CONFIG, extra_config(nested(800, "", "")), "config.json is nested too deeply"),
    "JSON nested": (CONFIG, extra_config(nested(50, "", "")), "config.json: a is nested too deeply"),
    "not JSON": (CONFIG, content("config.json", "{"), "config.json' is not a valid JSON file"),
    "not UTF-8": (CONFIG, content("config.json", b"\xff\xfe{}"), "config.json' is not a valid JSON file"),
    "a list": (CONFIG, content("config.json", "[1]"), "config.json describes a model of type 'list'"),
    "no config.json": (CONFIG, lambda repo: (repo / "config.json").unlink(), "repo has no config.json"),
    "a config.json that never ends": (CONFIG, link("config.json", "/dev/zero"), "repo has no config.json"),
    "a config.json that waits": (
        CONFIG,
        both(lambda repo: (repo / "config.json").unlink(), lambda repo: os.mkfifo(repo / "config.json")),
        "repo has no config.json",
    ),
    # --- processor_config.json
    "another processor": (PROCESSOR, processor_config(processor_class="Evil"), "processor_class='Evil' is not a FLIP"),
    "a number for the label": (
        PROCESSOR,
        processor_config(label=5),
        "processor_config.json: .*label=5 must be null or",
    ),
    "a field for the label": (PROCESSOR, processor_config(label="title"), "label='title' must be null or a column"),
    "a string for a length": (PROCESSOR, processor_config(max_length="128"), "max_length='128' must be a whole number"),
    "NaN for a length": (PROCESSOR, processor_config(max_length=float("nan")), "max_length=nan must be a whole number"),
    "no room for the text": (PROCESSOR, processor_config(max_length=3), "repo: .*max_length=3 leaves no room"),
    "fields that are not fitted": (PROCESSOR, processor_config(fields=["user_id"]), "'user_id' has no num_features"),
    "a string for the fields": (
        PROCESSOR,
        processor_config(fields="abc"),
        "the file must hold an object whose 'fields' is a list",
    ),
    "no fields": (PROCESSOR, processor_config(fields=[]), "holds 22 features, but the fields beside it have 2"),
    "300,000 fields to process": (
        PROCESSOR,
        processor_config(fields=MANY_FIELDS),
        "300000 fields are too many: the limit is 2048",
    ),
    "10^9 values to process": (PROCESSOR, field(-1, "processor_config.json", max_values=10**9), "the limit is 16384"),
    "10^12 features to process": (
        PROCESSOR,
        field(0, "processor_config.json", num_features=10**12),
        "vocabulary.parquet: holds 22 features, but the fields beside it have 1000000000013",
    ),
    "settings nested too deeply": (
        PROCESSOR,
        content("processor_config.json", nested(100_000)),
        "processor_config.json: these are not the settings of a FLIP processor",
    ),
    "settings that are a list": (PROCESSOR, content("processor_config.json", "[]"), "must hold an object whose"),
    "settings that are not JSON": (
        PROCESSOR,
        content("processor_config.json", "{"),
        "these are not the settings of a FLIP",
    ),
    "settings that are not UTF-8": (PROCESSOR, content("processor_config.json", b"\xff"), "not the settings of a FLIP"),
    # --- vocabulary.parquet
    "a cut vocabulary": (PROCESSOR, cut("vocabulary.parquet", -20), "vocabulary.parquet: not a readable vocabulary"),
    "no Parquet": (PROCESSOR, content("vocabulary.parquet", "evil"), "vocabulary.parquet: not a readable vocabulary"),
    "a broken page": (PROCESSOR, bytes_at("vocabulary.parquet", 10, bytes(190)), "parquet: not a readable vocabulary"),
    "strings that are not UTF-8": (PROCESSOR, vocabulary(not_utf8), "parquet: not a readable vocabulary .*UTF8"),
    "other columns": (PROCESSOR, vocabulary(lambda t: t.select(["field"])), "the columns are .'field'., not "),
    "lists for values": (PROCESSOR, vocabulary(column("value", lambda v: [[1]] * len(v))), "the columns are"),
    "strings for counts": (
        PROCESSOR,
        vocabulary(column("count", lambda v: ["x"] * len(v))),
        "not a readable vocabulary",
    ),
    "no counts": (PROCESSOR, vocabulary(column("count", lambda v: [None] * 21 + v[21:])), "counts of features must be"),
    "counts below zero": (PROCESSOR, vocabulary(column("count", lambda v: [-n for n in v])), "counts of features must"),
    "a value twice": (PROCESSOR, vocabulary(column("value", repeated)), "'user_id': rows 2 to 10 are not the features"),
    "rows of another field": (PROCESSOR, vocabulary(swapped), "'user_id': rows 2 to 10 are not the features"),
    "a field of another name": (
        PROCESSOR,
        field(0, "processor_config.json", name="evil"),
        "vocabulary.parquet, field 'evil': rows 2 to 10 are not the features",
    ),
    "one feature less": (
        PROCESSOR,
        vocabulary(lambda t: t[:-1]),
        "holds 21 features, but the fields beside it have 22",
    ),
    "3 * 10^7 rows in 6 kB": (PROCESSOR, many_rows, "holds 30000000 features, but the fields beside it have 22"),
    "3 * 10^7 rows, as described": (
        PROCESSOR,
        many_rows_as_described,
        "would take .* bytes of memory, over 1000 times",
    ),
    "150 MiB in one value": (
        PROCESSOR,
        vocabulary(column("value", long_value), use_dictionary=False, write_statistics=False),
        r"would take 157\d{6} bytes of memory, over 1000 times the file",
    ),
    "1.3 GiB of one string": (
        PROCESSOR,
        vocabulary(one_string, write_statistics=False),
        r"would take 1384\d{6} bytes of memory, over 1000 times the file",
    ),
    "100 MB of notes": (
        PROCESSOR,
        vocabulary(lambda table: table.replace_schema_metadata({"evil": "a" * 10**8})),
        "not a readable vocabulary .*size limit",
    ),
    # --- the tokenizer
    "a broken tokenizer": (PROCESSOR, content("tokenizer.json", "{"), "repo: the tokenizer's files can't be read"),
    "an empty tokenizer": (PROCESSOR, content("tokenizer.json", "{}"), "repo: the tokenizer's files can't be read"),
    "a tokenizer of bytes": (PROCESSOR, content("tokenizer.json", b"\xff\x00"), "the tokenizer's files can't be read"),
    "a tokenizer nested too deeply": (
        PROCESSOR,
        content("tokenizer.json", nested(100_000)),
        "the tokenizer's files can't be read",
    ),
    "no tokenizer": (PROCESSOR, lambda repo: (repo / "tokenizer.json").unlink(), "the tokenizer's files can't be read"),
    "ids below zero": (
        PROCESSOR,
        tokenizer(lambda values: values["model"]["vocab"].update(evil=-1)),
        "the tokenizer's files can't be read",
    ),
    "tokenizer settings nested too deeply": (
        PROCESSOR,
        content("tokenizer_config.json", nested(100_000)),
        "the tokenizer's files can't be read",
    ),
    "tokenizer settings in a list": (PROCESSOR, content("tokenizer_config.json", "[]"), "tokenizer's files can't be"),
    "a string for the longest text": (
        PROCESSOR,
        tokenizer_config(model_max_length="x"),
        "not a FLIP processor's files",
    ),
    "no padding": (PROCESSOR, tokenizer_config(pad_token=None), "has no padding token"),
    "code for an unknown tokenizer": (
        PROCESSOR,
        both(code, tokenizer_config(tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil.Evil"]})),
        "auto_map names custom code, which is never run",
    ),
    "code of another repository": (
        PROCESSOR,
        tokenizer_config(tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil/repo--evil.Evil"]}),
        "auto_map names custom code, which is never run",
    ),
    "a model for a tokenizer": (
        PROCESSOR,
        both(only_pickled, tokenizer_config(tokenizer_class="BertModel")),
        "tokenizer_class='BertModel' is not a tokenizer",
    ),
    "a retriever for a tokenizer": (
        PROCESSOR,
        tokenizer_config(tokenizer_class="RagRetriever"),
        "tokenizer_class='RagRetriever' is not a tokenizer",
    ),
    "a tokenizer of another folder": (
        PROCESSOR,
        both(
            lambda repo: shutil.copy(repo / "tokenizer.json", repo.parent / "tokenizer.4.0.0.json"),
            tokenizer_config(fast_tokenizer_files=["../tokenizer.4.0.0.json"]),
        ),
        "fast_tokenizer_files names '../tokenizer.4.0.0.json', which is not in the same folder",
    ),
    "a number for a tokenizer": (PROCESSOR, tokenizer_config(tokenizer_class=5), "the tokenizer's files can't be read"),
}


@pytest.mark.parametrize(
    ("loader", "name"), [(loader, name) for name, (loaders, _, _) in REFUSALS.items() for loader in loaders]
)
def test_it_is_refused(loads, peak_bytes, repo, loader, name):
    _, spoil, message = REFUSALS[name]
    spoil(repo)
    result = loads(loader, repo)
    assert result["error"] in ("ValueError", "InputError", "OSError"), result["message"]
    assert re.search(message, result["message"]), result["message"]
    assert result["seconds"] < MOST_SECONDS
    assert result["peak_bytes"] - peak_bytes < MOST_BYTES
    assert_harmless(result, repo)


HARMLESS = {
    "nothing": (EVERYTHING, lambda repo: None),
    "a pickle beside the weights": (EVERYTHING, pickled()),
    "weights behind a link": (MODEL, behind_a_link),
    "code for the models": (
        EVERYTHING,
        both(code, config(auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})),
    ),
    "code for a text encoder of transformers": (
        ("FlipConfig", *MODELS),
        both(code, text_config(auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})),
    ),
    "code for the processor": (PROCESSOR, both(code, processor_config(auto_map={"AutoProcessor": "evil.Evil"}))),
    "code for a tokenizer of transformers": (
        PROCESSOR,
        both(code, tokenizer_config(auto_map={"AutoTokenizer": [None, "evil.Evil"]})),
    ),
    "the name of another vocabulary": (PROCESSOR, processor_config(vocabulary="../neighbour")),
    "the name of another tokenizer": (PROCESSOR, tokenizer_config(**dict.fromkeys(TOKENIZER_FILES, "../neighbour"))),
    "a template that reaches for Python": (PROCESSOR, tokenizer_config(chat_template="{{ ''.__class__.__mro__ }}")),
    "a tokenizer that pads to 10^12": (
        PROCESSOR,
        tokenizer(
            lambda values: values.update(
                padding={
                    "strategy": {"Fixed": 10**12},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "[PAD]",
                }
            )
        ),
    ),
    "an objective that is not read": (MODEL, config(objectives={"evil": 1.0})),
    "attention that is transformers' own": (MODEL, config(attn_implementation="eager")),
}


@pytest.mark.parametrize(
    ("loader", "name"), [(loader, name) for name, (loaders, _) in HARMLESS.items() for loader in loaders]
)
def test_it_loads_and_does_nothing_else(loads, repo, loader, name):
    HARMLESS[name][1](repo)
    result = loads(loader, repo)
    assert result["error"] is None, result["message"]
    assert_harmless(result, repo)


@pytest.mark.parametrize(
    ("act", "seen"),
    [
        ("read_pickle", lambda result, repo: (repo / "canary").exists() and "os.system" in str(result["forbidden"])),
        ("take_memory", lambda result, repo: result["error"] == "MemoryError"),
        ("ask_network", lambda result, repo: "socket.connect" in str(result["forbidden"])),
        ("open_neighbour", lambda result, repo: str(repo.parent / "neighbour") in result["opened"]),
    ],
)
def test_what_must_not_happen_would_be_seen(loads, repo, act, seen):
    pickled()(repo)
    assert seen(loads(act, repo), repo)


def test_a_broken_byte_or_setting_is_an_error_or_nothing(loads, repo, good):
    """Random damage to every file: whatever it is, it gets an error that can be shown, or does no harm."""
    draw = np.random.default_rng(0)
    values = [None, True, -1, 0, 2**63, 1.5, float("nan"), "x", "", [], {}, [1], {"a": 1}, "\x1b[31m", "../neighbour"]
    files = dict.fromkeys(("processor_config.json", "tokenizer.json", "tokenizer_config.json"), "FlipProcessor")
    files |= {"vocabulary.parquet": "FlipProcessor", "config.json": "FlipForCTR", "model.safetensors": "FlipForCTR"}
    refused = 0
    for file, loader in [*files.items()] * 8:
        data = (good / file).read_bytes()
        if file.endswith(".json"):
            damaged = json.loads(data)
            place = damaged
            key = _any_key(place, draw)
            while _is_filled(place[key]) and draw.random() < 0.7:
                place = place[key]
                key = _any_key(place, draw)
            place[key] = values[draw.integers(len(values))]
            (repo / file).write_text(json.dumps(damaged))
        else:
            damaged = bytearray(data)
            # The head of the weights says what they are.
            for place in draw.integers(min(len(data), 6000), size=draw.integers(1, 9)):
                damaged[place] = draw.integers(256)
            (repo / file).write_bytes(damaged)
        result = loads(loader, repo)
        assert result["error"] in (None, "ValueError", "InputError", "OSError"), (file, damaged, result["message"])
        assert result["seconds"] < MOST_SECONDS, (file, damaged)
        assert_harmless(result, repo)
        refused += result["error"] is not None
        (repo / file).write_bytes(data)
    assert 24 < refused < 48


def _any_key(values, draw):
    keys = list(values) if isinstance(values, dict) else range(len(values))
    return keys[draw.integers(len(keys))]


def _is_filled(value):
    return isinstance(value, dict | list) and len(value) > 0


def test_a_repository_in_the_hubs_cache_is_looked_at_too(good, tmp_path):
    """Its files are links, and the folder is not the name."""
    revision = "0" * 40
    repository = tmp_path / "models--org--flip"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(good, repository / "blobs")
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    where = {"cache_dir": tmp_path, "local_files_only": True}
    expected = FlipForCTR.from_pretrained(good).state_dict()
    loaded = FlipForCTR.from_pretrained("org/flip", **where).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert FlipProcessor.from_pretrained("org/flip", **where).label == "label"
    field(0, num_features=10**12)(repository / "blobs")
    with pytest.raises(ValueError, match=f"org/flip: {LARGER}"):
        FlipForCTR.from_pretrained("org/flip", **where)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"org/flip: found no model\.safetensors"):
        FlipForCTR.from_pretrained("org/flip", **where)


def test_ids_of_another_model_are_refused(good, repo):
    """A processor that was exchanged for another one agrees with itself; it is found out where the two meet."""
    log = {"user_id": [str(i) for i in range(50)], "title": ["a"] * 50, "tags": [["x"]] * 50}
    fields = ["user_id", "title", FieldConfig("tags", kind="sequence", max_values=3)]
    FlipProcessor.fit(log, fields, FlipProcessor.from_pretrained(good).tokenizer).save_pretrained(repo)
    rows = {"user_id": ["49"], "title": ["a"], "tags": [["x"]]}
    inputs = FlipProcessor.from_pretrained(repo)(rows, return_tensors="pt")
    with pytest.raises(ValueError, match=r"outside its field's range .*; encode the rows with the processor"):
        FlipForCTR.from_pretrained(repo)(**inputs)


@pytest.mark.parametrize("name", ["\x1b[2Jevil", "a\x07b", "\u202eevil", "a\nInputError: all is well", "\x9b31m"])
def test_names_and_values_do_not_steer_the_terminal(name, wordpiece, caplog, tmp_path):
    shown = name.encode("unicode_escape").decode()
    with pytest.raises(InputError) as caught:
        FlipProcessor.fit({name: [2.5], "b": [1]}, [FieldConfig(name), "b"], wordpiece, source=f"{name}.csv")
    assert str(caught.value).isprintable()
    assert shown in str(caught.value)
    with pytest.raises(ValueError, match="fields named twice") as caught:
        FlipConfig(fields=[name, name])
    assert str(caught.value).replace("\n", "").isprintable()
    processor = FlipProcessor.fit({"b": ["1", "2"]}, ["b"], wordpiece)
    processor({"b": ["1"], name: ["x"]})
    assert shown in caplog.text
    assert name not in caplog.text


def test_markup_in_a_name_is_shown_as_it_is(wordpiece):
    with pytest.raises(InputError, match=r"field '<script>alert\(1\)</script>', row 0, value 2.5"):
        FlipProcessor.fit({"<script>alert(1)</script>": [2.5]}, ["<script>alert(1)</script>"], wordpiece)


@pytest.mark.parametrize(
    "text",
    [
        "data: !!python/object/apply:os.system ['touch {canary}']",
        "model: {{options: {{x: {{class_path: os.system, init_args: {{command: touch {canary}}}}}}}}}",
        "model: {{options: {{x: {{class_path: pandas.read_pickle, init_args: {{filepath_or_buffer: {pickle}}}}}}}}}",
        "model: {{options: {{x: {{class_path: antigravity.Evil}}}}}}",
        "data: {{fields: [{{class_path: antigravity.Evil}}]}}",
        "data: {{class_path: antigravity.Evil}}",
        "data: antigravity.Evil",
        "model: {{class_path: subprocess.Popen, init_args: {{args: [touch, {canary}]}}}}",
    ],
)
def test_a_file_of_settings_runs_and_imports_nothing(tmp_path, monkeypatch, text):
    (tmp_path / "antigravity.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    (tmp_path / "run.yaml").write_text(text.format(canary=tmp_path / "canary", pickle=tmp_path / "pickle"))
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    try:
        run = parse_run(FinetuneSettings, arguments)
    except (SystemExit, ImportError, ValueError):
        run = None
    assert not (tmp_path / "canary").exists()
    # What is not refused stays what it is, a setting.
    assert run is None or "class_path" in json.dumps([run.model.options, run.data.fields])
