"""What the programs share: their arguments, a tiny model without dropout, and batches of a small click log."""

import atexit
import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset

from flip_hf import FlipConfig, FlipCTRCollator, FlipForPreTraining, FlipPretrainingCollator, FlipProcessor
from flip_hf.runs.device import leave_process_group
from flip_hf.runs.run import Run
from flip_hf.runs.settings import FinetuneSettings
from flip_hf.training.loop import Goal, train

ARGUMENTS = json.loads(sys.argv[1])
TEXT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@atexit.register
def _leave():
    # Models and optimisers hold the group. As where a script's `main` has returned, they go first, while the
    # interpreter is whole: a thread of the group that outlives it aborts the process.
    vars(sys.modules["__main__"]).clear()
    gc.collect()
    leave_process_group()


def check_processes():
    """The launch that silently runs one process is the usual way for such tests to test nothing."""
    assert num_processes() == ARGUMENTS["processes"]


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def report(values):
    """Hands numbers to the test, from process 0."""
    if rank() == 0:
        Path(ARGUMENTS["report"]).write_text(json.dumps(values))


def load_log():
    """The processor and the encoded rows."""
    processor = FlipProcessor.from_pretrained(ARGUMENTS["click_log"])
    rows = json.loads((Path(ARGUMENTS["click_log"]) / "rows.json").read_text())
    return processor, processor.encode_dataset(Dataset.from_dict(rows))


def build(cls, processor, dtype=torch.float32, **settings):
    """A model in which nothing is random: no dropout, and MTM scores all features of a field."""
    torch.manual_seed(0)
    settings = {"mtm_loss": "full_softmax", "head_dropout": 0.0, "backbone_options": {"dropout": 0.0}} | settings
    text = TEXT | {"vocab_size": len(processor.tokenizer)}
    config = FlipConfig(text_config=text, fields=processor.fields, embedding_dim=8, projection_dim=16, **settings)
    model = cls(config).to(dtype)
    if isinstance(model, FlipForPreTraining):
        model.set_feature_counts(processor.feature_counts)
    return model


def collator_of(cls, processor, mode="joint"):
    return FlipPretrainingCollator(processor, 0) if cls is FlipForPreTraining else FlipCTRCollator(processor, mode)


def train_in(folder, model, rows, settings, processor):
    """Runs the package's own loop without validation; what it ends with is saved as the best model."""
    run = Run(FinetuneSettings(output_dir=folder, training=settings))
    collator, goal = collator_of(type(model), processor), Goal("nothing", larger_is_better=True)
    return train(model, rows, collator, settings, run, goal, lambda *_: {"nothing": 0.0}, processor)


def difference(found, expected):
    """Of two lists of tensors, as vectors: the distance over the length, and the length of the one along the other."""
    a, b = (torch.cat([x.detach().double().flatten() for x in tensors]) for tensors in (found, expected))
    return ((a - b).norm() / b.norm()).item(), (a @ b / (b @ b)).item()
