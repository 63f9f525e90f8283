"""Processors and models from a run's settings."""

from typing import Any, TypeVar

from flip_hf.configuration_flip import FlipConfig
from flip_hf.modeling_flip import FlipForCTR
from flip_hf.processing_flip import FlipProcessor
from flip_hf.runs.data import ClickLog
from flip_hf.runs.settings import ModelSettings

Model = TypeVar("Model")


def fit_processor(log: ClickLog, settings: ModelSettings) -> FlipProcessor:
    """A processor fitted on the training rows alone."""
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
    """A model that has learned clicks, or one of its towers.

    Args:
        name: folder or repository of the model.
        mode: "id" or "text" loads one tower of a model of both; the default is the saved mode.

    Raises:
        ValueError: the model was never finetuned, or it lacks the tower.
        OSError: there is no such model.
    """
    check_towers(name, mode)
    model: FlipForCTR = FlipForCTR.from_pretrained(name, mode=mode)
    model.check_finetuned()
    return model


def check_towers(name: str, mode: str | None) -> None:
    """Raises a ValueError where a saved model lacks the towers of a mode; reads its configuration alone.

    Args:
        name: folder or repository of the model.
        mode: "joint", "id" or "text"; None is the mode that the model was saved in.
    """
    saved = FlipConfig.from_pretrained(name).mode
    if mode not in (None, saved) and saved != "joint":
        raise ValueError(f"mode={mode}: {name} was saved in mode={saved} and has no other tower; leave mode out")


def new_model(
    cls: type[Model], settings: ModelSettings, processor: FlipProcessor, mode: str = "joint", **options: Any
) -> Model:
    """A model with fresh heads and ID-based model, and where the mode has one the text encoder.

    Args:
        cls: `FlipForPreTraining` or `FlipForCTR`.
        settings: what to build.
        processor: fitted; gives the fields and, for pretraining, how often each feature was seen.
        mode: which towers.
        options: settings of `FlipConfig` beside those of `settings.options`.
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
