"""Model cards: written from the record alone, whatever the columns are called."""

import copy
import functools
import json

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from records import make_record

from flip_hf.data.sources import DATASETS
from flip_hf.hub.card import is_untouched, public_record, render_card

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</details><script>alert(1)</script>",
    "a | b | c",
    "x\n---\nlicense: mit\n---\n# Owned",
    "```\n# out of the fence",
    "{{ record.settings }}{% raw %}",
    "[click](javascript:alert(1)) ![](https://evil.example/p.png) <https://evil.example>",
    "&lt;b&gt; \\| ** __ ~~ $x$",
    "'\"}}; import os  # !!python/object/apply:os.system",
    "‮gnp.\x00\x1b[31m",
]


@pytest.fixture
def record():
    return make_record()


def parts(card):
    """Metadata, and the body as the tokens that a Markdown reader finds in it."""
    _, metadata, body = card.split("---\n", 2)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    return yaml.safe_load(metadata), [t for token in tokens for t in [token, *(token.children or [])]]


def test_the_card_says_what_the_record_says(record):
    record["settings"]["fusion_rows"] = "validation"
    card = render_card(record, "org/name", {"curves.png": "Curves"})
    assert "kept, and the weights of the towers' logits were fitted on these rows. The 1,234 test rows were" in card
    metadata, tokens = parts(card)
    assert metadata["library_name"] == "flip_hf"
    assert metadata["base_model"] == "org/encoder"
    (index,) = metadata["model-index"]
    (result,) = index["results"]
    assert result["dataset"]["args"] == {"fingerprint": "cc"}
    found = {metric["type"]: metric for metric in result["metrics"]}
    assert found["auc"]["value"] == pytest.approx(0.748)
    assert found["auc"]["args"] == {"interval": [0.741, 0.7555], "level": 0.95}
    assert set(found) == set(record["result"]["test"])

    cells = [token.content for token in tokens if token.type == "inline"]
    for said in ("AUC of the text encoder", "0.7480", "0.7410 to 0.7555", "1,234", "user\\_id", "1,000,000"):
        assert said in cells, said
    assert "60 steps (stopped early), best model after step 50; 2 min 05 s, 12.5 rows/s" in card
    assert "2 processes, bf16 autocast; resumed after step 40" in card
    assert "![Curves](curves.png)" in card
    assert "come from one training run with one seed (3)" in card


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_metric_without_a_value_leaves_its_cells_empty(record, nothing):
    for split in ("validation", "test"):
        record["result"][split] |= {"auc": nothing, "text_auc": nothing}
    record["result"]["test_intervals"]["auc"] = [nothing, nothing]
    card = render_card(record, "org/name", {})
    assert "| AUC |  |  |  |" in card
    assert "| LogLoss | 0.4980 | 0.4800 to 0.5200 | 0.5000 |" in card
    (index,) = parts(card)[0]["model-index"]
    assert {metric["type"] for metric in index["results"][0]["metrics"]} == {"logloss", "ece", "id_auc"}


def test_a_card_without_test_rows_says_so(record):
    for name in ("test", "test_rows", "test_intervals"):
        del record["result"][name]
    del record["data"]["rows"]["test"], record["data"]["fingerprints"]["test"]
    card = render_card(record, "org/name", {})
    assert "No test rows were given" in card
    assert "95% interval" not in card
    assert "model-index" not in parts(card)[0]


def test_a_card_says_what_the_groups_are(record):
    assert "weighs groups" not in render_card(record, "org/name", {})
    grouped = {"gauc": 0.625, "uauc": 0.6, "id_gauc": 0.61, "id_uauc": 0.59, "text_gauc": 0.58, "text_uauc": 0.57}
    for split in ("validation", "test"):
        record["result"][split] |= grouped
    record["settings"]["data"]["group_field"] = "user_id"
    card = render_card(record, "org/name", {})
    assert "| GAUC | 0.6250 |  | 0.6250 |\n| UAUC | 0.6000 |  | 0.6000 |\n| GAUC of the ID-based model | 0.61" in card
    assert (
        "GAUC and UAUC are means of the AUCs within groups of rows with the same user\\_id: GAUC weighs groups by "
        "their number of rows" in card
    )
    (index,) = parts(card)[0]["model-index"]
    assert {"gauc", "uauc"} <= {metric["type"] for metric in index["results"][0]["metrics"]}


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("random", "Split: random, 8:1:1, seed 4."),
        ("months", "Split: months."),
        ("item", "Split: item, 8:1:1 of the items (all rows of an item are in the same split), seed 4."),
    ],
)
def test_a_card_says_how_a_named_dataset_was_split(record, split, said):
    source = DATASETS["movielens-1m"]
    record["data"] |= {"source": source.name, "split": split, "split_seed": 4, "histories": []}
    record["data"]["dataset"] = {
        name: getattr(source, name) for name in ("name", "description", "homepage", "licence", "citation")
    }
    assert f"\n{said}\n" in render_card(record, "org/name", {})


def test_a_card_names_the_data_set_that_files_hold(record):
    assert parts(render_card(record, "o/n", {}))[0]["model-index"][0]["results"][0]["dataset"]["name"] == (
        "files of the user's own"
    )
    record["data"]["name"] = "ml1m-months"
    card = render_card(record, "org/name", {})
    (result,) = parts(card)[0]["model-index"][0]["results"]
    assert (result["dataset"]["name"], result["dataset"]["type"]) == ("ml1m-months", "ml1m-months")
    assert "\nml1m-months, from the user's own files: train.parquet, validation.parquet, test.parquet.\n" in card


def test_a_card_names_the_towers(record):
    assert "RecSys 2024): an ID-based model and a text encoder, whose" in render_card(record, "org/name", {})
    record["model"] |= {"mode": "text", "text_towers": None}
    assert "RecSys 2024): a text encoder." in render_card(record, "org/name", {})
    aligned = {**record, "pretraining": make_record()}
    assert "RecSys 2024): the text encoder of an aligned pair \\(FLIP\\_PLM\\)." in render_card(aligned, "org/name", {})
    record["model"]["text_towers"] = [["user_id"], ["title"]]
    assert "RecSys 2024): a text encoder that encodes groups of fields" in render_card(record, "o/n", {})
    record["model"]["mode"] = "joint"
    assert "RecSys 2024): an ID-based model and a text encoder that encodes" in render_card(record, "o/n", {})
    record["model"]["mode"] = "id"
    assert "RecSys 2024): an ID-based model." in render_card(record, "org/name", {})


def test_pretraining_is_told_beside_finetuning(record):
    pretraining = copy.deepcopy(record) | {"task": "pretraining"}
    pretraining["result"] = {"validation": {"loss": 3.25, "mlm_loss": 1.5}, "best_step": 7, "steps": 9,
                             "stopped_early": False, "rows_per_second": 1.0}  # fmt: skip
    alone = render_card(pretraining, "org/name", {})
    assert "| mlm loss | 1.5000 |" in alone
    assert "It can't predict clicks yet" in alone
    both = render_card(record | {"pretraining": pretraining}, "org/name", {})
    assert "Pretraining: 9 steps, best model after step 7" in both
    assert "Finetuning: 60 steps" in both


@pytest.mark.parametrize("text", HOSTILE)
def test_names_from_strangers_have_no_effect(record, text):
    record["model"]["fields"] = [{"name": text, "kind": "categorical", "features": 5}]
    record["model"]["text_base_model"] = text
    record["data"] |= {"name": text, "files": [text]}
    record["settings"]["data"] = {"fields": [text], text: text, "group_field": text}
    record["result"]["validation"]["gauc"] = 0.5
    card = render_card(record, "org/name", {})
    plain = render_card(record_of("plain", record, text), "org/name", {})
    metadata, tokens = parts(card)
    expected, plain_tokens = parts(plain)
    # The metadata name the data set.
    dataset = metadata["model-index"][0]["results"][0]["dataset"]
    assert dataset["name"] == dataset["type"] == " ".join("".join(c if c.isprintable() else " " for c in text).split())
    dataset |= {"name": "plain", "type": "plain"}
    assert {k: v for k, v in metadata.items() if k != "base_model"} == {
        k: v for k, v in expected.items() if k != "base_model"
    }
    # Not one heading, link, picture, tag or cell more than with a plain name.
    assert [t.type for t in tokens if t.type not in SMALL] == [t.type for t in plain_tokens if t.type not in SMALL]
    allowed = ("<details><summary>", "</details>", "<!-- flip_hf wrote this card", "<https://")
    html = [t.content for t in tokens if t.type in ("html_block", "html_inline")]
    assert all(content.strip().startswith(allowed) for content in html), html


SMALL = {"text", "text_special", "softbreak", "entity"}


def record_of(name, record, text):
    """The record with another name in the place of the text."""
    return json.loads(json.dumps(record).replace(json.dumps(text)[1:-1], name))


@functools.cache
def a_card():
    return render_card(make_record(), "org/name", {})


@given(where=st.integers(0, 10_000), what=st.sampled_from("xyz \n"))
@example(where=a_card().index("wrote this card; ") + len("wrote this card; "), what="x")
def test_a_card_that_was_edited_is_known(where, what):
    card = a_card()
    assert is_untouched(card)
    assert not is_untouched(card[:where] + what + card[where:])


def test_no_path_of_the_machine_gets_out(record):
    public = public_record(record)
    assert "alice" not in json.dumps(public)
    assert "secret-project" not in json.dumps(public)
    assert public["settings"]["data"]["train_file"] == "train.parquet"
    assert public["command"] == ["finetune.py", "--output_dir=run", "a.yaml"]
    assert "alice" not in render_card(record, "org/name", {})
