"""The contract that ID-based models share."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import nn


class BackboneOutput(NamedTuple):
    """What an ID-based model makes of a row.

    representation: float (B, representation_size), the tabular vector that the objectives align with the text.
    logits: float (B,), the click logit.
    """

    representation: torch.Tensor
    logits: torch.Tensor


class Backbone(nn.Module, ABC):
    """An ID-based model: field embeddings in, a representation and a logit out.

    It sees neither ids nor configuration. The constructor takes `num_fields`, `embedding_dim` and keyword options of
    its own with defaults, and sets `representation_size`.

    Attributes:
        extra_dim: columns that it reads from the feature table behind the `embedding_dim` of the embedding.
        representation_size: width of the representation.
        logit_module: name of the module whose bias shifts the logit and nothing else. It starts at zero and only clicks
            train it, by which `FlipForCTR` knows whether the logit was ever trained.
    """

    extra_dim: ClassVar[int] = 0
    logit_module: ClassVar[str] = "output"
    representation_size: int

    @abstractmethod
    def forward(self, embeddings: torch.Tensor) -> BackboneOutput:
        """float (B, num_fields, embedding_dim + extra_dim) -> BackboneOutput."""
