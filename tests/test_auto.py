"""After `import flip_hf` transformers finds FLIP."""

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
    pipeline,
)

import flip_hf
from flip_hf import FlipConfig, FlipForCTR, FlipForPreTraining, FlipModel, FlipProcessor

ROW = {"user_id": 3, "gender": "M", "age": 20, "title": "42", "genre": "drama"}


@torch.no_grad()
def logit(model, processor):
    return model(**processor([ROW], return_tensors="pt")).logits.item()


@pytest.fixture(scope="module")
def expected(ctr_folder):
    return logit(FlipForCTR.from_pretrained(ctr_folder), FlipProcessor.from_pretrained(ctr_folder))


def run(program, folder):
    """What a program in a process of its own prints, as JSON; it gets the folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(flip_hf.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_auto_classes_find_flip(ctr_folder, expected):
    assert type(AutoConfig.from_pretrained(ctr_folder)) is FlipConfig
    processor = AutoProcessor.from_pretrained(ctr_folder)
    assert type(processor) is FlipProcessor
    model = AutoModelForSequenceClassification.from_pretrained(ctr_folder)
    assert type(model) is FlipForCTR
    assert logit(model, processor) == pytest.approx(expected, abs=1e-6)
    alone = AutoModelForSequenceClassification.from_pretrained(ctr_folder, mode="id")
    assert (alone.config.mode, alone.flip.text_model) == ("id", None)
    assert type(AutoModel.from_pretrained(ctr_folder)) is FlipModel
    assert type(AutoModelForPreTraining.from_pretrained(ctr_folder)) is FlipForPreTraining
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


def test_auto_classes_find_flip_in_a_new_process(ctr_folder, expected):
    names, probability = run(AFTER_FLIP_HF % ROW, ctr_folder)
    assert names == [
        "flip_hf.configuration_flip.FlipConfig",
        "flip_hf.towers.FlipModel",
        "flip_hf.modeling_flip.FlipForCTR",
        "flip_hf.processing_flip.FlipProcessor",
    ]
    assert probability == pytest.approx(torch.tensor(expected).sigmoid().item(), abs=1e-6)
    assert pipeline("ctr-prediction", model=ctr_folder)(ROW)["probability"] == pytest.approx(probability, abs=1e-6)


LAZY = """
import json, sys
import flip_hf

heavy = ["transformers.trainer", "flip_hf.training.trainer"]
before = [name for name in heavy if name in sys.modules]
from flip_hf import FlipTrainer, add_history, push_to_hub

names = [f"{x.__module__}.{x.__name__}" for x in (FlipTrainer, add_history, push_to_hub)]
listed = sorted({"FlipTrainer", "add_history", "push_to_hub", "FlipForCTR"} - set(dir(flip_hf)))
print(json.dumps([before, names, [name for name in heavy if name in sys.modules], listed]))
"""


def test_importing_the_package_leaves_trainer_and_hub_for_later(ctr_folder):
    before, names, after, unlisted = run(LAZY, ctr_folder)
    assert before == []
    assert names == [
        "flip_hf.training.trainer.FlipTrainer",
        "flip_hf.data.history.add_history",
        "flip_hf.hub.push.push_to_hub",
    ]
    assert after == ["transformers.trainer", "flip_hf.training.trainer"]
    assert unlisted == []
    with pytest.raises(AttributeError, match="module 'flip_hf' has no attribute 'FlipTrainers'"):
        _ = flip_hf.FlipTrainers
