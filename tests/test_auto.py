"""transformers finds FLIP: after `import flip_hf`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoProcessor,
    BertConfig,
    pipeline,
)

import flip_hf
from flip_hf import FlipConfig, FlipForCTR, FlipForPreTraining, FlipModel, FlipProcessor

ROW = {"user_id": 3, "gender": "M", "age": 20, "title": "42", "genre": "drama"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, click_rows, field_names, wordpiece):
    """A saved model with its processor."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    processor = FlipProcessor.fit(click_rows, field_names, wordpiece, label="label")
    text = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=len(wordpiece)
    )
    torch.manual_seed(0)
    model = FlipForCTR(FlipConfig(text_config=text, fields=processor.fields, embedding_dim=4))
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


@torch.no_grad()
def logit(model, processor):
    return model(**processor([ROW], return_tensors="pt")).logits.item()


@pytest.fixture(scope="module")
def expected(folder):
    return logit(FlipForCTR.from_pretrained(folder), FlipProcessor.from_pretrained(folder))


def run(program, folder):
    """What a program in a process of its own prints, as JSON; it finds the package and the folder, and no cache."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(flip_hf.__file__).parents[1]),
        "HF_HOME": str(folder.parent / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_auto_classes_find_flip(folder, expected):
    assert type(AutoConfig.from_pretrained(folder)) is FlipConfig
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is FlipProcessor
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model) is FlipForCTR
    assert logit(model, processor) == pytest.approx(expected, abs=1e-6)
    alone = AutoModelForSequenceClassification.from_pretrained(folder, mode="id")
    assert (alone.config.mode, alone.flip.text_model) == ("id", None)
    assert type(AutoModel.from_pretrained(folder)) is FlipModel
    assert type(AutoModelForPreTraining.from_pretrained(folder)) is FlipForPreTraining
    assert type(AutoModelForPreTraining.from_config(model.config)) is FlipForPreTraining


# Above, transformers was imported before the package; here it is imported after, and nothing of the package is named.
AFTER_FLIP_HF = """
import json, sys
import flip_hf
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor, pipeline

folder, row = sys.argv[1], %r
classes = AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor
found = [cls.from_pretrained(folder) for cls in classes]
probability = pipeline("ctr-prediction", model=folder)(row)["probability"]
print(json.dumps([[f"{type(x).__module__}.{type(x).__name__}" for x in found], probability]))
"""


def test_auto_classes_find_flip_in_a_new_process(folder, expected):
    names, probability = run(AFTER_FLIP_HF % ROW, folder)
    assert names == [
        "flip_hf.configuration_flip.FlipConfig",
        "flip_hf.modeling_flip.FlipModel",
        "flip_hf.modeling_flip.FlipForCTR",
        "flip_hf.processing_flip.FlipProcessor",
    ]
    assert probability == pytest.approx(torch.tensor(expected).sigmoid().item(), abs=1e-6)
    assert pipeline("ctr-prediction", model=folder)(ROW)["probability"] == pytest.approx(probability, abs=1e-6)
