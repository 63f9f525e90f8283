"""FLIP for Hugging Face: click-through-rate prediction from ids and text."""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from flip_hf.configuration_flip import FlipConfig
from flip_hf.data.collators import FlipCTRCollator, FlipPretrainingCollator
from flip_hf.data.text_features import TextFeatures
from flip_hf.fields import FieldConfig
from flip_hf.hub import push_to_hub
from flip_hf.modeling_flip import FlipForCTR, FlipForPreTraining, FlipModel
from flip_hf.pipeline import CTRPredictionPipeline
from flip_hf.processing_flip import FlipProcessor

if TYPE_CHECKING:
    from flip_hf.data.history import add_history
    from flip_hf.training.trainer import FlipTrainer

__version__ = "0.1.0"

__all__ = [
    "CTRPredictionPipeline",
    "FieldConfig",
    "FlipCTRCollator",
    "FlipConfig",
    "FlipForCTR",
    "FlipForPreTraining",
    "FlipModel",
    "FlipPretrainingCollator",
    "FlipProcessor",
    "FlipTrainer",
    "TextFeatures",
    "add_history",
    "push_to_hub",
]

# Imported on first use, so that loading and scoring a model does not import transformers' Trainer.
_LAZY = {
    "FlipTrainer": "flip_hf.training.trainer",
    "add_history": "flip_hf.data.history",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


# transformers' registries take classes, not names, so everything that they register must be imported.
AutoConfig.register(FlipConfig.model_type, FlipConfig, exist_ok=True)
AutoModel.register(FlipConfig, FlipModel, exist_ok=True)
AutoModelForPreTraining.register(FlipConfig, FlipForPreTraining, exist_ok=True)
AutoModelForSequenceClassification.register(FlipConfig, FlipForCTR, exist_ok=True)
AutoProcessor.register(FlipConfig, FlipProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "ctr-prediction",
    pipeline_class=CTRPredictionPipeline,
    pt_model=AutoModelForSequenceClassification,
    type="multimodal",
)
