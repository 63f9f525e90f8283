"""How alike the two views of each field are."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from flip_hf.data.collators import FlipCTRCollator
from flip_hf.data.ragged import Ragged
from flip_hf.data.template import NO_FIELD

_BATCH_ROWS = 256


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """How alike two representations of the same rows are, from 0 to 1, whatever their directions and scales: linear
    centred kernel alignment (Kornblith et al., ICML 2019, Section 3).

    Args:
        first: float (rows, size).
        second: float (rows, other size).

    Returns:
        NaN where a representation is the same for all rows.
    """
    first, second = (values.astype(np.float64) - values.mean(axis=0, dtype=np.float64) for values in (first, second))
    norms = np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    return float(np.linalg.norm(first.T @ second) ** 2 / norms) if norms else float("nan")


@torch.no_grad()
def field_alignment(model: Any, processor: Any, encoded: pa.Table) -> np.ndarray:
    """`linear_cka` between each field's feature embeddings and each field's tokens, float64 (F, fields).

    Args:
        model: a joint model.
        processor: the model's.
        encoded: rows that `processor.encode` returned. A field's tokens stand for it by the mean of their states.

    Returns:
        One row for each field of the tabular view, one column for each field of the text.
    """
    model.eval()
    collator = FlipCTRCollator(processor)
    num_fields = len(processor.fields)
    tabular, textual = [], []
    for start in range(0, len(encoded), _BATCH_ROWS):
        part = encoded.slice(start, _BATCH_ROWS)
        batch = collator(part)
        batch.pop("labels", None)
        output = model.base_model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        owners = Ragged.of(part["token_field_ids"]).padded(NO_FIELD, collator.pad_to_multiple_of)
        belongs = torch.from_numpy(owners[:, None, :] == np.arange(num_fields)[:, None]).to(output.token_states)
        means = belongs @ output.token_states / belongs.sum(dim=-1, keepdim=True).clamp(min=1)  # (B, fields, C)
        tabular.append(output.field_embeddings.float().cpu().numpy())
        textual.append(means.float().cpu().numpy())
    embeddings, tokens = np.concatenate(tabular), np.concatenate(textual)
    return np.array(
        [[linear_cka(embeddings[:, i], tokens[:, j]) for j in range(num_fields)] for i in range(embeddings.shape[1])]
    )
