"""Finetunes FLIP on clicks: both towers or one of them, from a pretrained FLIP or from scratch.

python examples/finetune.py --config examples/configs/ml-100k/finetune.yaml --output_dir runs/flip
python examples/finetune.py --config ... --mode id --output_dir runs/flip-id
python examples/finetune.py --config ... --mode id --teacher runs/flip/model --output_dir runs/student
"""

from collections.abc import Sequence

import signals_first  # noqa: F401

from flip_hf.runs.commands import finetune
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import FinetuneSettings


def main(arguments: Sequence[str] | None = None) -> None:
    finetune(parse_run(FinetuneSettings, arguments, __doc__))


if __name__ == "__main__":
    run_script(main)
