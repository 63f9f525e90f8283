"""Arrow tables in, Arrow tables out: what engines that map tables over many machines call, such as Ray Data."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from flip_hf.modeling_flip import FlipForCTR
from flip_hf.pipeline import CTRPredictionPipeline
from flip_hf.processing_flip import FlipProcessor


class BatchEncoder:
    """Encodes tables of rows as `FlipProcessor.encode` does.

    Args:
        processor: folder or repository of the processor.
        with_label: whether to read the label too.
    """

    def __init__(self, processor: str | Path, with_label: bool = False) -> None:
        self.processor = FlipProcessor.from_pretrained(processor)
        self.with_label = with_label

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The encoded rows, without `row`: a table that is mapped does not know how many there are before it.

        Raises:
            InputError: as in `FlipProcessor.encode`; rows are counted within the table.
        """
        return self.processor.encode(rows, with_label=self.with_label).drop_columns(["row"])


class BatchScorer:
    """Adds a column of click probabilities to tables of rows.

    Args:
        model: folder or repository of a finetuned `FlipForCTR` and its processor.
        mode: serve both towers or one; by default as the model was saved.
        kwargs: as in `CTRPredictionPipeline`, such as `text_budget`, `batch_size` or `device`.
    """

    def __init__(self, model: str | Path, mode: str | None = None, **kwargs: Any) -> None:
        loaded = FlipForCTR.from_pretrained(model, **({} if mode is None else {"mode": mode}))
        self.predict = CTRPredictionPipeline(loaded, FlipProcessor.from_pretrained(model), **kwargs)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The table with `probability`, float32.

        Raises:
            InputError: as in `FlipProcessor.encode`; rows are counted within the table.
            ValueError: the table has a column of that name.
        """
        if "probability" in rows.column_names:
            raise ValueError(
                "the rows have a column 'probability' already; rename it, so that the scores don't hide it"
            )
        # An engine may send a table without rows.
        results: Any = self.predict(rows) if len(rows) else []
        scores = pa.array([result["probability"] for result in results], pa.float32())
        return rows.append_column("probability", scores)
