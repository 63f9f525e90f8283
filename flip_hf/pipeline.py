"""The pipeline "ctr-prediction": rows of a click log -> click probabilities."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import Pipeline

from flip_hf.data.collators import FlipCTRCollator
from flip_hf.data.sampling import text_lengths
from flip_hf.data.schema import InputError
from flip_hf.modeling_flip import FlipForCTR
from flip_hf.outputs import FlipForCTROutput
from flip_hf.processing_flip import FlipProcessor, count_fallbacks

_BATCH_ROWS = 256
# Batches of a stream that are read ahead, so that rows of like length can share one.
_BATCHES_IN_A_CHUNK = 16


class CTRPredictionPipeline(Pipeline):
    """Click probabilities of rows as users hold them: `pipeline("ctr-prediction", model=folder_or_repository)(rows)`.

    What a field holds is read as by `FlipProcessor`, and every fallback is counted in `fallbacks`.

    Args:
        model: a `FlipForCTR`.
        processor: the processor that was saved with it.
        mode: serve a joint model's `"id"` or `"text"` tower alone. The pipeline then holds no more than that, but all
            weights were read; `model_kwargs={"mode": "id"}` reads the tower's alone.
        towers: give what each tower says, too.
        batch_size: most rows of a batch, 256 by default; rows of like length share one.
        kwargs: as in transformers, such as `device`.

    Attributes:
        fallbacks: how often each field fell back since the pipeline was made, by the name of the fallback.

    Raises:
        ValueError: the model has not learned clicks, has not the towers that are asked for, or does not belong to the
            processor.
    """

    processor: Any
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False

    def __init__(
        self, model: FlipForCTR, processor: FlipProcessor | None = None, mode: str | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(model, FlipForCTR):
            raise ValueError(f"ctr-prediction needs a FlipForCTR, not a {type(model).__name__}")
        if not isinstance(processor, FlipProcessor):
            raise ValueError(
                "ctr-prediction needs the processor that was saved with the model: "
                f"processor=FlipProcessor.from_pretrained(folder); got {type(processor).__name__}"
            )
        if mode is not None:
            model = model.in_mode(mode)
        if reason := model.needs_finetuning:
            raise ValueError(
                f"{model.name_or_path or 'the model'} {reason}: its probabilities would mean nothing. Finetune it "
                "(FlipForCTR, examples/finetune.py); if you have since, save it and load what was saved"
            )
        if processor.fields != model.config.fields:
            raise ValueError(
                "the processor's fields are not the model's: load both from one folder, and after processor.extend "
                "resize the model and save both"
            )
        super().__init__(model=model, processor=processor, **kwargs)
        self.fallbacks: dict[str, Counter[str]] = {}
        self._collator = FlipCTRCollator(processor, model.config.mode)

    def __call__(  # type: ignore[override]
        self, rows: Any, batch_size: int | None = None, **kwargs: Any
    ) -> dict[str, float] | list[dict[str, float]] | Iterator[dict[str, float]]:
        """Scores rows.

        Args:
            rows: one row as a dict; or a list of dicts, a pandas or Arrow table or a `datasets.Dataset`; or what can
                only be iterated over, such as a generator of dicts or a `datasets.IterableDataset`.
            batch_size: most rows of a batch; by default the pipeline's.
            kwargs: `towers`; by default the pipeline's.

        Returns:
            For each row `{"probability": float}`, with `towers` also `"id_probability"` and `"text_probability"`. For a
            dict one of them; for rows whose number is known a list in their order; else a generator, which is never
            more than 16 batches ahead of what it has given.

        Raises:
            InputError: a column is missing, or a value can't be read. Rows are counted from 0, over the whole stream.
            ValueError: `towers` of a model that has only one, or a batch size below 1.
        """
        batch_size = next(size for size in (batch_size, self._batch_size, _BATCH_ROWS) if size is not None)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        params = {**self._postprocess_params, **self._sanitize_parameters(**kwargs)[2]}
        if isinstance(rows, Mapping):
            return self._score([rows], 0, batch_size, params)[0]
        if isinstance(rows, str | bytes) or not (hasattr(rows, "__len__") or isinstance(rows, Iterable)):
            raise InputError("rows must be a dict, a list of dicts, a table or an iterable of dicts", value=rows)
        if hasattr(rows, "__len__"):
            return self._score(rows, 0, batch_size, params)
        return self._stream(iter(rows), batch_size, params)

    def _stream(self, rows: Iterator[Any], batch_size: int, params: Mapping[str, Any]) -> Iterator[dict[str, float]]:
        first_row = 0
        while chunk := list(islice(rows, batch_size * _BATCHES_IN_A_CHUNK)):
            yield from self._score(chunk, first_row, batch_size, params)
            first_row += len(chunk)

    def _score(self, rows: Any, first_row: int, batch_size: int, params: Mapping[str, Any]) -> list[dict[str, float]]:
        encoded = self.preprocess(rows, first_row=first_row)
        order = np.arange(len(encoded))
        if "input_ids" in encoded.column_names:
            order = np.argsort(text_lengths(encoded), kind="stable")
        results: list[dict[str, float]] = [{}] * len(encoded)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            output = self.forward(self._collator(encoded.take(places)))
            for place, result in zip(places, self.postprocess(output, **params), strict=True):
                results[place] = result
        return results

    def _sanitize_parameters(  # type: ignore[override]
        self, towers: bool | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if towers and self.model.config.mode != "joint":
            raise ValueError(
                f"towers=True needs a model of both towers; this one is in mode={self.model.config.mode!r}"
            )
        return {}, {}, {} if towers is None else {"towers": towers}

    def preprocess(self, rows: Any, first_row: int = 0) -> pa.Table:  # type: ignore[override]
        """What `FlipProcessor.encode` makes of rows, without a text where the model reads none."""
        encoded = self.processor.encode(rows, first_row=first_row, with_text=self.model.config.mode != "id")
        for field, counts in count_fallbacks(encoded, self.processor.fields).items():
            self.fallbacks.setdefault(field, Counter()).update(counts)
        return encoded

    def _forward(self, batch: dict[str, torch.Tensor]) -> FlipForCTROutput:  # type: ignore[override]
        if self.model.training:
            # The caller may go on training it between two calls.
            self.model.eval()
        output: FlipForCTROutput = self.model(**batch)
        return output

    def postprocess(  # type: ignore[override]
        self, output: FlipForCTROutput, towers: bool = False
    ) -> list[dict[str, float]]:
        """The probabilities of a batch, a dict for each row."""
        logits: dict[str, Any] = {"probability": output.logits}
        if towers:
            logits |= {"id_probability": output.id_logits, "text_probability": output.text_logits}
        columns = [values.double().sigmoid().tolist() for values in logits.values()]
        return [dict(zip(logits, row, strict=True)) for row in zip(*columns, strict=True)]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves the model and its processor, so that `pipeline("ctr-prediction", model=save_directory)` loads them.

        Args:
            save_directory: a local folder.
            kwargs: as in the model's, without `push_to_hub`.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes to a folder; push with pipe.push_to_hub(repo_id)")
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
