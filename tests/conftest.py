"""Tokenizers, a small click log and a processor, all made in memory."""

import json
import random
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from finetuned import finetuned
from hypothesis import Phase, settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

from flip_hf import FlipConfig, FlipForCTR, FlipProcessor

# For tests/mutants.py: the same few examples in each run, and no search for the smallest one that fails.
settings.register_profile(
    "mutants",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],
)

# A shell starts what it runs in the background deaf to Ctrl-C, and with it all programs that the tests interrupt.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

CORPUS = [
    "user id is 1234567890 . title is the film number 42 ! kind is drama comedy missing new , ( ) a film",
    "gender is m f . age is 24 53 . it's a wonderful life (1946) ; amélie : cité des enfants perdus - heat & fargo",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ [ ] < > / ? \" ' # @ mask sep cls pad",
] * 10


@pytest.fixture(scope="session")
def wordpiece():
    """Like BERT's: lower case, accents stripped, punctuation apart."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, mask_token="[MASK]", model_max_length=128)


@pytest.fixture(scope="session")
def byte_bpe():
    """Like RoBERTa's: bytes, spaces as part of the word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, mask_token="<mask>", model_max_length=128)


@pytest.fixture(scope="session")
def unigram():
    """Like SentencePiece's in XLM-RoBERTa: words cut at spaces, each with its space in front."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, mask_token="<mask>", model_max_length=128)


@pytest.fixture(scope="session")
def click_rows():
    """A small log as a dict of columns: 300 rows, with missing values, punctuation and accents."""
    draw = random.Random(0)
    titles = ["Kolya (1996)", "Amélie: cité!", "It's a wonderful life", "Heat & Fargo", "42"]
    rows = [
        {
            "user_id": draw.randrange(40),
            "gender": draw.choice(["M", "F", None]),
            "age": draw.randrange(18, 60),
            "title": draw.choice(titles),
            "genre": draw.choice(["drama", "comedy", "drama, comedy"]),
            "label": draw.randrange(2),
        }
        for _ in range(300)
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture(scope="session")
def field_names(click_rows):
    return [name for name in click_rows if name != "label"]


@pytest.fixture
def processor(click_rows, field_names, wordpiece):
    return FlipProcessor.fit(click_rows, field_names, wordpiece, label="label")


@pytest.fixture(scope="session")
def ctr_folder(tmp_path_factory, click_rows, field_names, wordpiece):
    """A small joint model, saved with its processor; not to be written to."""
    folder = tmp_path_factory.mktemp("ctr") / "model"
    processor = FlipProcessor.fit(click_rows, field_names, wordpiece, label="label")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = BertConfig(**size, vocab_size=len(wordpiece))
    torch.manual_seed(0)
    model = finetuned(FlipForCTR(FlipConfig(text_config=text, fields=processor.fields, embedding_dim=4)))
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, wordpiece):
    """A folder with a text encoder, three files of a click log and a configuration."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    AutoModel.from_config(BertConfig(**size, vocab_size=len(wordpiece))).save_pretrained(folder / "encoder")
    wordpiece.save_pretrained(folder / "encoder")

    draw = random.Random(0)
    users = {u: draw.random() for u in range(30)}
    items = {i: draw.random() for i in range(40)}

    def table(num_rows):
        picked = [(draw.choice(list(users)), draw.choice(list(items))) for _ in range(num_rows)]
        return pa.table(
            {
                "user_id": [u for u, _ in picked],
                "title": [f"the film number {i}!" for _, i in picked],
                "kind": [["drama", "comedy", None][i % 3] for _, i in picked],
                "clicked": [int(users[u] + items[i] > 1) for u, i in picked],
            }
        )

    for name, rows in (("train", 400), ("validation", 120), ("test", 120)):
        pq.write_table(table(rows), folder / f"{name}.parquet")
    config = {
        "data": {
            **{f"{name}_file": str(folder / f"{name}.parquet") for name in ("train", "validation", "test")},
            "fields": ["user_id", {"name": "title", "max_tokens": 8}, "kind"],
            "label": "clicked",
        },
        "model": {
            "text_encoder": str(folder / "encoder"),
            "text_layers": 1,
            "options": {"embedding_dim": 8, "projection_dim": 16, "backbone_options": {"hidden_sizes": [16]}},
        },
        "training": {"per_device_train_batch_size": 32, "logging_steps": 5, "learning_rate": 0.01},
    }
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder
