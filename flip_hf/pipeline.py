"""The pipeline "ctr-prediction": from rows of a click log to click probabilities."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import Pipeline

from flip_hf.data.collators import FlipCTRCollator
from flip_hf.data.schema import InputError
from flip_hf.fields import with_nearest
from flip_hf.modeling_flip import FlipForCTR
from flip_hf.outputs import FlipForCTROutput
from flip_hf.processing_flip import FlipProcessor
from flip_hf.scoring import ClickScorer, check_text_budget, probabilities, probability_names
from flip_hf.text_towers import place_of_tower
from flip_hf.tower_vectors import TowerVectors, can_encode_apart

Result: TypeAlias = dict[str, float | None]
"""The probabilities of one row."""

_SETTINGS = ("batch_size", "mode", "text_budget", "tower_cache", "towers")
_BATCH_ROWS = 256
# Batches of a stream to read ahead, so that rows of similar length can share a batch.
_BATCHES_IN_A_CHUNK = 16


class CTRPredictionPipeline(Pipeline):
    """Click probabilities of raw rows: `pipeline("ctr-prediction", model=folder_or_repository)(rows)`.

    Reads values as `FlipProcessor` does, and counts every fallback in `fallbacks`.

    Args:
        model: a `FlipForCTR`.
        processor: the processor that was saved with it.
        mode: serve only a joint model's `"id"` or `"text"` tower. The pipeline then keeps only this tower, but all
            weights are read from disk first; `model_kwargs={"mode": "id"}` reads only the tower's.
        towers: whether to return the probability of each tower as well.
        text_budget: share of the rows whose text is read, from 0 to 1: the rows that a joint model's ID-based model is
            least sure of. All other rows get the ID-based model's probability.
        batch_size: maximum number of rows in a batch, 256 by default. Rows of similar length share a batch.
        tower_cache: with `text_towers`, maximum number of texts whose vectors are kept in memory, so that the encoder
            does not read a known user's or item's text again; 0 keeps none. 100,000 vectors of 384 numbers take 154 MB.
            All are dropped when a weight of the text encoder changes.
        kwargs: as in transformers, such as `device`.

    Attributes:
        fallbacks: for each field, the number of each kind of fallback since the pipeline was created. With
            `text_budget`, truncated texts are not counted. The pipeline warns once of each field whose values are
            unseen or missing in a far larger share of the rows than in training.

    Raises:
        ValueError: the model was never trained on clicks, lacks a tower that `mode` or `towers` needs, or does not
            belong to the processor.
    """

    processor: Any
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False

    def __init__(
        self,
        model: FlipForCTR,
        processor: FlipProcessor | None = None,
        mode: str | None = None,
        tower_cache: int = 100_000,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, FlipForCTR):
            raise ValueError(f"ctr-prediction needs a FlipForCTR, not a {type(model).__name__}")
        if not isinstance(processor, FlipProcessor):
            raise ValueError(
                "ctr-prediction needs the processor that was saved with the model: "
                f"processor=FlipProcessor.from_pretrained(folder); got {type(processor).__name__}"
            )
        if tower_cache < 0:
            raise ValueError(f"tower_cache={tower_cache} must be 0 or more")
        if mode is not None:
            model = model.in_mode(mode)
        model.check_finetuned()
        collator = FlipCTRCollator.from_model(processor, model)
        _refuse_workers(kwargs.get("num_workers"))
        super().__init__(model=model, processor=processor, **kwargs)
        self._tower_vectors = TowerVectors(model, processor, tower_cache) if can_encode_apart(model) else None
        self._cache = self._tower_vectors if tower_cache else None
        self._scorer = ClickScorer(model, processor, collator, forward=self._forward_on_device)
        self.fallbacks = self._scorer.report.counts

    def __call__(  # type: ignore[override]
        self, rows: Any, batch_size: int | None = None, num_workers: int | None = None, **kwargs: Any
    ) -> Result | list[Result] | Iterator[Result]:
        """Scores rows.

        Args:
            rows: one row as a dict; or a list of dicts, a pandas, polars or Arrow table, or a `datasets.Dataset`; or
                any other iterable, such as a generator of dicts, a `datasets.IterableDataset` or Arrow's
                `RecordBatchReader`.
            batch_size: maximum number of rows in a batch; by default the pipeline's.
            num_workers: None or 0. The calling process encodes rows in chunks, which takes a small part of the time
                that scoring takes. To score in several processes, use `flip_hf.integrations.ray`.
            kwargs: `towers`, `text_budget`; by default the pipeline's.

        Returns:
            For each row `{"probability": float}`. With `towers` also `"id_probability"` and `"text_probability"`, which
            is None if the text was not read. A dict gives one such dict; rows with a length give a list in the same
            order; any other iterable gives a generator. The generator reads at most 16 batches ahead, and applies
            `text_budget` to every 16 batches separately.

        Raises:
            InputError: a column is missing, or a value can't be read. Rows are counted from 0, over the whole stream.
            ValueError: `towers` or `text_budget` for a model with only one tower, a batch size below 1, or
                `num_workers` above 0.
            TypeError: an unknown argument.
        """
        _refuse_workers(num_workers)
        batch_size = self._rows_of_a_batch(batch_size)
        before, _, after = self._sanitize_parameters(**kwargs)
        params = {**self._preprocess_params, **before, **self._postprocess_params, **after}
        # A dict of splits is not a row; reading it raises an error that says so.
        if isinstance(rows, Mapping) and not isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
            return self._score([rows], 0, batch_size, params)[0]
        if isinstance(rows, str | bytes) or not (hasattr(rows, "__len__") or isinstance(rows, Iterable)):
            raise InputError("rows must be a dict, a list of dicts, a table or an iterable of dicts", value=rows)
        if hasattr(rows, "__len__"):
            return self._score(rows, 0, batch_size, params)
        chunk_rows = batch_size * _BATCHES_IN_A_CHUNK
        chunks = _arrow_chunks(rows, chunk_rows) if hasattr(rows, "__arrow_c_stream__") else _chunks(rows, chunk_rows)
        return self._stream(chunks, batch_size, params)

    def tower_vectors(self, rows: Any, tower: str, batch_size: int | None = None) -> np.ndarray:
        """Returns a text tower's vectors of rows, such as those of all items for a nearest-neighbour index.

        The vector is that of a row in which all other fields are missing. Other fields of a row change it only if the
        row's whole text is longer than `max_length`: then long values of one tower cut those of another.

        Args:
            rows: rows as in `FlipProcessor.encode`, with the tower's fields; other columns are ignored.
            tower: the tower's name in `text_towers`, such as `"item"`. The towers of a list are named "0", "1" and so
                on.
            batch_size: maximum number of texts in a batch; by default the pipeline's. Each distinct text is encoded
                once.

        Returns:
            float32 (rows, C), not normalised; C is the text encoder's width.

        Raises:
            InputError: a column is missing, or a value can't be read.
            ValueError: the model reads no text or has no tower of that name, or its text encoder is not on one device.
        """
        place_of_tower(tower, self.model.config)
        if self._tower_vectors is None:
            raise ValueError("the text encoder is offloaded or spread over devices; load it onto one device")
        return self._tower_vectors.of_rows(rows, tower, self._rows_of_a_batch(batch_size))

    def _rows_of_a_batch(self, batch_size: int | None) -> int:
        size: int = next(size for size in (batch_size, self._batch_size, _BATCH_ROWS) if size is not None)
        if size < 1:
            raise ValueError(f"batch_size={size} must be at least 1")
        return size

    def _stream(self, chunks: Iterator[Any], batch_size: int, params: Mapping[str, Any]) -> Iterator[Result]:
        first_row = 0
        for chunk in chunks:
            yield from self._score(chunk, first_row, batch_size, params)
            first_row += len(chunk)

    def _score(self, rows: Any, first_row: int, batch_size: int, params: Mapping[str, Any]) -> list[Result]:
        table = self.preprocess(rows, first_row)
        if not len(table):
            return []
        if self._cache is not None:
            self._cache.forget_if_changed()
        logits = self._scorer(table, batch_size, text_budget=params.get("text_budget"), first_row=first_row)
        self._scorer.report.warn(f"the {self._scorer.report.num_rows} rows so far")
        return self.postprocess(logits, params.get("towers", False))

    def _sanitize_parameters(
        self, towers: bool | None = None, text_budget: float | None = None, **unknown: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise TypeError(f"ctr-prediction has no setting {with_nearest(unknown, _SETTINGS)}")
        if towers and self.model.config.mode != "joint":
            raise ValueError(
                f"towers={towers} needs a model with both towers; this one is in mode={self.model.config.mode!r}"
            )
        check_text_budget(text_budget, self.model.config.mode)
        before = {} if text_budget is None else {"text_budget": text_budget}
        return before, {}, {} if towers is None else {"towers": towers}

    def preprocess(self, rows: Any, first_row: int = 0) -> pa.Table:  # type: ignore[override]
        """Selects the columns of the rows that are fields."""
        return self.processor.select_columns(rows, first_row=first_row)

    def _forward_on_device(self, batch: dict[str, torch.Tensor]) -> FlipForCTROutput:
        if self._cache is not None:
            batch = self._cache.with_vectors(batch)
        # `forward` moves the batch to the pipeline's device and then calls `_forward`.
        output: FlipForCTROutput = self.forward(batch)
        return output

    def _forward(self, batch: dict[str, torch.Tensor]) -> FlipForCTROutput:  # type: ignore[override]
        return self._scorer.call_model(batch)

    def postprocess(  # type: ignore[override]
        self, logits: Mapping[str, np.ndarray], towers: bool = False
    ) -> list[Result]:
        """Turns logits into a dict of probabilities for each row."""
        names = probability_names(self.model.config.mode)
        shown = list(names) if towers else ["probability"]
        # A masked probability means that the text was not read; it becomes None.
        columns = [probabilities(logits[names[name]]).tolist() for name in shown]
        return [dict(zip(shown, row, strict=True)) for row in zip(*columns, strict=True)]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves the model and its processor, so that `pipeline("ctr-prediction", model=save_directory)` loads them.

        Args:
            save_directory: a local folder.
            kwargs: as in `model.save_pretrained`, without `push_to_hub`.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes to a folder; push with pipe.push_to_hub(repo_id)")
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Pushes the model and its processor in one commit; arguments and errors as in `model.push_to_hub`."""
        model: Any = self.model
        commit: str = model.push_to_hub(repo_id, processor=self.processor, **kwargs)
        return commit


def _refuse_workers(number: int | None) -> None:
    if number:
        raise ValueError(
            f"num_workers={number}: this pipeline encodes rows in the calling process, which takes a small part of the "
            "time that scoring takes. Leave num_workers out. To score in several processes, use "
            "flip_hf.integrations.ray.BatchScorer"
        )


def _chunks(rows: Iterable[Any], chunk_rows: int) -> Iterator[list[Any]]:
    left = iter(rows)
    while chunk := list(islice(left, chunk_rows)):
        yield chunk


def _arrow_chunks(rows: Any, chunk_rows: int) -> Iterator[pa.Table]:
    for batch in pa.RecordBatchReader.from_stream(rows):
        for start in range(0, len(batch), chunk_rows):
            yield pa.Table.from_batches([batch.slice(start, chunk_rows)])
