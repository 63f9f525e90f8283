"""Parses settings from the command line and a YAML file."""

import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from flip_hf.runs.settings import (
    CardSettings,
    EvaluateSettings,
    FinetuneSettings,
    PredictSettings,
    PretrainSettings,
)

AnySettings = TypeVar(
    "AnySettings",
    PretrainSettings,
    FinetuneSettings,
    EvaluateSettings,
    PredictSettings,
    CardSettings,
)


# For each kind of run: its name, and the name and settings of the kind that it is easily confused with.
_RUNS: Mapping[type, tuple[str, str, type]] = {
    PretrainSettings: ("pretraining", "finetuning", FinetuneSettings),
    FinetuneSettings: ("finetuning", "pretraining", PretrainSettings),
    EvaluateSettings: ("evaluation", "prediction", PredictSettings),
    PredictSettings: ("prediction", "evaluation", EvaluateSettings),
}


def parse_run(
    kind: type[AnySettings],
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    program: str | None = None,
) -> AnySettings:
    """Parses a run's settings: `--config FILE.yaml`, then overrides such as `--training.seed 3`.

    Names may contain dashes (`--push-to-hub`). A switch without a value (`--private`) means true. An unknown setting,
    on the command line or in the file, ends the program with an error that names the nearest setting.

    Args:
        kind: dataclass of the settings.
        arguments: command-line arguments; the default is those of the program.
        description: text at the top of `--help`, such as the script's docstring.
        program: name of the command in `--help`; the default is the name of the script.

    Raises:
        ImportError: jsonargparse is not installed; says what to install.
    """
    if find_spec("jsonargparse") is None:
        raise ImportError("the command line needs jsonargparse: pip install 'flip_hf[train]'")
    # Imported here because only the command line needs jsonargparse.
    from flip_hf.runs.command_line import run_parser

    elsewhere = {}
    if kind in _RUNS:
        name, other_name, other = _RUNS[kind]
        own = {f.name for f in fields(kind)}
        elsewhere = {
            f.name: f"{name} has no setting {f.name}; {other_name} has" for f in fields(other) if f.name not in own
        }
    parser = run_parser(kind, description, elsewhere, program)
    switches = {f"--{f.name}" for f in fields(kind) if f.type is bool}
    parsed = parser.parse_args(_spelled_out(sys.argv[1:] if arguments is None else arguments, switches))
    parsed.pop("config")
    _check_groups(kind, parsed)
    run: AnySettings = kind(**parser.instantiate(parsed).as_dict())
    return run


def _check_groups(kind: type, parsed: Any, place: str = "") -> None:
    """Raises ValueError if the settings file gives a single value for a group of settings, such as `training`."""
    for f in fields(kind):
        if isinstance(f.type, type) and is_dataclass(f.type):
            group, name = parsed[f.name], f"{place}{f.name}"
            if not hasattr(group, "as_dict"):
                first = fields(f.type)[0].name
                raise ValueError(f"{name}: {group!r} must be a mapping of settings, such as {name}: {{{first}: ...}}")
            _check_groups(f.type, group, f"{name}.")


def _spelled_out(arguments: Sequence[str], switches: Container[str]) -> list[str]:
    """Replaces dashes in the arguments' names with underscores, and adds a value to switches without one."""
    spelled = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
            if name in switches and not equals and (i + 1 == len(arguments) or arguments[i + 1].startswith("--")):
                equals, value = "=", "true"
        spelled.append(f"{name}{equals}{value}")
    return spelled
