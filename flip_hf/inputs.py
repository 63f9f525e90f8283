"""What a model's `forward` says of inputs that it does not take."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

Vectors: TypeAlias = Mapping[str, torch.Tensor] | None
"""For each field that owns vectors the distinct ones of a batch, float (1, vectors, size)."""


def takes_known_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a model's `forward`: refuses inputs that it does not take, and says which collator makes those it does.

    PEFT passes `inputs_embeds=None` to every model, which is taken; a value is refused.
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
            raise TypeError(f"{type(self).__name__} {wrong}; batches for it are made by {self.collator}")
        return forward(self, *args, **kwargs)

    return checked
