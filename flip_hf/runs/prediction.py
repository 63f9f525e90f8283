"""Streams rows from files and writes their click probabilities."""

import contextlib
import itertools
import os

import numpy as np
import pyarrow as pa
from accelerate import Accelerator

from flip_hf.data.encoded_rows import Collator
from flip_hf.data.files import rows_located, shown, stream_tables
from flip_hf.fields import printable
from flip_hf.processing_flip import FlipProcessor
from flip_hf.progress import progress_bar
from flip_hf.runs.settings import PredictSettings
from flip_hf.runs.table_writers import check_values, ending_of, open_writer
from flip_hf.scoring import ClickScorer, ScoredModel, check_text_budget, probabilities, probability_names


def predict_file(
    model: ScoredModel,
    processor: FlipProcessor,
    collator: Collator,
    settings: PredictSettings,
    accelerator: Accelerator,
) -> str:
    """Scores CSV or Parquet files chunk by chunk; memory use does not depend on the size of the files.

    The output has `row` (int64, from 0), the columns in `settings.keep` unchanged, and `probability` (float32). A joint
    model adds `id_probability` and `text_probability`, which is null if the row's text was not read. The name of the
    output selects the format (`flip_hf.runs.table_writers.WRITERS`). The file appears only once it is complete.

    Args:
        model: a prepared `FlipForCTR`.
        processor: the model's processor.
        collator: the collator for the model's mode.
        settings: settings of the prediction.
        accelerator: the accelerator that prepared the model.

    Returns:
        A summary as text. It counts the fallbacks of each field, and warns about fields with a far larger share of
        unseen or missing values than in training.

    Raises:
        InputError: a file can't be read or lacks a column, or a value can't be an id or can't be stored in the output's
            format.
        ValueError: `text_budget` is not a share from 0 to 1, or the model does not have both towers; or a kept column
            has the same name as a column that is written.
    """
    mode: str = accelerator.unwrap_model(model).config.mode
    check_text_budget(settings.text_budget, mode)
    scorer = ClickScorer(model, processor, collator, accelerator)
    source = shown(settings.input)
    names = probability_names(mode)
    if taken := [name for name in settings.keep if name in ("row", *names)]:
        raise ValueError(
            f"keep: the output has its own column {taken[0]!r}; rename the column in {source}, or do not keep it"
        )
    read = [f.name for f in processor.fields]
    columns = list(dict.fromkeys([*read, *settings.keep]))
    optional = [processor.label] if processor.label and processor.label not in columns else []
    num_rows = 0
    ending = ending_of(settings.output)
    aside = settings.output.with_name(settings.output.name + ".new")
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup, contextlib.ExitStack() as written:
        cleanup.enter_context(rows_located(settings.input, columns, optional=optional, csv=settings.csv))
        tables = stream_tables(
            settings.input, columns, optional=optional, batch_rows=settings.chunk_rows, csv=settings.csv
        )
        # Open the output before scoring, so that errors in writing it come first.
        first = next(tables)
        kept = [first.schema.field(name) for name in dict.fromkeys(settings.keep)]
        probability = [pa.field(name, pa.float32()) for name in names]
        schema = pa.schema([pa.field("row", pa.int64()), *kept, *probability])
        writer = None
        # Every process has all scores; only the main process writes them.
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
            logits = scorer(
                table.select(read),
                settings.batch_size,
                text_budget=settings.text_budget,
                first_row=num_rows,
                source=source,
                description=f"rows from {num_rows}",
            )
            if writer is not None:
                rows = np.arange(num_rows, num_rows + len(table))
                copied = {field.name: table[field.name] for field in kept}
                scores = {name: probabilities(logits[key]) for name, key in names.items()}
                writer.write_table(pa.table({"row": rows, **copied, **scores}).cast(schema))
            num_rows += len(table)
            bar.update(len(table))
        written.close()
        if accelerator.is_main_process:
            os.replace(aside, settings.output)
    lines = [f"scored {num_rows} rows of {source} into {settings.output}"]
    for field, counts in sorted(scorer.report.counts.items()):
        lines += [f"  {printable(field)}: {number} {kind}" for kind, number in sorted(counts.items())]
    return "\n".join([*lines, *scorer.report.warnings(source)])
