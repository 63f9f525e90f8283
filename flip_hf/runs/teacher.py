"""The teacher of knowledge distillation: a finetuned model whose click logits a student learns from.

For example, `flip-hf finetune --mode id --teacher runs/flip/model` trains an ID-based model that learns from both
towers. It costs no more to serve than any other ID-based model. Adding `--data.unlabeled_file pairs.parquet` also uses
rows without labels. `FlipTrainer` does not use this module; its rows need a column `teacher_logit`.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from accelerate import Accelerator

from flip_hf.data.collators import FlipCTRCollator
from flip_hf.data.schema import InputError
from flip_hf.data.sources import dataset_source
from flip_hf.nn.sharded_embeddings import sharded_features
from flip_hf.processing_flip import FlipProcessor
from flip_hf.runs.build import load_finetuned
from flip_hf.runs.data import UNLABELED, load_click_log
from flip_hf.runs.settings import DataSettings, FinetuneSettings
from flip_hf.scoring import click_logits


class Teacher:
    """A finetuned model, and the rows of a run with the fields of this model.

    Args:
        name: folder or Hub repository of the model.
        settings: settings of the run.

    Raises:
        ValueError: the model was never finetuned, or the rows lack one of its fields.
        OSError: the model does not exist.
    """

    def __init__(self, name: str, settings: FinetuneSettings) -> None:
        self._batch_size = settings.training.per_device_eval_batch_size
        with sharded_features(settings.training.shard_features):
            self._model = load_finetuned(name)
        self._processor = FlipProcessor.from_pretrained(name)
        try:
            data = _data_of_teacher(settings.data, self._processor)
            self._log = load_click_log(data, self._processor, split="train", needs_label=False)
        except (ValueError, InputError) as error:
            raise ValueError(f"teacher={name} can't read the rows of this run: {error}") from error

    def click_logits(self, accelerator: Accelerator) -> np.ndarray:
        """Computes the teacher's click logits of the training rows, then of the unlabelled rows, float32 (rows,).

        The processes share the work, and each gets the logits of all rows.

        Args:
            accelerator: the run's accelerator, which must not have prepared another model yet.
        """
        collator = FlipCTRCollator.from_model(self._processor, self._model)
        model = accelerator.prepare_model(self._model, device_placement=True, evaluation_mode=True)
        parts = []
        for split in ("train", UNLABELED):
            if split in self._log.splits:
                rows = self._log.encode(self._processor, split, with_label=False)
                scores = click_logits(model, rows, collator, self._batch_size, accelerator, f"teacher, {split} rows")
                parts.append(scores["logits"])
        # Otherwise, the accelerator keeps the teacher in memory until the end of the run.
        accelerator.free_memory()
        return np.concatenate(parts)


def _data_of_teacher(data: DataSettings, processor: FlipProcessor) -> DataSettings:
    """Returns settings for the same rows with the teacher's fields."""
    own: dict[str, Any] = {"fields": []}
    if data.source is not None:
        offered = {history.field.name for history in dataset_source(data.source).histories}
        fields = processor.fields
        own = {
            "fields": [{"name": f.name, "max_values": f.max_values} if f.name in offered else f.name for f in fields],
            "histories": [f.name for f in fields if f.name in offered],
        }
    return replace(data, **own, text_features=[], catalog_file=None, group_field=None)
