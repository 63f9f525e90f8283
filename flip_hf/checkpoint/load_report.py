"""Turns transformers' report about a loaded checkpoint into errors and warnings."""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@contextmanager
def without_load_report() -> Iterator[None]:
    """Context manager that hides transformers' table of missing and unexpected weights; the caller reports them."""
    thread, log = threading.get_ident(), logging.getLogger(PreTrainedModel.__module__)

    def is_shown(record: logging.LogRecord) -> bool:
        return record.thread != thread or "LOAD REPORT" not in record.getMessage()

    log.addFilter(is_shown)
    try:
        yield
    finally:
        log.removeFilter(is_shown)


def check_load_report(model: PreTrainedModel, info: Mapping[str, Any], source: Any, may_mismatch: bool) -> None:
    """Checks a loaded FLIP model for missing, mismatched and unexpected weights.

    It logs a warning for weights that are newly initialised because their shape does not match, and for weights that
    the model does not have. It ignores the heads of other FLIP models (`new_parameters`, `unused_parameters`).

    Args:
        model: the loaded model.
        info: the loading info that `from_pretrained(..., output_loading_info=True)` returned.
        source: folder or Hub repository of the checkpoint.
        may_mismatch: whether a weight with another shape may be newly initialised.

    Raises:
        ValueError: weights that the configuration requires are missing from the checkpoint or have another shape.
    """
    cls: Any = type(model)
    if info["mismatched_keys"] and not may_mismatch:
        name, saved, wanted = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{source}: {name} has the shape {tuple(saved)} in the weights, but config.json describes {tuple(wanted)}. "
            "One of the two was edited or belongs to another model; save the model again"
        )
    if missing := [name for name in info["missing_keys"] if not name.startswith(cls.new_parameters)]:
        raise ValueError(
            f"{source} lacks weights that mode={model.config.mode!r} needs: {some_of(missing)}. Load the model in the "
            "mode it was saved in, or correct config.json so that it describes these weights"
        )
    if reshaped := [name for name, *_ in info["mismatched_keys"]]:
        logger.warning("%s: these weights have another shape and are newly initialised: %s", source, some_of(reshaped))
    if unexpected := [name for name in info["unexpected_keys"] if not name.startswith(cls.unused_parameters)]:
        logger.warning("%s has weights that %s does not use: %s", source, cls.__name__, some_of(unexpected))


def some_of(names: Iterable[str]) -> str:
    """Lists the first three names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
