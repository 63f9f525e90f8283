"""The command `flip-hf`, which needs the installed package but no clone of the repository.

Several devices: `accelerate launch -m flip_hf.cli pretrain --config run.yaml`
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flip_hf.fields import with_nearest
from flip_hf.runs.commands import card, evaluate, fetch, finetune, predict, pretrain
from flip_hf.runs.parsing import parse_run
from flip_hf.runs.script import run_script
from flip_hf.runs.settings import CardSettings, EvaluateSettings, FinetuneSettings, PredictSettings, PretrainSettings


@dataclass(frozen=True)
class Command:
    """One subcommand of `flip-hf`.

    Attributes:
        run: the function that runs it.
        settings: the dataclass that its command line fills; None if it takes a single word instead.
        example: flags of a typical call.
    """

    run: Callable[[Any], object]
    settings: type | None
    example: str

    @property
    def summary(self) -> str:
        """What the command does, in one line."""
        return (self.run.__doc__ or "").splitlines()[0]


COMMANDS: Mapping[str, Command] = {
    "pretrain": Command(pretrain, PretrainSettings, "--config run.yaml --output_dir runs/pretrained"),
    "finetune": Command(
        finetune, FinetuneSettings, "--config run.yaml --pretrained runs/pretrained/model --output_dir runs/flip"
    ),
    "evaluate": Command(evaluate, EvaluateSettings, "--model runs/flip/model --data.test_file clicks.csv"),
    "predict": Command(
        predict, PredictSettings, "--model runs/flip/model --input impressions.csv --output scores.parquet"
    ),
    "card": Command(card, CardSettings, "--run runs/flip --repo org/name --output cards/flip"),
    "fetch": Command(fetch, None, "minilm"),
}
"""The subcommands of `flip-hf` by name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the subcommand that the arguments name; without arguments, prints the list of subcommands.

    Args:
        arguments: the command line; `sys.argv[1:]` by default.
    """
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in COMMANDS:
        raise ValueError(f"flip-hf has no command {with_nearest([name], COMMANDS)}")
    command = COMMANDS[name]
    program = f"flip-hf {name}"
    description = f"{command.summary}\n\n{program} {command.example}"
    if command.settings is not None:
        command.run(parse_run(command.settings, rest, description, program))
    elif len(rest) == 1 and not rest[0].startswith("-"):
        command.run(rest[0])
    elif rest in (["-h"], ["--help"]):
        print(f"usage: {program} NAME\n\n{description}")
    else:
        raise ValueError(f"{program} takes one name, such as {program} {command.example}")


def _usage() -> str:
    commands = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return f"usage: flip-hf COMMAND ...\n\n{commands}\n\nflip-hf COMMAND --help shows the settings of a command."


def run() -> None:
    """Entry point of the program `flip-hf`."""
    run_script(main)


if __name__ == "__main__":
    run()
