"""FLIP for Hugging Face: click-through-rate prediction from ids and text."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Heavy modules are imported when one of their names is first used.
_MODULE_OF = {
    "FieldConfig": "configuration_flip",
    "FlipConfig": "configuration_flip",
    "FlipModel": "modeling_flip",
    "FlipForPreTraining": "modeling_flip",
    "FlipForCTR": "modeling_flip",
    "FlipProcessor": "processing_flip",
    "FlipCTRCollator": "data.collators",
    "FlipPretrainingCollator": "data.collators",
}

__all__ = [
    "FieldConfig",
    "FlipCTRCollator",
    "FlipConfig",
    "FlipForCTR",
    "FlipForPreTraining",
    "FlipModel",
    "FlipPretrainingCollator",
    "FlipProcessor",
]

if TYPE_CHECKING:
    from flip_hf.configuration_flip import FieldConfig, FlipConfig
    from flip_hf.data.collators import FlipCTRCollator, FlipPretrainingCollator
    from flip_hf.modeling_flip import FlipForCTR, FlipForPreTraining, FlipModel
    from flip_hf.processing_flip import FlipProcessor


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
