"""Times finetuning steps of both towers: the package's own step, and a plain loop over the same model.

python benchmarks/finetune_step.py

The plain loop takes rows in their order, pads them to the longest text of all, and computes in single precision with
transformers' attention, and torch's dropout and AdamW.
"""

import argparse
import copy
from typing import Any

import torch
from accelerate.utils import send_to_device
from ceilings import device
from pretrain_step import PackageStep, compare
from torch import nn

from flip_hf import FlipCTRCollator, FlipForCTR
from flip_hf.data.sampling import text_lengths
from flip_hf.fetch import minilm
from flip_hf.nn.dropout import ByteDropout
from flip_hf.runs.build import fit_processor, new_model
from flip_hf.runs.data import load_click_log
from flip_hf.runs.settings import DataSettings, ModelSettings
from flip_hf.training.optimization import parameter_groups
from flip_hf.training.settings import TrainingSettings


class PlainStep:
    """A straightforward training loop, without optimisations."""

    def __init__(self, model: Any, rows: Any, collator: FlipCTRCollator, training: TrainingSettings) -> None:
        self.model, self.rows, self.collator, self.training = model.to(device()), rows, collator, training
        for parent in model.modules():
            for name, child in parent.named_children():
                if type(child) is ByteDropout:
                    setattr(parent, name, nn.Dropout(child.p))
        collator.pad_to_multiple_of = int(text_lengths(rows).max())
        self.text_model: Any = model.flip.text_model
        self.optimizer = torch.optim.AdamW(parameter_groups(model, training))

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        size = self.training.per_device_train_batch_size
        first = number * size % (len(self.rows) - size)
        return self.collator(self.rows[list(range(first, first + size))])

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        self.model.train()
        self.model(**send_to_device(batch, device())).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=3, help="layers of MiniLM")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="steps per side")
    arguments = parser.parse_args()
    log = load_click_log(DataSettings(source="movielens-100k", max_train_rows=16384))
    settings, training = (
        ModelSettings(text_layers=arguments.layers),
        TrainingSettings(per_device_train_batch_size=arguments.batch_size),
    )
    minilm()
    processor = fit_processor(log, settings)
    rows = log.encode(processor, "train").with_format("arrow")
    model = new_model(FlipForCTR, settings, processor)
    sides: dict[str, Any] = {
        "plain loop": PlainStep(copy.deepcopy(model), rows, FlipCTRCollator.from_model(processor, model), training),
        "ours": PackageStep(model, rows, FlipCTRCollator.from_model(processor, model), training),
    }
    compare("finetune_step", sides, arguments.batch_size, arguments.steps)


if __name__ == "__main__":
    main()
