"""Scores of a file's rows, in a stream."""

import contextlib
import itertools
import os
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from datasets import Dataset

from flip_hf.data.collators import FlipCTRCollator
from flip_hf.data.fallbacks import FallbackReport
from flip_hf.data.files import rows_located, shown, stream_tables
from flip_hf.data.sampling import least_sure
from flip_hf.fields import printable
from flip_hf.processing_flip import FlipProcessor
from flip_hf.progress import progress_bar
from flip_hf.runs.settings import PredictSettings
from flip_hf.runs.table_writers import check_values, ending_of, open_writer
from flip_hf.training.evaluation import click_logits, probabilities


def predict_file(
    model: Any, processor: FlipProcessor, collator: Any, settings: PredictSettings, accelerator: Accelerator
) -> str:
    """Scores CSV or Parquet files chunk by chunk; memory does not grow with the files.

    Writes `row` (int64, from 0), the columns that `settings.keep` names, as they are, `probability` (float32), and with
    both towers `id_probability` and `text_probability`, which is null where the text was not read. The format is that
    of the file's name, one of `flip_hf.runs.table_writers.WRITERS`. The file appears under its name when it is
    complete.

    Args:
        model: a prepared `FlipForCTR`.
        processor: the model's.
        collator: for the model's mode.
        settings: what to read and write.
        accelerator: what prepared the model.

    Returns:
        What was done, as text: with the number of times that each field fell back, and a warning of each field that is
        unseen or missing in a far larger share of the rows than in training.

    Raises:
        InputError: the file can't be read, lacks a column, or holds a value that can't be an id, or that the format of
            the output can't hold.
        ValueError: `text_budget` is no share of the rows, or the model has not both towers; or a kept column has the
            name of one that is written.
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
    if taken := [name for name in settings.keep if name in ("row", *names.values())]:
        raise ValueError(
            f"keep: {taken[0]!r} is also the name of a column that is written; rename the column in {source}"
        )
    read = [f.name for f in processor.fields]
    columns = list(dict.fromkeys([*read, *settings.keep]))
    optional = [processor.label] if processor.label and processor.label not in columns else []
    report = FallbackReport(processor.vocabulary)
    num_rows = 0
    ending = ending_of(settings.output)
    aside = settings.output.with_name(settings.output.name + ".new")
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup, contextlib.ExitStack() as written:
        cleanup.enter_context(rows_located(settings.input, columns, optional=optional, csv=settings.csv))
        tables = stream_tables(
            settings.input, columns, optional=optional, batch_rows=settings.chunk_rows, csv=settings.csv
        )
        # Whatever keeps the output from being written is known before anything is scored.
        first = next(tables)
        kept = [first.schema.field(name) for name in dict.fromkeys(settings.keep)]
        probability = [pa.field(name, pa.float32()) for name in names.values()]
        schema = pa.schema([pa.field("row", pa.int64()), *kept, *probability])
        writer = None
        # Every process knows all scores; one writes them.
        if accelerator.is_main_process:
            cleanup.callback(aside.unlink, missing_ok=True)
            compression = "gzip" if ending.endswith(".gz") else None
            sink = written.enter_context(pa.output_stream(str(aside), compression=compression))
            writer = written.enter_context(open_writer(sink, ending, schema))
        bar = written.enter_context(progress_bar(desc="scoring", unit=" rows", disable=not accelerator.is_main_process))
        for table in itertools.chain([first], tables):
            if len(table) == 0:
                continue
            check_values(ending, table.select([field.name for field in kept]), num_rows, source)
            encoded, logits = score(table.select(read), num_rows)
            report.add(encoded, table.slice)
            if writer is not None:
                scores = {name: pa.array(probabilities(logits[key]), from_pandas=True) for key, name in names.items()}
                copied = {field.name: table[field.name] for field in kept}
                writer.write_table(pa.table({"row": encoded["row"], **copied, **scores}).cast(schema))
            num_rows += len(table)
            bar.update(len(table))
        written.close()
        if accelerator.is_main_process:
            os.replace(aside, settings.output)
    lines = [f"scored {num_rows} rows of {source} into {settings.output}"]
    for field, counts in sorted(report.counts.items()):
        lines += [f"  {printable(field)}: {number} {kind}" for kind, number in sorted(counts.items())]
    return "\n".join([*lines, *report.warnings(source)])
