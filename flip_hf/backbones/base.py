"""The interface of ID-based models."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import nn


class BackboneOutput(NamedTuple):
    """Output of an ID-based model.

    Attributes:
        representation: float (B, representation_size), the tabular vector that the objectives align with the text.
        logits: float (B,), the click logits.
    """

    representation: torch.Tensor
    logits: torch.Tensor


class Backbone(nn.Module, ABC):
    """An ID-based model: turns the embeddings of the fields into a representation and a logit.

    It reads neither ids nor the configuration. The constructor takes `num_fields`, `embedding_dim` and its own keyword
    options with defaults, and must set `representation_size`.

    Attributes:
        extra_dim: number of columns of the feature table that it reads in addition to the `embedding_dim` columns of
            the embedding.
        representation_size: width of the representation.
        logit_module: name of the module whose bias is only added to the logit. The bias starts at zero and only click
            training changes it, so `FlipForCTR` can tell whether the logit was ever trained.
    """

    extra_dim: ClassVar[int] = 0
    logit_module: ClassVar[str] = "output"
    representation_size: int

    @abstractmethod
    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        """float (B, num_fields, embedding_dim + extra_dim) -> BackboneOutput."""
