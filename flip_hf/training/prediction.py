"""Scores of a file's rows, in a stream."""

import contextlib
import os
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from datasets import Dataset

from flip_hf.configuration_flip import printable
from flip_hf.data.tables import stream_tables
from flip_hf.processing_flip import FlipProcessor, count_fallbacks
from flip_hf.training.evaluation import click_logits, probabilities
from flip_hf.training.run_config import PredictRun


def predict_file(
    model: Any, processor: FlipProcessor, collator: Any, settings: PredictRun, accelerator: Accelerator
) -> str:
    """Scores a CSV or Parquet file chunk by chunk; memory does not grow with the file.

    Writes Parquet with `row` (int64, from 0), `probability` (float32), and with both towers `id_probability` and
    `text_probability`. The file appears under its name when it is complete.

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
    """
    mode = accelerator.unwrap_model(model).config.mode
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
        for table in stream_tables(settings.input, columns, optional=optional, batch_rows=settings.chunk_rows):
            if len(table) == 0:
                continue
            encoded = Dataset(processor.encode(table, first_row=num_rows, source=str(settings.input)))
            for field, counts in count_fallbacks(encoded, processor.fields).items():
                fallbacks.update({(field, kind): number for kind, number in counts.items()})
            description = f"rows from {num_rows}"
            logits = click_logits(model, encoded, collator, settings.batch_size, accelerator, description)
            if writer is not None:
                scores = {name: probabilities(logits[key]) for key, name in names.items()}
                writer.write_table(pa.table({"row": encoded.data["row"], **scores}).cast(schema))
            num_rows += len(table)
        if writer is not None:
            writer.close()
            os.replace(aside, settings.output)
    lines = [f"scored {num_rows} rows of {settings.input} into {settings.output}"]
    lines += [f"  {printable(field)}: {number} {kind}" for (field, kind), number in sorted(fallbacks.items())]
    return "\n".join(lines)
