"""Checks of a checkpoint's file headers, before a model is built or memory is allocated."""

import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    is_peft_available,
)
from transformers.utils.hub import get_checkpoint_shard_files

from flip_hf.fields import printable

_ADAPTER = "adapter_config.json"
_ENDING = ".safetensors"
_WHERE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")

# A model may have heads that its checkpoint lacks. They may have as many values and tensors as the checkpoint, plus
# these numbers.
_SPARE_VALUES = 1 << 24
_SPARE_TENSORS = 1 << 10


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a checkpoint.

    Attributes:
        source: folder or Hub repository of the checkpoint.
        files: the safetensors files.
        num_tensors: number of tensors in the files.
        num_values: total number of values of these tensors.
    """

    source: str
    files: list[Path]
    num_tensors: int
    num_values: int


_EXPECTED: ContextVar[SavedWeights | None] = ContextVar("expected", default=None)


def find_weights(source: str, settings: Mapping[str, Any]) -> SavedWeights:
    """Finds the weights that transformers would load, and downloads them if they are on the Hub.

    Args:
        source: a local folder, a Hub repository, or a safetensors file.
        settings: the arguments of `from_pretrained` that locate files, such as `revision` or `variant`.

    Raises:
        OSError: there are no safetensors files. Other formats, such as pickle, are never read.
        ValueError: a file is not in the format that its name says, or not in the checkpoint's own folder.
    """
    where = {name: settings[name] for name in _WHERE if settings.get(name) is not None}
    if _has_adapter(source, where):
        raise ValueError(
            f"{source}: {_ADAPTER} would replace this model with another one; remove the file, and load the adapter "
            "with peft"
        )
    if Path(source).is_file():
        files = [Path(source)]
    elif (whole := _find(source, _variant(SAFE_WEIGHTS_NAME, settings), where)) is not None:
        files = [Path(whole)]
    elif (index := _find(source, _variant(SAFE_WEIGHTS_INDEX_NAME, settings), where)) is not None:
        _check_index(Path(index))
        files = [Path(file) for file in get_checkpoint_shard_files(source, index, **where)[0]]
    else:
        raise OSError(
            f"{source}: found no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. Other formats are not read; "
            "save the model with safetensors"
        )
    # If such files exist, transformers reads only them, and allocates the model before it compares shapes.
    if parts := sorted(files[0].parent.glob(f"shard-*{_ENDING}")):
        raise ValueError(
            f"{parts[0]} is a part of a distributed checkpoint, which is not supported; save the model as a whole"
        )
    shapes = [shape for file in files for shape in _shapes(file)]
    return SavedWeights(source, files, len(shapes), sum(map(math.prod, shapes)))


@contextmanager
def expecting(weights: SavedWeights | None) -> Iterator[None]:
    """Context manager: inside it, `limited_building` refuses models that are too large for these weights."""
    token = _EXPECTED.set(weights)
    try:
        yield
    finally:
        _EXPECTED.reset(token)


@contextmanager
def limited_building() -> Iterator[None]:
    """Context manager that stops building a model that is too large for its weights, before it takes time or memory.

    Raises:
        ValueError: the model has more tensors or values than its weights and new heads can have, or can't be built.
    """
    weights = _EXPECTED.get()
    if weights is None:
        yield
        return
    thread = threading.get_ident()
    tensors = values = 0

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal tensors, values
        # The hooks are called for modules of all threads.
        if tensor is None or threading.get_ident() != thread:
            return
        tensors, values = tensors + 1, values + tensor.numel()
        if values > 2 * weights.num_values + _SPARE_VALUES or tensors > 2 * weights.num_tensors + _SPARE_TENSORS:
            raise ValueError(
                f"{weights.source}: config.json describes a larger model than the weights. The weights have "
                f"{weights.num_values} values in {weights.num_tensors} tensors. The model has at least {values} in "
                f"{tensors}, counted up to {name} of a {type(module).__name__} with the shape {tuple(tensor.shape)}. "
                "Load the model in the mode it was saved in, or correct config.json so that it describes these weights"
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    # Errors of torch and transformers about invalid settings do not name the file.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        why = printable(str(error))
        raise ValueError(f"{weights.source}: the model in config.json can't be built: {why}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _has_adapter(source: str, where: Mapping[str, Any]) -> bool:
    if Path(source).is_dir():
        return Path(source, where.get("subfolder", ""), _ADAPTER).exists()
    # Without peft, transformers does not look for an adapter.
    return is_peft_available() and find_adapter_config_file(source, **where) is not None


def _find(source: str, name: str, where: Mapping[str, Any]) -> str | None:
    try:
        found: str | None = cached_file(source, name, **where)
    except OSError as error:
        is_local = where.get("local_files_only") or is_offline_mode()
        # The error has no cause if the file does not exist. A network error does not tell whether the file exists.
        if error.__cause__ is None or (is_local and isinstance(error.__cause__, LocalEntryNotFoundError)):
            return None
        raise
    return found


def _variant(name: str, settings: Mapping[str, Any]) -> str:
    if not settings.get("variant"):
        return name
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{settings['variant']}.{ending}"


def _check_index(path: Path) -> None:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = set(index["weight_map"].values())
        is_index = isinstance(index["metadata"], dict) and all(isinstance(name, str) for name in names)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an index of safetensors files ({error}); save the model again") from error
    if not is_index or not names:
        raise ValueError(f"{path}: not an index of safetensors files; save the model again")
    if strange := sorted(n for n in names if not n.endswith(_ENDING) or PurePath(n).name != n or "\\" in n):
        raise ValueError(f"{path}: {strange[0]!r:.80} is not the name of a safetensors file in the same folder")


def _shapes(path: Path) -> list[list[int]]:
    if path.suffix != _ENDING:
        raise ValueError(f"{path} is not a safetensors file; other formats are not read")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); download or save it again") from error
    # transformers prints unexpected names unescaped.
    if steering := [name for name in shapes if not name.isprintable()]:
        raise ValueError(f"{path}: {steering[0]!r:.80} is not a valid name of a tensor")
    return list(shapes.values())
