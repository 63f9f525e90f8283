"""Converts encoded rows to the vectors that the models' `forward` takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flip_hf.data.encoded_rows import Rows, matrix_column
from flip_hf.data.feature_vectors import FeatureVectors
from flip_hf.data.row_encoding import KEYS_COLUMN, VECTORS_COLUMN
from flip_hf.data.text_features import NO_KEY
from flip_hf.fields import FieldConfig, vector_owners, vector_sizes


class VectorInputs:
    """Collects the distinct vectors of a batch, and the index of the vector at each position.

    Args:
        fields: the processor's fields.
        vectors: the processor's vectors.
    """

    def __init__(self, fields: Sequence[FieldConfig], vectors: FeatureVectors) -> None:
        self._vectors = vectors
        self._sizes = vector_sizes(fields)
        owners = vector_owners(fields)
        self._num_positions = len(owners)
        # The positions that hold each field's vectors.
        self._positions = {name: np.flatnonzero([own == name for own in owners]) for name in self._sizes}
        keyed = [own for own in owners if own in vectors.features]
        self._key_columns = {name: np.flatnonzero([own == name for own in keyed]) for name in vectors.features}
        ends = np.cumsum([size for name, size in self._sizes.items() if name not in vectors.features])
        alone = [name for name in self._sizes if name not in vectors.features]
        self._row_columns = {n: slice(end - self._sizes[n], end) for n, end in zip(alone, ends.tolist(), strict=True)}

    @property
    def columns(self) -> list[str]:
        """The columns of the encoded rows that are read."""
        return [KEYS_COLUMN] * bool(self._key_columns) + [VECTORS_COLUMN] * bool(self._row_columns)

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """Returns the inputs that models with vectors need besides `feature_ids`; empty if no field has vectors.

        Returns:
            `vectors`: float32 (1, vectors, size) for each field that owns vectors. `vector_places`: int64 (B, P), the
            index of each position's vector among its field's vectors, -1 for none.
        """
        if not self._sizes:
            return {}
        places = np.full((len(rows), self._num_positions), -1, dtype=np.int64)
        vectors: dict[str, torch.Tensor] = {}
        keys = matrix_column(rows, KEYS_COLUMN) if self._key_columns else None
        values = matrix_column(rows, VECTORS_COLUMN).astype(np.float32) if self._row_columns else None
        for name, size in self._sizes.items():
            if name in self._key_columns and keys is not None:
                own = keys[:, self._key_columns[name]]
                distinct, inverse = np.unique(own, return_inverse=True)
                has_none = distinct == NO_KEY
                found = np.zeros((len(distinct), size), dtype=np.float32)
                found[~has_none] = self._vectors.find(name, distinct[~has_none])
                inverse = inverse.reshape(own.shape)
                places[:, self._positions[name]] = np.where(has_none[inverse], -1, inverse)
            else:
                assert values is not None
                found = values[:, self._row_columns[name]]
                has_none = np.isnan(found[:, 0])
                places[:, self._positions[name][0]] = np.where(has_none, -1, np.arange(len(rows)))
                found = np.where(has_none[:, None], np.float32(0), found)
            # With a first dimension of 1, code that splits a batch keeps the vectors whole, or fails.
            vectors[name] = torch.from_numpy(np.ascontiguousarray(found)).unsqueeze(0)
        return {"vectors": vectors, "vector_places": torch.from_numpy(places)}

    def of_type(self, rows: Rows, return_tensors: str | None) -> dict[str, Any]:
        """Returns the same inputs as "pt" tensors, "np" arrays, or lists (None)."""
        convert = {"pt": lambda tensor: tensor, "np": torch.Tensor.numpy, None: torch.Tensor.tolist}[return_tensors]
        inputs = self(rows)
        if not inputs:
            return {}
        vectors = {name: convert(own) for name, own in inputs["vectors"].items()}
        return {"vectors": vectors, "vector_places": convert(inputs["vector_places"])}
