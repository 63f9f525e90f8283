"""Writes and reads checkpoints of a sharded feature table, one block of rows at a time."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from flip_hf.standard_json import settings_json

_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def add_table(
    folder: Path, name: str, shape: Sequence[int], dtype: torch.dtype, blocks: Iterable[torch.Tensor]
) -> None:
    """Adds a tensor to a checkpoint with one file, which then has two files and an index that transformers reads.

    Args:
        folder: folder with `model.safetensors`.
        name: name of the tensor.
        shape: shape of the tensor.
        dtype: floating-point type of the tensor.
        blocks: the rows of the tensor in order, in blocks of any size.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    # The safetensors format: the header's length in eight bytes, the header padded to a multiple of eight, the values.
    described = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [0, num_bytes]}
    header = settings_json({"__metadata__": {"format": "pt"}, name: described}).encode()
    header += b" " * (-len(header) % 8)
    with (folder / _SECOND).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for block in blocks:
            file.write(block.cpu().contiguous().view(torch.uint8).numpy().data)
    with safe_open(folder / _WHOLE, framework="pt") as weights:
        names = weights.keys()
        places = dict.fromkeys(names, _FIRST) | {name: _SECOND}
    (folder / _WHOLE).rename(folder / _FIRST)
    index = {"metadata": {"total_size": num_bytes + (folder / _FIRST).stat().st_size}, "weight_map": places}
    (folder / _INDEX).write_text(settings_json(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_rows(files: Iterable[str | Path], name: str, shape: Sequence[int], first: int, end: int) -> torch.Tensor:
    """Reads a range of rows of a tensor, and no other rows.

    Args:
        files: the safetensors files of the checkpoint.
        name: name of the tensor, without the prefix of the model that contains it.
        shape: expected shape of the whole tensor.
        first: first row to read.
        end: row after the last one to read.

    Returns:
        The rows, of the tensor's dtype, (end - first, ...).

    Raises:
        ValueError: the tensor has another shape or is in none of the files.
    """
    for path in files:
        with safe_open(path, framework="pt") as weights:
            keys = [key for key in weights.keys() if f".{key}".endswith(f".{name}")]  # noqa: SIM118
            if not keys:
                continue
            tensor = weights.get_slice(keys[0])
            if list(tensor.get_shape()) != list(shape):
                raise ValueError(
                    f"{path}: {keys[0]} has the shape {tuple(tensor.get_shape())} in the weights, but config.json "
                    f"describes {tuple(shape)}. One of the two was edited or belongs to another model; save the model "
                    "again"
                )
            rows: torch.Tensor = tensor[first:end]
            return rows
    raise ValueError(f"{', '.join(map(str, files))}: the weights of {name} are missing; save the model again")
