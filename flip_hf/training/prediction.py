"""Scores of a file's rows, in a stream."""

import contextlib
import os
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from datasets import Dataset

from flip_hf.configuration_flip import printable
from flip_hf.data.collators import FlipCTRCollator
from flip_hf.data.files import rows_located, shown, stream_tables
from flip_hf.data.sampling import least_sure
from flip_hf.processing_flip import FlipProcessor, count_fallbacks
from flip_hf.training.evaluation import click_logits, probabilities
from flip_hf.training.run_config import PredictRun


def predict_file(
    model: Any, processor: FlipProcessor, collator: Any, settings: PredictRun, accelerator: Accelerator
) -> str:
    """Scores CSV or Parquet files chunk by chunk; memory does not grow with the files.

    Writes Parquet with `row` (int64, from 0), `probability` (float32), and with both towers `id_probability` and
    `text_probability`, which is null where the text was not read. The file appears under its name when it is complete.

    Args:
        model: a prepared `FlipForCTR`.
        processor: the model's.
        collator: for the model's mode.
        settings: what to read and write.
        accelerator: what prepared the model.

    Returns:
        What was done, with the number of times that each field fell back, as text.

    Raises:
        InputError: the file can't be read, lacks a column, or holds a value that can't be an id.
        ValueError: `text_budget` is no share of the rows, or the model has not both towers.
    """
    plain = accelerator.unwrap_model(model)
    mode, share = plain.config.mode, settings.text_budget
    if share is not None and (mode != "joint" or not 0 <= share <= 1):
        raise ValueError(
            f"text_budget={share} is a share from 0 to 1, for a model of both towers; this is mode={mode!r}"
        )
    if share is not None:
        ids = accelerator.prepare_model(plain.in_mode("id"), device_placement=True, evaluation_mode=True)
        ids_collator = FlipCTRCollator(processor, "id")

    def score(table: pa.Table, first_row: int) -> tuple[pa.Table, dict[str, np.ndarray]]:
        """The encoded rows of a chunk and their logits; with a budget the ID-based model's first."""
        with_text = mode != "id" and share is None
        encoded = processor.encode(table, first_row=first_row, with_text=with_text, source=source)
        batch_size, description = settings.batch_size, f"rows from {first_row}"
        if share is None:
            return encoded, click_logits(model, Dataset(encoded), collator, batch_size, accelerator, description)
        logits = click_logits(ids, Dataset(encoded), ids_collator, batch_size, accelerator, description)
        logits["text_logits"] = np.full(len(encoded), np.nan, np.float32)
        chosen = least_sure(logits["logits"], share)
        if len(chosen):
            texts = Dataset(processor.encode(table.take(chosen)))
            found = click_logits(model, texts, collator, batch_size, accelerator, f"{description}, with their texts")
            for name, values in found.items():
                logits[name][chosen] = values
        return encoded, logits

    source = shown(settings.input)
    names = {"logits": "probability"}
    if mode == "joint":
        names |= {"id_logits": "id_probability", "text_logits": "text_probability"}
    schema = pa.schema([("row", pa.int64()), *((name, pa.float32()) for name in names.values())])
    fallbacks: Counter[tuple[str, str]] = Counter()
    num_rows = 0
    aside = settings.output.with_name(settings.output.name + ".new")
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    columns = [f.name for f in processor.fields]
    optional = [processor.label] if processor.label else []
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(aside.unlink, missing_ok=True)
        # Every process knows all scores; one writes them.
        writer = cleanup.enter_context(pq.ParquetWriter(aside, schema)) if accelerator.is_main_process else None
        cleanup.enter_context(rows_located(settings.input, columns, optional=optional, csv=settings.csv))
        for table in stream_tables(
            settings.input, columns, optional=optional, batch_rows=settings.chunk_rows, csv=settings.csv
        ):
            if len(table) == 0:
                continue
            encoded, logits = score(table, num_rows)
            for field, counts in count_fallbacks(encoded, processor.fields).items():
                fallbacks.update({(field, kind): number for kind, number in counts.items()})
            if writer is not None:
                scores = {name: pa.array(probabilities(logits[key]), from_pandas=True) for key, name in names.items()}
                writer.write_table(pa.table({"row": encoded["row"], **scores}).cast(schema))
            num_rows += len(table)
        if writer is not None:
            writer.close()
            os.replace(aside, settings.output)
    lines = [f"scored {num_rows} rows of {source} into {settings.output}"]
    lines += [f"  {printable(field)}: {number} {kind}" for (field, kind), number in sorted(fallbacks.items())]
    return "\n".join(lines)
