"""Scores the rows of a CSV or Parquet file in a stream and writes click probabilities as Parquet, CSV or JSON Lines.

python examples/predict.py --model runs/flip/model --input impressions.csv --output scores.csv --keep '[request_id]'
"""

from collections.abc import Sequence

import signals_first  # noqa: F401

from flip_hf import FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.runs.build import load_finetuned
from flip_hf.runs.device import make_accelerator
from flip_hf.runs.prediction import predict_file
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import PredictSettings, parse_run


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_run(PredictSettings, arguments, __doc__)
    accelerator = make_accelerator(settings.precision)
    model = load_finetuned(FlipForCTR, settings.model, settings.mode)
    processor = FlipProcessor.from_pretrained(settings.model)
    collator = FlipCTRCollator.from_model(processor, model)
    model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    summary = predict_file(model, processor, collator, settings, accelerator)
    accelerator.print(summary)


if __name__ == "__main__":
    run_script(main)
