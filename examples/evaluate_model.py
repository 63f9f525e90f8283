"""Evaluates a finetuned FLIP on labelled rows.

python examples/evaluate_model.py --model runs/flip/model --data.test_file clicks.csv
python examples/evaluate_model.py --model runs/flip/model --data.source movielens-100k --rows validation
"""

from collections.abc import Sequence

import signals_first  # noqa: F401

from flip_hf.runs.commands import evaluate
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import EvaluateSettings


def main(arguments: Sequence[str] | None = None) -> None:
    evaluate(parse_run(EvaluateSettings, arguments, __doc__))


if __name__ == "__main__":
    run_script(main)
