"""Checks the inputs of a model's `forward`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

Vectors: TypeAlias = Mapping[str, torch.Tensor] | None
"""For each field that owns vectors, the distinct vectors of a batch, float (1, vectors, size)."""


def takes_known_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a model's `forward`: raises an error for unknown or missing inputs, and names the right collator.

    PEFT passes `inputs_embeds=None` to every model, so None is accepted; any other value is an error.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    known = {p.name for p in parameters}
    required = [p.name for p in parameters if p.default is p.empty]

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError(f"{type(self).__name__} reads input_ids: inputs_embeds must be None")
        unknown = [name for name in kwargs if name not in known]
        absent = [name for name in required[len(args) :] if name not in kwargs]
        if unknown or absent:
            wrong = f"does not take {', '.join(unknown)}" if unknown else f"needs {', '.join(absent)}"
            raise TypeError(f"{type(self).__name__} {wrong}; make its batches with {self.collator}")
        return forward(self, *args, **kwargs)

    return checked
