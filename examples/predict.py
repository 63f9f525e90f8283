"""Scores the rows of a CSV or Parquet file in a stream and writes click probabilities as Parquet.

python examples/predict.py --model runs/flip/model --input impressions.csv --output scores.parquet
"""

from collections.abc import Sequence

from flip_hf import FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.training.prediction import predict_file
from flip_hf.training.run import make_accelerator
from flip_hf.training.run_config import PredictRun, parse_run
from flip_hf.training.script import run_script


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_run(PredictRun, arguments, __doc__)
    accelerator = make_accelerator(settings.precision)
    processor = FlipProcessor.from_pretrained(settings.model)
    model = FlipForCTR.from_pretrained(settings.model, **({"mode": settings.mode} if settings.mode else {}))
    collator = FlipCTRCollator(processor, model.config.mode, text_towers=model.config.text_towers)
    model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    summary = predict_file(model, processor, collator, settings, accelerator)
    accelerator.print(summary)


if __name__ == "__main__":
    run_script(main)
