"""Evaluates a finetuned FLIP on labelled rows.

python examples/evaluate_model.py --model runs/flip/model --data.test_file clicks.csv
python examples/evaluate_model.py --model runs/flip/model --data.source movielens-100k --rows validation
"""

from collections.abc import Sequence
from typing import Any

import signals_first  # noqa: F401

from flip_hf import FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.data.fallbacks import count_fallbacks
from flip_hf.runs.build import load_finetuned
from flip_hf.runs.data import load_click_log
from flip_hf.runs.device import make_accelerator
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import EvaluateSettings, parse_run
from flip_hf.scoring import click_logits
from flip_hf.standard_json import measures_json
from flip_hf.training.checkpoints import replace_file
from flip_hf.training.evaluation import ctr_metrics, slice_masks, slice_metrics


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_run(EvaluateSettings, arguments, __doc__)
    if settings.output is not None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(settings.precision)
    model = load_finetuned(FlipForCTR, settings.model, settings.mode)
    processor = FlipProcessor.from_pretrained(settings.model)
    log = load_click_log(settings.data, processor, split=settings.rows)
    processor.label = log.label
    rows = log.encode(processor, settings.rows)
    slices = slice_masks(rows, processor.fields, settings.slices)
    collator = FlipCTRCollator(processor, model.config.mode, text_towers=model.config.text_towers)
    model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    scores = click_logits(model, rows, collator, settings.batch_size, accelerator, settings.rows)
    if accelerator.is_main_process:
        results: dict[str, Any] = {"rows": len(rows), "metrics": ctr_metrics(scores)}
        if slices:
            results["slices"] = slice_metrics(scores, slices)
        report = measures_json(results | {"fallbacks": count_fallbacks(rows, processor.fields)}, indent=2)
        print(report)
        if settings.output is not None:
            replace_file(settings.output, report + "\n")


if __name__ == "__main__":
    run_script(main)
