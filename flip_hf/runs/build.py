"""Builds processors and models from a run's settings."""

from typing import Any, TypeVar

from flip_hf.configuration_flip import FlipConfig
from flip_hf.modeling_flip import FlipForCTR
from flip_hf.processing_flip import FlipProcessor
from flip_hf.runs.data import ClickLog
from flip_hf.runs.settings import ModelSettings

Model = TypeVar("Model")


def fit_processor(log: ClickLog, settings: ModelSettings) -> FlipProcessor:
    """Fits a processor on the training rows only."""
    return FlipProcessor.fit(
        log.splits["train"],
        log.fields,
        settings.text_encoder,
        label=log.label,
        max_length=settings.max_length,
        source=log.sources["train"],
        csv=log.csv,
        text_features=log.text_features,
        catalog=log.catalog,
    )


def load_finetuned(name: str, mode: str | None = None) -> FlipForCTR:
    """Loads a finetuned model, or one of its towers.

    Args:
        name: folder or Hub repository of the model.
        mode: "id" or "text" loads only this tower of a joint model; the default is the saved mode.

    Raises:
        ValueError: the model was never finetuned, or it lacks the tower.
        OSError: the model does not exist.
    """
    check_towers(name, mode)
    model: FlipForCTR = FlipForCTR.from_pretrained(name, mode=mode)
    model.check_finetuned()
    return model


def check_towers(name: str, mode: str | None) -> None:
    """Raises ValueError if a saved model lacks a tower that a mode needs; reads only the model's configuration.

    Args:
        name: folder or Hub repository of the model.
        mode: "joint", "id" or "text"; None is the saved mode.
    """
    saved = FlipConfig.from_pretrained(name).mode
    if mode not in (None, saved) and saved != "joint":
        raise ValueError(f"mode={mode}: {name} was saved in mode={saved} and has only that tower; leave mode out")


def new_model(
    cls: type[Model], settings: ModelSettings, processor: FlipProcessor, mode: str = "joint", **options: Any
) -> Model:
    """Builds a model with a new ID-based model and new heads; by default, the text encoder is pretrained.

    Args:
        cls: `FlipForPreTraining` or `FlipForCTR`.
        settings: settings of the model.
        processor: the fitted processor. It provides the fields and, for pretraining, the frequencies of the features.
        mode: the towers to build: "joint", "id" or "text".
        options: more settings of `FlipConfig`, in addition to `settings.options`.
    """
    build: Any = cls
    model: Model = build.from_text_pretrained(
        settings.text_encoder,
        processor=processor,
        text_weights=settings.text_pretrained,
        text_layers=settings.text_layers,
        mode=mode,
        **settings.options,
        **options,
    )
    return model
