"""The command line of the scripts: its parser, its help and its hints about unknown settings."""

import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from flip_hf.fields import nearest

# jsonargparse's messages about an unknown setting, on the command line or in a file.
_UNKNOWN = (
    re.compile(r"unrecognized arguments: --(?P<name>[^\s=]+)"),
    re.compile(r"Option '(?P<name>[^']+)' is not accepted"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'"),
)
# Settings that have been renamed, by their old names.
_RENAMED = {
    "training.epochs": "training.num_train_epochs",
    "training.batch_size": "training.per_device_train_batch_size",
    "training.evaluation_batch_size": "training.per_device_eval_batch_size",
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.log_steps": "training.logging_steps",
    "training.checkpoint_steps": "training.save_steps",
    "training.checkpoints_kept": "training.save_total_limit",
    "training.max_gradient_norm": "training.max_grad_norm",
    "training.workers": "training.dataloader_num_workers",
    "training.trackers": "training.report_to",
    "training.compile": "training.torch_compile",
}
# jsonargparse's message about a single value for a setting that needs a list.
_NO_LIST = re.compile(r"Expected a <class 'list'>.*(?:Got value|Given value): (?P<value>[^\s\[{].*)$", re.DOTALL)


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, because some lines are commands."""

    def _get_type_str(self, action: Any) -> Any:
        shown = super()._get_type_str(action)
        return shown and re.sub("<class '(.+)'>", r"\1", shown)


class _Parser(ArgumentParser):
    """Adds hints to errors: the nearest name for an unknown setting, and how to write a list."""

    elsewhere: Mapping[str, str]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option.removeprefix("--") for option in self._option_string_actions]
        super().error(message + _suggestion(message, known, self.elsewhere) + _as_list(message), ex)


def run_parser(
    kind: type,
    description: str | None = None,
    elsewhere: Mapping[str, str] | None = None,
    program: str | None = None,
) -> Any:
    """Builds a `jsonargparse.ArgumentParser` for a run's settings; `--config` reads them from a YAML file.

    Args:
        kind: dataclass of the settings.
        description: text at the top of `--help`.
        elsewhere: settings that only another script has, each with the hint to show in the error.
        program: name of the command in `--help`; the default is the name of the script.
    """
    # A settings file must hold only values. Without these restrictions, `class_path` in a setting of type Any would
    # import and call code that the file names.
    set_parsing_settings(import_path_denylist=["*"], instantiate_subclass_spec_in_any=False)
    parser = _Parser(
        prog=program,
        usage="%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.elsewhere = elsewhere or {}
    parser.add_argument(
        "--config", action="config", help="YAML file with the settings below; later arguments override it"
    )
    parser.add_class_arguments(kind)
    return parser


def _as_list(message: str) -> str:
    found = _NO_LIST.search(message)
    return f"\nWrite a list, such as [{found['value']}]" if found else ""


def _suggestion(message: str, known: Collection[str], elsewhere: Mapping[str, str]) -> str:
    for pattern in _UNKNOWN:
        if found := pattern.search(message):
            parts = found.groupdict()
            name = ".".join(filter(None, (parts.get("group"), parts["name"])))
            if (top := name.partition(".")[0]) in elsewhere:
                return f" ({elsewhere[top]})"
            if name in _RENAMED:
                return f" ({name} is now {_RENAMED[name]})"
            near = nearest(name, known)
            return f" (did you mean {near}?)" if near else ""
    return ""
