"""Measures peak memory and time of a pretraining step by the size of the contrastive batch, with and without caching.

python benchmarks/contrastive_memory.py --rows 128 256 512 1024

Prints a Markdown table. Every measurement runs in its own process, one after the other. A model with random weights,
whose text encoder has MiniLM's width and `--layers` layers, takes one step on synthetic rows. Peak memory is the
process's largest resident set size; the first line shows the process's memory before the step.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import torch
from accelerate import Accelerator

from flip_hf import FieldConfig, FlipConfig, FlipForPreTraining
from flip_hf.training.gradient_cache import contrast_over_window
from flip_hf.training.loop import count_items
from flip_hf.training.optimization import build_optimizer
from flip_hf.training.settings import TrainingSettings

VALUES, FIELDS, VOCABULARY = 10_000, 8, 30_522
UNITS = (("peak", "GiB"), ("seconds", "s"))


def build(layers: int, tokens: int) -> FlipForPreTraining:
    torch.manual_seed(0)
    text = {
        "model_type": "bert",
        "vocab_size": VOCABULARY,
        "hidden_size": 384,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "max_position_embeddings": tokens,
    }
    fields = [FieldConfig(f"field{i}", num_features=VALUES) for i in range(FIELDS)]
    return FlipForPreTraining(FlipConfig(text_config=text, fields=fields))


def synthetic(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """A batch with about a seventh of both views masked."""
    firsts = 2 + VALUES * torch.arange(FIELDS)
    feature_ids = firsts + torch.randint(2, VALUES, (rows, FIELDS))
    input_ids = torch.randint(1_000, VOCABULARY, (rows, tokens))
    in_table, in_text = torch.rand(rows, FIELDS) < 0.15, torch.rand(rows, tokens) < 0.15
    return {
        "feature_ids": feature_ids,
        "masked_feature_ids": feature_ids.masked_fill(in_table, 1),
        "mtm_labels": feature_ids.masked_fill(~in_table, -100),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "masked_input_ids": input_ids.masked_fill(in_text, 103),
        "mlm_labels": input_ids.masked_fill(~in_text, -100),
    }


def take_step(rows: int, batch_size: int, cached: bool, layers: int, tokens: int) -> dict[str, float]:
    """Takes one optimiser step over `rows` rows in batches; returns peak GiB before and after it, and CPU seconds."""
    accelerator = Accelerator(cpu=True)
    model = build(layers, tokens)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, TrainingSettings()))
    batch = synthetic(rows, tokens)
    batches = [{name: value[i : i + batch_size] for name, value in batch.items()} for i in range(0, rows, batch_size)]
    before, started = peak_memory(), time.process_time()
    num_items = count_items(model, batches, accelerator)
    forwards = contrast_over_window(model, batches, accelerator) if cached else [model] * len(batches)
    loss = 0.0
    for forward, part in zip(forwards, batches, strict=True):
        output = forward(**part, num_items_in_batch=num_items)
        accelerator.backward(output.loss)
        loss += output.icl_loss.item()
    optimizer.step()
    return {"before": before, "peak": peak_memory(), "seconds": time.process_time() - started, "icl_loss": loss}


def peak_memory() -> float:
    """Peak memory of the process in GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measured(*arguments: int) -> dict[str, float]:
    """Runs `take_step` in a new process."""
    imports = "import contrastive_memory as b; from flip_hf.standard_json import measures_json"
    code = f"{imports}; print(measures_json(b.take_step(*{arguments})))"
    # Runs this Python interpreter, with numbers from this file only.
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=sys.path[0])  # nosec B603
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 256, 512, 1024], help="contrastive batch sizes")
    parser.add_argument("--batch_size", type=int, default=32, help="rows encoded at a time, with caching")
    parser.add_argument("--layers", type=int, default=2, help="layers of the text encoder")
    parser.add_argument("--tokens", type=int, default=48, help="tokens per row")
    settings = parser.parse_args()
    size = (settings.layers, settings.tokens)
    empty = measured(1, 1, False, *size)["before"]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; ", end="")
    print(f"{settings.layers} layers, {settings.tokens} tokens per row; {empty:.2f} GiB before the step.\n")
    print(
        "| rows contrasted | whole: peak memory | cached: peak memory | whole: CPU time | cached: CPU time | ICL loss |"
    )
    print("|---|---|---|---|---|---|")
    for rows in settings.rows:
        whole, cached = measured(rows, rows, False, *size), measured(rows, settings.batch_size, True, *size)
        memory, seconds = (" | ".join(f"{run[name]:.2f} {unit}" for run in (whole, cached)) for name, unit in UNITS)
        print(f"| {rows} | {memory} | {seconds} | {whole['icl_loss']:.3f}, {cached['icl_loss']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
