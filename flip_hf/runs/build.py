"""Processors and models from a run's settings."""

from typing import Any, TypeVar

from transformers import AutoConfig

from flip_hf.configuration_flip import FlipConfig
from flip_hf.fetch import resolve_pretrained
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
    )


def load_finetuned(cls: type[Model], name: str, mode: str | None = None) -> Model:
    """A model that has learned clicks, or one of its towers.

    Args:
        cls: `FlipForCTR`.
        name: folder or repository of the model.
        mode: "id" or "text" loads one tower of a model of both; the default is the saved mode.

    Raises:
        ValueError: the model was never finetuned, or it lacks the tower.
        OSError: there is no such model.
    """
    check_towers(name, mode)
    load: Any = cls
    model: Any = load.from_pretrained(name, **({"mode": mode} if mode else {}))
    model.check_finetuned()
    loaded: Model = model
    return loaded


def check_towers(name: str, mode: str | None) -> None:
    """Raises a ValueError where a saved model lacks the towers of a mode; reads its configuration alone.

    Args:
        name: folder or repository of the model.
        mode: "joint", "id" or "text"; None is the mode that the model was saved in.
    """
    saved = FlipConfig.from_pretrained(name).mode
    if mode not in (None, saved) and saved != "joint":
        raise ValueError(f"mode={mode}: {name} was saved in mode={saved} and has no other tower; leave mode out")


def new_model(cls: type[Model], settings: ModelSettings, processor: FlipProcessor, mode: str = "joint") -> Model:
    """A model with fresh heads and ID-based model, and where the mode has one the text encoder.

    Args:
        cls: `FlipForPreTraining` or `FlipForCTR`.
        settings: what to build.
        processor: fitted; gives the fields.
        mode: which towers.
    """
    encoder = resolve_pretrained(settings.text_encoder, "config")
    # The settings name no revision.
    text_config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)  # nosec B615
    config = FlipConfig(
        text_config=text_config,
        text_layers=settings.text_layers,
        fields=processor.fields,
        mode=mode,
        **settings.options,
    )
    build: Any = cls
    if mode == "id" or not settings.text_pretrained:
        model: Model = build(config)
        return model
    pretrained: Model = build.from_text_pretrained(settings.text_encoder, config)
    return pretrained
