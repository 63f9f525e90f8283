"""Writes the model card of a finished run, with its record and pictures, to a folder; does not push it.

python examples/card.py --run runs/flip --repo org/name --output cards/flip
"""

from collections.abc import Sequence

import signals_first  # noqa: F401

from flip_hf.runs.commands import card
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import CardSettings


def main(arguments: Sequence[str] | None = None) -> None:
    card(parse_run(CardSettings, arguments, __doc__))


if __name__ == "__main__":
    run_script(main)
