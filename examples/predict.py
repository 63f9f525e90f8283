"""Writes click probabilities for the rows of CSV or Parquet files, of any size, as Parquet, CSV or JSON Lines.

python examples/predict.py --model runs/flip/model --input impressions.csv --output scores.csv --keep '[request_id]'
"""

from collections.abc import Sequence

import signals_first  # noqa: F401

from flip_hf.runs.commands import predict
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import PredictSettings


def main(arguments: Sequence[str] | None = None) -> None:
    predict(parse_run(PredictSettings, arguments, __doc__))


if __name__ == "__main__":
    run_script(main)
