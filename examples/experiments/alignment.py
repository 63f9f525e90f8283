"""Measures how alike the two views of each field are before and after pretraining, and records it in results/.

python examples/experiments/alignment.py      # after run.py, whose pretrained model of seed 0 it reads
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from experiments import ALIGNED, RESULTS, SHOWN_DATA, find_run
from recorded import add_line, read_lines

from flip_hf import FlipForPreTraining, FlipProcessor
from flip_hf.data.collators import FlipCTRCollator
from flip_hf.data.ragged import Ragged
from flip_hf.data.template import NO_FIELD
from flip_hf.fetch import minilm
from flip_hf.runs.build import new_model
from flip_hf.runs.data import load_click_log
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import DataSettings, ModelSettings
from flip_hf.training.state import seed_everything

ROWS = 4096
BATCH_ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="where run.py put its runs")
    parser.add_argument("--split", default="random", help="the split of the run")
    arguments = parser.parse_args()
    run = find_run(ALIGNED, SHOWN_DATA, arguments.split, 0)
    if run.key in {line["key"] for line in read_lines(RESULTS / "alignment.jsonl")}:
        return
    folder = run.folder(arguments.runs) / "model"
    if not folder.exists():
        print(f"no alignment: {folder} is not there; run.py makes it")
        return
    settings = yaml.safe_load(run.data.config(run.script).read_text(encoding="utf-8"))
    log = load_click_log(DataSettings(source=settings["data"]["source"], split=run.split, split_seed=run.seed))
    processor = FlipProcessor.from_pretrained(folder)
    seed_everything(run.seed, torch.device("cpu"))
    minilm()
    before = new_model(FlipForPreTraining, ModelSettings(**settings["model"]), processor)
    after = FlipForPreTraining.from_pretrained(folder)
    encoded = processor.encode(log.splits["test"].select(range(ROWS)))
    found = {name: field_alignment(model, processor, encoded) for name, model in (("before", before), ("after", after))}
    fields = [field.display_name for field in processor.fields]
    matrices = {name: matrix.tolist() for name, matrix in found.items()}
    add_line(RESULTS / "alignment.jsonl", {"key": run.key, "rows": ROWS, "fields": fields, **matrices})


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """How alike two representations of the same rows are, from 0 to 1, whatever their directions and scales: linear
    centred kernel alignment (Kornblith et al., ICML 2019, Section 3).

    Args:
        first: float (rows, size).
        second: float (rows, other size).

    Returns:
        NaN where a representation is the same for all rows.
    """
    first, second = (values.astype(np.float64) - values.mean(axis=0, dtype=np.float64) for values in (first, second))
    norms = np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    return float(np.linalg.norm(first.T @ second) ** 2 / norms) if norms else float("nan")


@torch.no_grad()
def field_alignment(model: Any, processor: Any, encoded: pa.Table) -> np.ndarray:
    """`linear_cka` between each field's feature embeddings and each field's tokens, float64 (F, fields).

    Args:
        model: a joint model.
        processor: the model's.
        encoded: rows that `processor.encode` returned. A field's tokens stand for it by the mean of their states.

    Returns:
        One row for each field of the tabular view, one column for each field of the text.
    """
    model.eval()
    collator = FlipCTRCollator(processor)
    num_fields = len(processor.fields)
    tabular, textual = [], []
    for start in range(0, len(encoded), BATCH_ROWS):
        part = encoded.slice(start, BATCH_ROWS)
        batch = collator(part)
        batch.pop("labels", None)
        output = model.base_model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        owners = Ragged.of(part["token_field_ids"]).padded(NO_FIELD, collator.pad_to_multiple_of)
        belongs = torch.from_numpy(owners[:, None, :] == np.arange(num_fields)[:, None]).to(output.token_states)
        means = belongs @ output.token_states / belongs.sum(dim=-1, keepdim=True).clamp(min=1)  # (B, fields, C)
        tabular.append(output.field_embeddings.float().cpu().numpy())
        textual.append(means.float().cpu().numpy())
    embeddings, tokens = np.concatenate(tabular), np.concatenate(textual)
    return np.array(
        [[linear_cka(embeddings[:, i], tokens[:, j]) for j in range(num_fields)] for i in range(embeddings.shape[1])]
    )


if __name__ == "__main__":
    run_script(main)
