"""Records how alike the two views of each field are before and after pretraining, for report.py to draw.

python examples/experiments/alignment.py      # after run.py, whose pretrained model of seed 0 it reads
"""

import argparse
from pathlib import Path

import torch
import yaml
from experiments import ALIGNED, CONFIGS, RESULTS, add_line, find_run, read_lines
from field_alignment import field_alignment

from flip_hf import FlipForPreTraining, FlipProcessor
from flip_hf.fetch import minilm
from flip_hf.runs.build import new_model
from flip_hf.runs.data import load_click_log
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import DataSettings, ModelSettings
from flip_hf.training.state import seed_everything

ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="where run.py put its runs")
    parser.add_argument("--split", default="random", help="the split of the run")
    arguments = parser.parse_args()
    run = find_run(ALIGNED, arguments.split, 0)
    if run.key in {line["key"] for line in read_lines(RESULTS / "alignment.jsonl")}:
        return
    folder = run.folder(arguments.runs) / "model"
    if not folder.exists():
        print(f"no alignment: {folder} is not there; run.py makes it")
        return
    settings = yaml.safe_load((CONFIGS / "pretrain.yaml").read_text(encoding="utf-8"))
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


if __name__ == "__main__":
    run_script(main)
