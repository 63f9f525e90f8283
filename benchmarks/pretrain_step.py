"""Times pretraining steps of this package, and of our own code written to compute what the released code computes.

python benchmarks/pretrain_step.py --as-paper
python benchmarks/pretrain_step.py --batch_size 256 --layers 1

Both sides take the same rows of MovieLens-100K, the same layers of MiniLM and the same ID-based model, and take turns
step by step. With `--as-paper`, one side computes what the released training step computes: every row's text is
tokenised anew, padded to 100 tokens and encoded three times in single precision, and all positions are scored over the
vocabulary.
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from ceilings import device, measure_ceilings, wait_for_device
from shared import machine, markdown
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flip_hf import FlipForPreTraining, FlipPretrainingCollator
from flip_hf.data.encoded_rows import value_tokens
from flip_hf.data.sampling import LengthGroupedBatchSampler, text_lengths
from flip_hf.fetch import minilm
from flip_hf.fields import IGNORED_LABEL
from flip_hf.runs.build import fit_processor, new_model
from flip_hf.runs.data import load_click_log
from flip_hf.runs.settings import DataSettings, ModelSettings
from flip_hf.standard_json import measures_json
from flip_hf.training import loop
from flip_hf.training.compiling import compile_text_encoder
from flip_hf.training.cpu import fast_cpu_training
from flip_hf.training.optimization import build_optimizer
from flip_hf.training.settings import TrainingSettings

PAPER_TOKENS = 100


class PackageStep:
    """The package's own step, as in the training loop."""

    def __init__(self, model: Any, rows: Any, collator: Any, training: TrainingSettings) -> None:
        self.accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.accelerator.is_available())
        self.rows, self.collator, self.training = rows, collator, training
        self.batches = list(LengthGroupedBatchSampler(text_lengths(rows), training.per_device_train_batch_size, seed=0))
        self.text_model: Any = model.flip.text_model
        # Stays active for as long as this object lives.
        self.speed_up = ExitStack()
        self.speed_up.enter_context(fast_cpu_training(model, self.accelerator.device))
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, training))
        self.run: Any = SimpleNamespace(accelerator=self.accelerator, folder=Path())

    def batch(self, number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = self.rows[self.batches[number % len(self.batches)]]
        return torch.tensor(rows["row"].to_numpy()), self.collator(rows)

    def step(self, batch: Any) -> None:
        self.model.train()
        window = send_to_device([batch], self.accelerator.device)
        loop._step(self.model, self.optimizer, window, self.training, self.run, 1)


def pretraining_step(log: Any, processor: Any, settings: ModelSettings, training: TrainingSettings) -> PackageStep:
    """The package's own step; MLM scores only the seen tokens."""
    model = new_model(FlipForPreTraining, settings, processor)
    rows = log.encode(processor, "train", with_label=False).with_format("arrow")
    model.set_mlm_tokens(value_tokens(rows))
    return PackageStep(model, rows, FlipPretrainingCollator(processor), training)


class AsPaper:
    """The same objectives, computed as in the released code."""

    def __init__(self, log: Any, processor: Any, settings: ModelSettings, training: TrainingSettings) -> None:
        self.log, self.processor, self.training = log.splits["train"], processor, training
        self.encoded = log.encode(processor, "train", with_label=False).with_format("arrow")
        self.collator = FlipPretrainingCollator(processor)
        # MLM and MTM read the masked text and one unmasked text; ICL encodes the unmasked text once more.
        options = settings.options | {"objectives": {"mlm": 1.0, "mtm": 1.0}}
        settings = replace(settings, options=options)
        self.masked = new_model(FlipForPreTraining, settings, processor)
        settings.options = settings.options | {"objectives": {"icl": 1.0}}
        self.contrast = new_model(FlipForPreTraining, settings, processor)
        self.contrast.flip = self.masked.flip
        self.text_model: Any = self.masked.flip.text_model
        self.model = nn.ModuleList([self.masked, self.contrast]).to(device())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=training.text_learning_rate)

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        size = self.training.per_device_train_batch_size
        rows = [(number * size + i) % len(self.encoded) for i in range(size)]
        batch = self.collator(self.encoded[rows])
        fields = self.processor.fields
        texts = [
            " ".join(f"{f.display_name} is {row[f.name]}." for f in fields) for row in self.log.select(rows).to_list()
        ]
        # Row by row, as in a Dataset's __getitem__.
        options = {"padding": "max_length", "truncation": True, "max_length": PAPER_TOKENS}
        tokens = [self.processor.tokenizer(text, **options)["input_ids"] for text in texts]
        masked, labels = self._padded(batch, "masked_input_ids", 0), self._padded(batch, "mlm_labels", IGNORED_LABEL)
        # The package decides which tokens are masked and provides the text; the tokenisation above only costs time.
        assert len(tokens) == size
        complete, mask = self._padded(batch, "input_ids", 0), self._padded(batch, "attention_mask", 0)
        # All positions are scored over the vocabulary; as in the released code, losses of unmasked ones are discarded.
        scored = torch.where(labels == IGNORED_LABEL, complete, labels)
        new = {"masked_input_ids": masked, "mlm_labels": scored, "input_ids": complete, "attention_mask": mask}
        return batch | new

    @staticmethod
    def _padded(batch: dict[str, torch.Tensor], name: str, value: int) -> torch.Tensor:
        tensor = batch[name][:, :PAPER_TOKENS]
        return nn.functional.pad(tensor, (0, PAPER_TOKENS - tensor.shape[1]), value=value)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        self.model.train()
        batch = send_to_device(batch, device())
        complete = {name: batch[name] for name in ("feature_ids", "input_ids", "attention_mask")}
        loss = self.masked(**batch).loss + self.contrast(**complete).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def count_flops(side: Any) -> float:
    """GFLOP of the matrix products in one step."""
    # Fused CPU attention and compiled code are not counted; eager attention computes the same products.
    usual = side.text_model.config._attn_implementation
    side.text_model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        side.step(side.batch(0))
    side.text_model.set_attn_implementation(usual)
    return counter.get_total_flops() / 1e9


def compare(benchmark: str, sides: dict[str, Any], batch_size: int, num_steps: int) -> dict[str, float]:
    """Times the sides, which take turns step by step, prints a table, and returns the median seconds of each side."""
    ceilings = measure_ceilings(device())
    # The first steps, which also warm up.
    counted = {name: count_flops(side) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    collation: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, num_steps):
        for name, side in sides.items():
            started = time.perf_counter()
            batch = side.batch(number % num_steps)
            made = time.perf_counter()
            side.step(batch)
            wait_for_device()
            if number >= 0:
                times[name].append(time.perf_counter() - started)
                collation[name].append(made - started)
    ceilings = measure_ceilings(device(), ceilings)
    medians = {name: statistics.median(own) for name, own in times.items()}
    rows = []
    for name, flops in counted.items():
        step = medians[name]
        facts: dict[str, Any] = {
            "benchmark": benchmark,
            "side": name,
            "rows_per_second": batch_size / step,
            "seconds": step,
            "collation_share": statistics.median(collation[name]) / step,
            "gflop": flops,
            "peak_share": flops / step / ceilings.bf16_gflops,
        }
        print(measures_json(facts))
        rows.append(
            [
                name,
                f"{facts['rows_per_second']:.1f}",
                f"{1000 * step:.0f}",
                f"{100 * facts['collation_share']:.1f} %",
                f"{flops / batch_size:.2f}",
                f"{100 * facts['peak_share']:.0f} %",
            ]
        )
    header = ["step", "rows/s", "ms", "of which collation", "GFLOP/row", "share of the bf16 peak"]
    print(f"\n{markdown(header, rows)}\n\n{ceilings}\n\n{machine()}")
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--as-paper", action="store_true", help="also time what the released code computes")
    parser.add_argument("--compile", action="store_true", help="also time our step with training.torch_compile")
    parser.add_argument("--layers", type=int, default=3, help="layers of MiniLM")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="steps per side")
    arguments = parser.parse_args()
    log = load_click_log(DataSettings(source="movielens-100k", max_train_rows=16384))
    settings = ModelSettings(text_layers=arguments.layers)
    training = TrainingSettings(per_device_train_batch_size=arguments.batch_size)
    minilm()
    processor = fit_processor(log, settings)
    sides: dict[str, Any] = {"ours": pretraining_step(log, processor, settings, training)}
    if arguments.compile:
        sides["ours, compiled"] = pretraining_step(log, processor, settings, training)
        compile_text_encoder(sides["ours, compiled"].model, sides["ours, compiled"].accelerator.device)
    if arguments.as_paper:
        sides["as the paper's code"] = AsPaper(log, processor, settings, training)

    seconds = compare("pretrain_step", sides, arguments.batch_size, arguments.steps)
    if arguments.as_paper:
        ratio = seconds["as the paper's code"] / seconds["ours"]
        print(f"\nours is {ratio:.1f} times as fast")


if __name__ == "__main__":
    main()
