"""What the tests have a client do, in a process of its own: the Hub's client reads its settings when it is imported."""

import json
from pathlib import Path
from typing import Any


def push(folder: str, repo_id: str, **settings: Any) -> str:
    """Pushes a folder as it is and returns the commit, or the error as text."""
    from flip_hf.hub import push as module

    # The seconds between attempts, as milliseconds.
    module.WAITS_SECONDS = tuple(seconds / 1000 for seconds in (1, 2, 4, 8, 16, 32))
    repo = module.HubRepo(repo_id, **settings)
    try:
        repo.prepare()
        return repo.push(Path(folder), "A push")
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def push_model(model: str, repo_id: str, **settings: Any) -> str:
    """`push_to_hub` of a saved model."""
    from flip_hf import FlipForCTR, FlipProcessor
    from flip_hf.hub import push_to_hub

    parts = {"model": FlipForCTR.from_pretrained(model), "processor": FlipProcessor.from_pretrained(model)}
    return push_to_hub(repo_id, **parts, **settings)


def push_apart(model: str, repo_id: str, **settings: Any) -> list[Any]:
    """Pushes a saved model and its processor as transformers' users do, one after the other; commits and warnings."""
    import logging

    from flip_hf import FlipForCTR, FlipProcessor

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("flip_hf.hub.push").addHandler(handler)
    parts = [FlipForCTR.from_pretrained(model), FlipProcessor.from_pretrained(model)]
    return [*(part.push_to_hub(repo_id, **settings) for part in parts), told]


def push_together(model: str, repo_id: str, record: Any = None, **settings: Any) -> str:
    """`model.push_to_hub` of a saved model with its processor; the commit, or the error as text."""
    from flip_hf import FlipForCTR, FlipProcessor

    processor = FlipProcessor.from_pretrained(model)
    try:
        return FlipForCTR.from_pretrained(model).push_to_hub(repo_id, processor=processor, record=record, **settings)
    except (OSError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def push_pipeline(model: str, repo_id: str) -> str:
    """A pipeline's `push_to_hub`."""
    from transformers import pipeline

    import flip_hf  # noqa: F401

    return pipeline("ctr-prediction", model=model).push_to_hub(repo_id)


def push_trainer(model: str, folder: str, **settings: Any) -> list[Any]:
    """`FlipTrainer.push_to_hub` of a saved model: the commit, or the error as text, and the repository's name."""
    from transformers import TrainingArguments

    from flip_hf import FlipForCTR, FlipProcessor, FlipTrainer

    processor = FlipProcessor.from_pretrained(model)
    arguments = TrainingArguments(folder, use_cpu=True, report_to="none", hub_private_repo=True)
    trainer = FlipTrainer(FlipForCTR.from_pretrained(model), arguments, processing_class=processor)
    trainer.save_model()
    try:
        return [trainer.push_to_hub(**settings), trainer.hub_model_id]
    except ValueError as error:
        return [f"{type(error).__name__}: {error}", trainer.hub_model_id]


def train_and_push(model: str, folder: str, rows: str) -> str:
    """Trains on a file's rows with `push_to_hub=True`, which pushes at each checkpoint; the repository's name."""
    from transformers import TrainingArguments

    from flip_hf import FlipForCTR, FlipProcessor, FlipTrainer

    arguments = TrainingArguments(
        folder, use_cpu=True, report_to="none", max_steps=2, save_steps=1, push_to_hub=True, disable_tqdm=True
    )
    processor = FlipProcessor.from_pretrained(model)
    trainer = FlipTrainer(FlipForCTR.from_pretrained(model), arguments, train_dataset=rows, processing_class=processor)
    trainer.train()
    return str(trainer.hub_model_id)


def weights(name: str) -> dict[str, Any]:
    """Of a model by name, as lists."""
    from flip_hf import FlipForCTR

    return {key: value.tolist() for key, value in FlipForCTR.from_pretrained(name).state_dict().items()}


LOGITS = """
import json, sys
import torch
from flip_hf import FlipForCTR, FlipProcessor
name, settings, rows = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
processor = FlipProcessor.from_pretrained(name, **settings)
model = FlipForCTR.from_pretrained(name, **settings).eval()
with torch.no_grad():
    print(json.dumps(model(**processor(rows, return_tensors="pt")).logits.tolist()))
"""
"""A program: the logits of rows, from a model by name."""

PIPELINE = """
import json, sys
from transformers import pipeline
name, settings, rows = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
assert "flip_hf" not in sys.modules
clicks = pipeline("ctr-prediction", model=name, trust_remote_code=True, **settings)
print(json.dumps([found["probability"] for found in clicks(rows)]))
"""
"""A program that does not import flip_hf itself: the probabilities of rows."""


def parse(output: str) -> Any:
    """What a program printed last."""
    return json.loads(output.splitlines()[-1])
