"""Exports a model's click logits as a `torch.export` program or an ONNX file, and scores with the latter."""

import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from flip_hf.fields import vector_sizes
from flip_hf.modeling_flip import FlipForCTR
from flip_hf.scoring import probabilities

_TABULAR, _TEXT = ("feature_ids",), ("input_ids", "attention_mask")
_PLACES, _VECTORS = "vector_places", "vectors"
_LOGITS = "logits"

# Example sizes of the variable axes; torch.export would turn sizes of 0 and 1 into constants.
_EXAMPLE_SIZES = {"batch": 3, "length": 8}

# An ONNX file is one protobuf message, which must stay below 2 GiB; it holds the graph as well as the weights.
_MOST_INLINE_BYTES = 2**31 - 2**27


class _ClickLogits(nn.Module):
    """Module that takes tensors and returns one tensor, for export."""

    def __init__(self, model: FlipForCTR) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        feature_ids: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vector_places: torch.Tensor | None = None,
        vectors: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        extra = {} if vectors is None else {_PLACES: vector_places, _VECTORS: vectors}
        logits: torch.Tensor = self.model(feature_ids, input_ids, attention_mask, return_dict=True, **extra).logits
        return logits.float()


def export_program(model: FlipForCTR) -> ExportedProgram:
    """Exports the model's forward pass, without dropout, as a program of torch operators.

    `program.module()` takes the inputs of the model's mode by name and returns the click logits, float32 (B,). B and T
    may be any numbers from 1 up to what the text encoder can read. The inputs are:

    - `feature_ids`: int64 (B, P).
    - `input_ids` and `attention_mask`: int64 (B, T), with `text_towers` (B, towers, T).
    - if fields have vectors, `vector_places`: int64 (B, P), and `vectors`: a dict of float32 (1, vectors, size), with
      any number of vectors, by the names of the fields that own them.

    The program computes in the model's dtype, on the model's device, and shares the model's weights: nothing is
    copied. It does not check ids: make them with the processor that was saved with the model.

    Args:
        model: a model in any mode; it is not changed.

    Returns:
        The exported program.

    Raises:
        ValueError: the model was never trained on clicks, or its feature table is sharded.
    """
    _check_servable(model)
    # torch.export finds out by itself which lengths the text encoder can read.
    axes: dict[str, Any] = {}
    example: dict[str, Any] = {}
    for name, shape in _shapes_of(model).items():
        axes[name] = dict.fromkeys(_named_axes(shape), Dim.DYNAMIC)
        sizes = [_EXAMPLE_SIZES.get(axis, axis) for axis in shape]
        example[name] = torch.ones(sizes, dtype=torch.int64, device=model.device)
    if owned := _sizes_of_vectors(model):
        axes[_VECTORS] = {name: {1: Dim.DYNAMIC} for name in owned}
        example[_VECTORS] = {
            # Each field gets another number of vectors; otherwise export would assume that they are always equal.
            name: torch.ones(1, _EXAMPLE_SIZES["length"] + i + 1, size, dtype=model.dtype, device=model.device)
            for i, (name, size) in enumerate(owned.items())
        }
    with _evaluating(model), torch.no_grad():
        return torch.export.export(_ClickLogits(model), (), example, dynamic_shapes=axes, strict=False)


def export_onnx(model: FlipForCTR, path: str | Path, int8: bool = False) -> Path:
    """Writes the model as an ONNX file for `OnnxScorer`.

    Inputs of the file, as far as the model's mode reads them:

    - `feature_ids`: int64 (batch, P).
    - `input_ids` and `attention_mask`: int64 (batch, length), with `text_towers` (batch, towers, length).
    - if fields have vectors, `vector_places`: int64 (batch, P), and for each field that owns vectors
      `vectors.<field>`: float32 (1, vectors, size).

    Output: `logits`, float32 (batch,), as in `export_program`.

    The file appears only when it is complete. Weights of more than 2 GiB are written to `<name>.data` beside it; keep
    the two files together.

    Args:
        model: a model in any mode, in float32; it is not changed.
        path: the file to write or replace; its folder is created if it is missing.
        int8: whether to compute the matrix products of the text tower's linear layers in 8 bits. Activations are
            scaled for each batch, so a row's logit depends slightly on the other rows of its batch. Embeddings and the
            ID-based model stay in float32.

    Returns:
        The path.

    Raises:
        ImportError: `flip_hf[serve]` is not installed.
        ValueError: as in `export_program`; the model is not in float32; or `int8` for a model without a text tower.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        _import(module)
    if int8 and model.config.mode == "id":
        raise ValueError("int8=True quantizes the text tower, but a model in mode='id' has none")
    if other := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise ValueError(
            f"the model is in {', '.join(sorted(map(str, other)))}, which most CPU operators of ONNX Runtime lack; "
            "load it with dtype=torch.float32"
        )
    exported: Any = torch.onnx.export(export_program(model), dynamo=True, output_names=[_LOGITS], verbose=False)
    graph = exported.model.graph
    shapes = _shapes_of(model)
    owned = _sizes_of_vectors(model)
    # The exporter gives them names of Python variables; they come last, in the order of the fields.
    for value, name in zip(graph.inputs[len(shapes) :], owned, strict=True):
        value.name = f"{_VECTORS}.{name}"
        shapes[value.name] = (1, f"vectors of {name}", owned[name])
    # Set here, because the exporter warns of names for axes that it has found to be equal.
    axes = {value: _named_axes(shapes[value.name]) for value in graph.inputs}
    exported.rename_axes({value.shape[i]: name for value, named in axes.items() for i, name in named.items()})
    for node in graph:
        # Removes the paths of source files on this machine, which the exporter records for each operator.
        node.metadata_props.clear()
    num_bytes = sum(value.const_value.nbytes for value in graph.initializers.values())
    beside = num_bytes > _MOST_INLINE_BYTES
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that a rename is enough.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole = Path(folder, path.name)
        if int8:
            full = Path(folder, f"float32.{path.name}")
            _quantize(exported, full, whole, beside)
        else:
            exported.save(whole, external_data=beside)
        _move(whole, path)
    return path


class OnnxScorer:
    """Computes click probabilities with ONNX Runtime, from a file that `export_onnx` wrote.

    It does not check ids: make them with the processor that was saved with the model.

    Args:
        path: the ONNX file.
        num_threads: threads of one operator; ONNX Runtime's default if None.
        providers: ONNX Runtime's execution providers, in order of preference.

    Attributes:
        inputs: names of the arrays that the model reads.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: `flip_hf[serve]` is not installed.
        ValueError: `export_onnx` did not write this file.
    """

    def __init__(
        self,
        path: str | Path,
        num_threads: int | None = None,
        providers: Sequence[str | tuple[str, dict[str, Any]]] = ("CPUExecutionProvider",),
    ) -> None:
        runtime = _import("onnxruntime")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; export_onnx(model, path) writes one")
        options = runtime.SessionOptions()
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        self._session = runtime.InferenceSession(path, options, providers=list(providers))
        self.inputs: list[str] = [value.name for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs()]
        plain = {name for name in self.inputs if not name.startswith(f"{_VECTORS}.")}
        if not plain <= {*_TABULAR, *_TEXT, _PLACES} or outputs != [_LOGITS]:
            raise ValueError(f"{path} is not a model that export_onnx wrote")

    def __call__(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Scores a batch.

        Args:
            batch: arrays, CPU tensors or lists, as `FlipProcessor` and `FlipCTRCollator` return them. Inputs that the
                model does not read are ignored.

        Returns:
            Click probabilities, float32 (B,).

        Raises:
            ValueError: the batch lacks an input.
        """
        given = {**batch, **{f"{_VECTORS}.{name}": own for name, own in batch.get(_VECTORS, {}).items()}}
        if absent := [name for name in self.inputs if name not in given]:
            raise ValueError(f"the batch lacks {', '.join(absent)}, which this model reads")
        arrays = {
            name: np.asarray(given[name], np.float32 if name.startswith(f"{_VECTORS}.") else np.int64)
            for name in self.inputs
        }
        (logits,) = self._session.run([_LOGITS], arrays)
        return probabilities(logits).astype(np.float32)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"ONNX export and scoring need {name}: pip install 'flip_hf[serve]'") from error


def _shapes_of(model: FlipForCTR) -> dict[str, tuple[Any, ...]]:
    """The shape of each input that the model reads; a variable axis has a name instead of a size."""
    config = model.config
    towers = () if config.text_towers is None else (len(config.text_towers),)
    shapes: dict[str, tuple[Any, ...]] = dict.fromkeys(_TEXT, ("batch", *towers, "length"))
    shapes["feature_ids"] = ("batch", sum(f.num_positions for f in config.tabular_fields))
    shapes[_PLACES] = shapes["feature_ids"]
    names = {"id": _TABULAR, "text": _TEXT, "joint": _TABULAR + _TEXT}[config.mode]
    names += (_PLACES,) * bool(_sizes_of_vectors(model))
    return {name: shapes[name] for name in names}


def _sizes_of_vectors(model: FlipForCTR) -> dict[str, int]:
    """Size of the vectors that the model reads, by the field that owns them."""
    return {} if model.config.mode == "text" else vector_sizes(model.config.fields)


def _named_axes(shape: tuple[Any, ...]) -> dict[int, str]:
    return {i: axis for i, axis in enumerate(shape) if isinstance(axis, str)}


def _check_servable(model: FlipForCTR) -> None:
    if not isinstance(model, FlipForCTR):
        raise ValueError(f"only a FlipForCTR can be exported for serving, not a {type(model).__name__}")
    model.check_finetuned()
    if model.sharded_parameters:
        raise ValueError("the feature table is sharded: save the model, load it unsharded, and export the loaded one")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _quantize(exported: Any, full: Path, target: Path, beside: bool) -> None:
    quantization = _import("onnxruntime.quantization")
    # The exporter has folded constants and inferred shapes already; this entry stops a warning that asks for it.
    exported.model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"
    exported.save(full, external_data=beside)
    quantization.quantize_dynamic(
        full,
        target,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=_text_products(exported.model.graph),
        per_channel=True,
        # Without VNNI, sums of two products of 8 bits overflow.
        reduce_range=True,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=beside,
    )


def _text_products(graph: Any) -> list[str]:
    """Names of the matrix products that depend on the text."""
    from_text = {value for value in graph.inputs if value.name in _TEXT}
    names = []
    for node in graph:
        # Either tower may compute the number of rows from the shape of the other view.
        if node.op_type != "Shape" and not from_text.isdisjoint(node.inputs):
            from_text.update(node.outputs)
            if node.op_type == "MatMul":
                names.append(node.name)
    return names


def _move(source: Path, target: Path) -> None:
    data = source.with_name(f"{source.name}.data")
    if data.exists():
        # An older graph must never be found together with the new weights.
        target.unlink(missing_ok=True)
        os.replace(data, target.with_name(data.name))
    os.replace(source, target)
