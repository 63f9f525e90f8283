"""What the engine asks of those that use it."""

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
        """Tells it the epoch, from 0, that the next batches belong to."""


class SavedProcessor(Protocol):
    """What is saved beside a model; `FlipProcessor` is one."""

    def save_pretrained(self, save_directory: Path, /) -> Any:
        """Writes its files into a folder."""


class PreparedModel(ScoredModel, Protocol):
    """A model as accelerate prepared it; in training its output has a `loss`."""

    def train(self, mode: bool = True) -> Any:
        """Switches to training."""


class TrainableModel(PreparedModel, Protocol):
    """A FLIP model that is not wrapped; `FlipForPreTraining` and `FlipForCTR` are ones."""

    @property
    def config(self) -> Any:
        """The `FlipConfig`."""

    @property
    def base_model(self) -> Any:
        """The `FlipModel`, with its `text_model` and `feature_embeddings`, each of which may be None."""

    @property
    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """By name, the parameters of which every process holds rows of its own."""

    @property
    def contrasts_rows(self) -> bool:
        """Whether a part of its loss contrasts the rows of a batch with each other."""

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What each part of the loss over a batch is summed over, by the part's name, int64 ()."""


class PretrainingModel(TrainableModel, Protocol):
    """`FlipForPreTraining`."""

    @property
    def objectives(self) -> nn.ModuleDict:
        """The objectives by name."""

    def contrastive_views(
        self, feature_ids: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The projected vectors that ICL compares, float32 (B, projection_dim) twice."""


class JointModel(TrainableModel, Protocol):
    """`FlipForCTR` of both towers."""

    @property
    def fusion(self) -> LearnedWeightFusion | GatedFusion:
        """What makes one logit of the towers' two."""


class TrainingRun(Protocol):
    """Where the training loop logs and saves; `flip_hf.runs.run.Run` is one.

    Attributes:
        folder: holds all that is saved.
        accelerator: what the run computes with.
        is_main: whether this process writes.
        record: what the run writes down at its end.
    """

    folder: Path
    accelerator: Accelerator
    is_main: bool
    record: dict[str, Any]

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Adds a line to the log."""

    def save_model(self, model: PreparedModel, processor: SavedProcessor, result: Mapping[str, Any]) -> None:
        """Replaces the best model so far by this one."""

    def save_checkpoint(
        self, step: int, state: TrainingState, progress: Mapping[str, Any], processor: SavedProcessor
    ) -> None:
        """Saves all that a run needs to go on from here."""

    def resume(self, state: TrainingState) -> dict[str, Any] | None:
        """Puts the state back to where the last checkpoint was saved, and returns the progress that came with it."""

    def close_trackers(self) -> None:
        """Ends what experiment trackers have begun."""
