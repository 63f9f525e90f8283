"""Pretrains FLIP: aligns the ID-based model and the text encoder on a click log, without labels.

python examples/pretrain.py --config examples/configs/ml-100k/pretrain.yaml --output_dir runs/pretrain
accelerate launch examples/pretrain.py --config ...
"""

from collections.abc import Sequence

import signals_first  # noqa: F401

from flip_hf.runs.commands import pretrain
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import PretrainSettings


def main(arguments: Sequence[str] | None = None) -> None:
    pretrain(parse_run(PretrainSettings, arguments, __doc__))


if __name__ == "__main__":
    run_script(main)
