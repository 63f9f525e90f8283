"""Writes the model card of a run that has ended, with its pictures, without pushing it.

python examples/card.py --run runs/flip --repo org/name --output cards/flip
"""

import argparse
import json
from pathlib import Path

import signals_first  # noqa: F401

from flip_hf.hub.push import write_card
from flip_hf.runs.run import pictures
from flip_hf.runs.script import run_script
from flip_hf.runs.table_writers import check_output_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--repo", required=True, help="where the model is, or will be, on the Hub, as in org/name")
    parser.add_argument("--output", type=Path, required=True, help="folder for README.md, run.json and the pictures")
    arguments = parser.parse_args()
    check_output_folder(arguments.output, "--output")
    record = json.loads((arguments.run / "run.json").read_text(encoding="utf-8"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_card(arguments.output, arguments.repo, record, pictures(arguments.run))


if __name__ == "__main__":
    run_script(main)
