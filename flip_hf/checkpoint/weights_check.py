"""What a checkpoint's files say of themselves, looked at before anything is built from them or room is made for it."""

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

# A model may have heads that its checkpoint lacks: as much again as is saved, and this much where little is.
_SPARE_VALUES = 1 << 24
_SPARE_TENSORS = 1 << 10


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a checkpoint.

    Attributes:
        source: the folder or the repository.
        files: the safetensors files.
        num_tensors: how many tensors they hold.
        num_values: how many numbers these hold together.
    """

    source: str
    files: list[Path]
    num_tensors: int
    num_values: int


_EXPECTED: ContextVar[SavedWeights | None] = ContextVar("expected", default=None)


def find_weights(source: str, settings: Mapping[str, Any]) -> SavedWeights:
    """The weights that transformers would load, fetched from the Hub where they are there.

    Args:
        source: a local folder, a repository's name, or a safetensors file.
        settings: what `from_pretrained` was given to find it by, such as `revision` or `variant`.

    Raises:
        OSError: there are no safetensors files; weights of another form, such as a pickle, are never read.
        ValueError: the files are not what their names say, or not in the checkpoint's own folder.
    """
    where = {name: settings[name] for name in _WHERE if settings.get(name) is not None}
    if _has_adapter(source, where):
        raise ValueError(
            f"{source}: {_ADAPTER} names another model to load in place of this one; remove it, and load the "
            "adapter with peft"
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
            f"{source}: found no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}; weights of another form are not "
            "read"
        )
    # Beside such files transformers reads no other, and makes room for the model before it compares the two.
    if parts := sorted(files[0].parent.glob(f"shard-*{_ENDING}")):
        raise ValueError(f"{parts[0]}: a part of a distributed checkpoint, which is not read; save the model whole")
    shapes = [shape for file in files for shape in _shapes(file)]
    return SavedWeights(source, files, len(shapes), sum(map(math.prod, shapes)))


@contextmanager
def expecting(weights: SavedWeights | None) -> Iterator[None]:
    """Models that are built in this context are to be filled with these weights; `limited_building` sees to it."""
    token = _EXPECTED.set(weights)
    try:
        yield
    finally:
        _EXPECTED.reset(token)


@contextmanager
def limited_building() -> Iterator[None]:
    """Stops the building of a model, before it takes time or memory, that can't be the one whose weights are expected.

    Raises:
        ValueError: the model has more tensors or numbers than its weights and heads that may be new, or can't be built.
    """
    weights = _EXPECTED.get()
    if weights is None:
        yield
        return
    thread = threading.get_ident()
    tensors = values = 0

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal tensors, values
        # The hooks hear of every module of the process.
        if tensor is None or threading.get_ident() != thread:
            return
        tensors, values = tensors + 1, values + tensor.numel()
        if values > 2 * weights.num_values + _SPARE_VALUES or tensors > 2 * weights.num_tensors + _SPARE_TENSORS:
            raise ValueError(
                f"{weights.source}: config.json describes a larger model than the weights are of: they hold "
                f"{weights.num_values} numbers in {weights.num_tensors} tensors, and with {name} of a "
                f"{type(module).__name__} of the shape {tuple(tensor.shape)} it has {values} in {tensors}. Load it in "
                "the mode it was saved in, or repair config.json so that it describes these weights"
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    # What torch and transformers raise over a setting that makes no sense does not say where it stands.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        why = printable(str(error))
        raise ValueError(f"{weights.source}: the model that config.json describes can't be built: {why}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _has_adapter(source: str, where: Mapping[str, Any]) -> bool:
    if Path(source).is_dir():
        return Path(source, where.get("subfolder", ""), _ADAPTER).exists()
    # Without peft, transformers does not look for one.
    return is_peft_available() and find_adapter_config_file(source, **where) is not None


def _find(source: str, name: str, where: Mapping[str, Any]) -> str | None:
    try:
        found: str | None = cached_file(source, name, **where)
    except OSError as error:
        is_local = where.get("local_files_only") or is_offline_mode()
        # A file that is not there has no cause. A network that fails says nothing of what is there.
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
        raise ValueError(f"{path}: not an index of safetensors files ({error})") from error
    if not is_index or not names:
        raise ValueError(f"{path}: not an index of safetensors files")
    if strange := sorted(n for n in names if not n.endswith(_ENDING) or PurePath(n).name != n or "\\" in n):
        raise ValueError(f"{path}: {strange[0]!r:.80} is not the name of a safetensors file in the same folder")


def _shapes(path: Path) -> list[list[int]]:
    if path.suffix != _ENDING:
        raise ValueError(f"{path}: not a safetensors file; weights of another form are not read")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); fetch or save it again") from error
    # transformers reports names that it does not expect, as they are.
    if steering := [name for name in shapes if not name.isprintable()]:
        raise ValueError(f"{path}: {steering[0]!r:.80} is not the name of a tensor of any model")
    return list(shapes.values())
