"""What transformers reports of a loaded checkpoint: which of it is an error, and which a warning."""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@contextmanager
def without_load_report() -> Iterator[None]:
    """Keeps transformers' table of missing and unexpected weights out of the log; a caller says what matters of it."""
    thread, log = threading.get_ident(), logging.getLogger(PreTrainedModel.__module__)

    def is_shown(record: logging.LogRecord) -> bool:
        return record.thread != thread or "LOAD REPORT" not in record.getMessage()

    log.addFilter(is_shown)
    try:
        yield
    finally:
        log.removeFilter(is_shown)


def check_load_report(model: PreTrainedModel, info: Mapping[str, Any], source: Any, may_mismatch: bool) -> None:
    """Judges what was missing, of another shape or unexpected in the checkpoint of a FLIP model.

    Warns of weights that start afresh because of their shape, and of weights that the model does not have; neither of
    the heads that another FLIP model may have (`new_parameters`, `unused_parameters`).

    Args:
        model: what was loaded.
        info: what `from_pretrained` returned with `output_loading_info`.
        source: the folder or the repository.
        may_mismatch: whether a weight of another shape may start afresh.

    Raises:
        ValueError: weights that the configuration asks for are not in the checkpoint, or have another shape.
    """
    cls: Any = type(model)
    if info["mismatched_keys"] and not may_mismatch:
        name, saved, wanted = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{source}: {name} has the shape {tuple(saved)} in the weights, but config.json describes {tuple(wanted)}; "
            "one of the two was edited or belongs to another model"
        )
    if missing := [name for name in info["missing_keys"] if not name.startswith(cls.new_parameters)]:
        raise ValueError(
            f"{source} lacks weights that mode={model.config.mode!r} needs: {some_of(missing)}. Load it in the mode it "
            "was saved in, or repair config.json so that it describes these weights"
        )
    if reshaped := [name for name, *_ in info["mismatched_keys"]]:
        logger.warning("%s has other shapes of %s, which start afresh", source, some_of(reshaped))
    if unexpected := [name for name in info["unexpected_keys"] if not name.startswith(cls.unused_parameters)]:
        logger.warning("%s holds weights that %s does not have: %s", source, cls.__name__, some_of(unexpected))


def some_of(names: Iterable[str]) -> str:
    """The first three of some weights' names in order, and how many there are more."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
