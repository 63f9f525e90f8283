"""Reads from the files of a text encoder how it turns a text into one vector."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from flip_hf.configuration_flip import FlipConfig
from flip_hf.nn.pooling import TEXT_POOLING, last_pooling
from flip_hf.text_encoder import load_text_config

VECTOR_POOLING = {**TEXT_POOLING, "last": last_pooling}
"""How token states become the vector of a text."""

_MAX_LENGTH = 256
# sentence-transformers before 5.3 saved one flag for each mode instead of `pooling_mode`.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_REMEDY = "compute the vectors with sentence-transformers and add them as a column"


@dataclass(frozen=True)
class EncoderFiles:
    """A text encoder that is not loaded yet.

    Attributes:
        folder: folder of the weights and the tokenizer.
        saved_config: the text encoder's configuration, as in the file.
        text_config: the same configuration, as transformers reads it.
        flip_config: if the folder holds a saved FLIP model, its configuration in the mode `"text"`.
        pooling: a key of `VECTOR_POOLING`.
        normalize: whether vectors are scaled to an L2 norm of 1.
        max_length: maximum number of tokens of a text; None uses the tokenizer's limit.
        lower_case: whether texts are lower-cased before tokenisation.
    """

    folder: Path
    saved_config: Mapping[str, Any]
    text_config: Any
    flip_config: FlipConfig | None = None
    pooling: str = "mean"
    normalize: bool = True
    max_length: int | None = _MAX_LENGTH
    lower_case: bool = False

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Reads a folder of a sentence-transformers model, a FLIP model, or a plain transformers encoder.

        Raises:
            OSError: a file is missing.
            ValueError: a file does not describe an encoder whose vectors can be computed here.
        """
        if (folder / "modules.json").exists():
            return cls._of_sentence_transformer(folder)
        saved = _read_settings(folder / "config.json")
        if saved.get("model_type") != FlipConfig.model_type:
            return cls(folder, saved, _plain_config(folder))
        if saved.get("mode") == "id":
            raise ValueError(f"{folder}: a FLIP model of mode='id' has no text encoder")
        # Text towers share one encoder, which reads the text as a whole for text features.
        config = FlipConfig.from_pretrained(folder, mode="text", text_towers=None)
        return cls(folder, saved.get("text_config") or {}, config.text_config, config, config.text_pooling)

    @classmethod
    def _of_sentence_transformer(cls, folder: Path) -> Self:
        modules = folder / "modules.json"
        try:
            listed = [(str(module["type"]), PurePosixPath(module["path"])) for module in _read_json(modules)]
        except (LookupError, TypeError) as error:
            raise ValueError(f"{modules}: not a list of modules ({error!r})") from error
        if climbing := [path for _, path in listed if path.is_absolute() or ".." in path.parts]:
            raise ValueError(f"{modules}: the path {str(climbing[0])!r:.80} leaves the model's folder")
        # Custom code of a model may define modules of the same names.
        kinds = [kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind for kind, _ in listed]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise ValueError(
                f"{modules} lists {', '.join(f'{kind!r:.80}' for kind in kinds)}; flip_hf computes only Transformer, "
                f"Pooling and an optional Normalize, in this order: {_REMEDY}"
            )
        prompts = folder / "config_sentence_transformers.json"
        if prompts.exists() and _read_settings(prompts).get("default_prompt_name") is not None:
            raise ValueError(f"{folder}: default_prompt_name puts a prompt before each text: {_REMEDY}")
        inner = folder / listed[0][1]
        # Older versions named this file after the encoder, such as sentence_roberta_config.json.
        found = sorted(inner.glob("sentence_*_config.json"))
        settings = _read_settings(found[0]) if found else {}
        max_length = settings.get("max_seq_length")
        if not (max_length is None or (isinstance(max_length, int) and max_length > 0)):
            raise ValueError(f"{found[0]}: max_seq_length={max_length!r:.80} must be a whole number of at least 1")
        return cls(
            inner,
            _read_settings(inner / "config.json"),
            _plain_config(inner),
            pooling=_read_pooling(folder / listed[1][1] / "config.json"),
            normalize="Normalize" in kinds,
            max_length=max_length,
            lower_case=bool(settings.get("do_lower_case")),
        )


def _read_pooling(path: Path) -> str:
    """The key of `VECTOR_POOLING` for the settings of sentence-transformers' Pooling module."""
    settings = _read_settings(path)
    modes = settings.get("pooling_mode") or [mode for flag, mode in _POOLING_FLAGS.items() if settings.get(flag)]
    modes = modes if isinstance(modes, list) else [modes]
    names = ["last" if mode == "lasttoken" else str(mode) for mode in modes or ["mean"]]
    if len(names) > 1 or names[0] not in VECTOR_POOLING:
        shown, known = " + ".join(names), ", ".join(VECTOR_POOLING)
        raise ValueError(f"{path}: pooling {shown!r:.80} is not one of {known}: {_REMEDY}")
    return names[0]


def _plain_config(folder: Path) -> Any:
    config: Any = load_text_config(str(folder))
    if config.is_encoder_decoder or not hasattr(config, "hidden_size") or not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"{folder}: a model of type {config.model_type!r} is not a text encoder")
    return config


def _read_settings(path: Path) -> dict[str, Any]:
    settings = _read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object of settings")
    return settings


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
