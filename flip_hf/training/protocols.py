"""The interfaces that the training engine expects of models, collators, processors and runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from flip_hf.data.encoded_rows import Collator
from flip_hf.nn.fusion import GatedFusion, LearnedWeightFusion
from flip_hf.scoring import ScoredModel
from flip_hf.training.state import TrainingState


class TrainingCollator(Collator, Protocol):
    """A collator whose batches may differ from epoch to epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 0, of the next batches."""


class SavedProcessor(Protocol):
    """A processor that is saved beside a model, such as `FlipProcessor`."""

    def save_pretrained(self, save_directory: Path, /) -> Any:
        """Writes the processor's files into a folder."""


class PreparedModel(ScoredModel, Protocol):
    """A model that accelerate has prepared; in training, its output has a `loss`."""

    def train(self, mode: bool = True) -> Any:
        """Switches to training mode, or to evaluation mode if `mode` is False."""


class TrainableModel(PreparedModel, Protocol):
    """A FLIP model that accelerate has not wrapped: `FlipForPreTraining` or `FlipForCTR`."""

    @property
    def config(self) -> Any:
        """The `FlipConfig`."""

    @property
    def base_model(self) -> Any:
        """The `FlipModel`; its `text_model` and its `feature_embeddings` may be None."""

    @property
    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """The sharded parameters by name: each process holds different rows of them."""

    @property
    def contrasts_rows(self) -> bool:
        """Whether a part of the loss contrasts the rows of a batch with each other."""

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the number of items that each part of the loss sums over in a batch, by the part's name, int64 ()."""


class PretrainingModel(TrainableModel, Protocol):
    """The interface of `FlipForPreTraining`."""

    @property
    def objectives(self) -> nn.ModuleDict:
        """The objectives by name."""

    def contrastive_views(
        self, feature_ids: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the projected tabular and text vectors that ICL compares, float32 (B, projection_dim) each."""


class JointModel(TrainableModel, Protocol):
    """The interface of `FlipForCTR` with both towers."""

    @property
    def fusion(self) -> LearnedWeightFusion | GatedFusion:
        """The module that combines the two towers' logits into one."""


class TrainingRun(Protocol):
    """Where the training loop logs and saves; `flip_hf.runs.run.Run` is one.

    Attributes:
        folder: folder that receives all files of the run.
        accelerator: the run's accelerator.
        is_main: whether this process writes files.
        record: the run's record, written to `run.json` at the end.
    """

    folder: Path
    accelerator: Accelerator
    is_main: bool
    record: dict[str, Any]

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Adds a line to the log."""

    def save_model(self, model: PreparedModel, processor: SavedProcessor, result: Mapping[str, Any]) -> None:
        """Replaces the saved best model with this one."""

    def save_checkpoint(
        self, step: int, state: TrainingState, progress: Mapping[str, Any], processor: SavedProcessor
    ) -> None:
        """Saves everything that a run needs to continue from here."""

    def resume(self, state: TrainingState) -> dict[str, Any] | None:
        """Restores the state from the last checkpoint and returns its progress, or None without a checkpoint."""

    def close_trackers(self) -> None:
        """Finishes the experiment trackers."""
