"""Checks of a saved processor's files, before anything is built from them."""

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from flip_hf.checkpoint.loading_file import PROCESSOR_AUTO_MAP
from flip_hf.data.schema import InputError
from flip_hf.data.text_features import TextFeatures, as_text_features
from flip_hf.fields import FieldConfig, as_fields, with_nearest

HUB_SETTINGS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "proxies")
"""transformers' settings for locating the files of a repository."""

# Other settings that transformers' loading functions take or pass on.
_LOADING_SETTINGS = ("trust_remote_code", "code_revision", "config", "use_fast", "tokenizer_type", "adapter_kwargs")
# Settings that every tokenizer takes in addition to the parameters of its class.
_TOKENIZER_SETTINGS = (
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    *("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens", "split_special_tokens"),
    *("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "add_prefix_space"),
    *("add_bos_token", "add_eos_token", "model_input_names", "chat_template", "fix_mistral_regex", "verbose"),
)


def check_loading_settings(settings: Mapping[str, Any], tokenizer: Any) -> None:
    """Raises ValueError for a setting of `FlipProcessor.from_pretrained` that no code reads."""
    # A pipeline loads the processor with the model's settings, which the model has already checked.
    if "_from_pipeline" in settings:
        return
    parameters = [p for cls in type(tokenizer).__mro__[:-1] for p in inspect.signature(cls).parameters.values()]
    of_class = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = dict.fromkeys(["max_length", *HUB_SETTINGS, *_LOADING_SETTINGS, *_TOKENIZER_SETTINGS, *of_class])
    # Settings with a leading underscore are internal to transformers.
    if unknown := [name for name in settings if name not in known and not name.startswith("_")]:
        raise ValueError(f"FlipProcessor.from_pretrained has no setting {with_nearest(unknown, known)}")


class ProcessorSettings(NamedTuple):
    """The content of `processor_config.json`.

    Attributes:
        fields: the fitted fields.
        text_features: the fitted text features.
        label: the label column.
        max_length: maximum number of tokens of a row's text.
        has_loading_code: whether the file refers to the loading code.
    """

    fields: list[FieldConfig]
    text_features: list[TextFeatures]
    label: str | None
    max_length: int
    has_loading_code: bool


def read_processor_settings(path: str, processor_classes: Collection[str]) -> ProcessorSettings:
    """Reads `processor_config.json`.

    Args:
        path: path of the file.
        processor_classes: accepted values of `processor_class`.

    Raises:
        InputError: the file does not describe a FLIP processor.
    """
    try:
        settings = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(settings, dict) or not isinstance(settings["fields"], list):
            raise ValueError("the file must hold an object whose 'fields' is a list")
        if (kind := settings.get("processor_class")) not in (None, *processor_classes):
            raise ValueError(f"processor_class={kind!r:.80} is not a FLIP processor")
        FieldConfig.check_saved(settings["fields"], Path(path).name)
        fields = as_fields(settings["fields"])
        label, max_length = settings["label"], settings["max_length"]
        if not (label is None or isinstance(label, str)) or label in [f.name for f in fields]:
            raise ValueError(f"label={label!r:.80} must be null or a column that is not a field")
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length={max_length!r:.80} must be a whole number of at least 1")
        if unfitted := [f.name for f in fields if f.num_features is None]:
            raise ValueError(f"field {unfitted[0]!r} has no num_features")
        features = as_text_features(settings.get("text_features", []), fields)
        sizes = {f.name: f.vector_size for f in fields if f.vector_size is not None}
        if sizes != {own.field: own.size for own in features}:
            raise ValueError("text_features and the fields with a vector_size do not match")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"these are not the settings of a FLIP processor: {error}", source=path) from error
    has_loading_code = settings.get("auto_map") == PROCESSOR_AUTO_MAP
    return ProcessorSettings(fields, features, label, max_length, has_loading_code)


def load_tokenizer(name: str, hub: Mapping[str, Any], kwargs: Mapping[str, Any], config: PreTrainedConfig) -> Any:
    """Loads a tokenizer and never runs code from its files.

    Args:
        name: folder or Hub repository of the tokenizer.
        hub: settings for locating its files (`HUB_SETTINGS`).
        kwargs: settings for `AutoTokenizer.from_pretrained`.
        config: configuration of the text encoder.

    Raises:
        OSError: the files can't be found or read.
        InputError: the files do not describe a tokenizer of transformers.
    """
    try:
        settings = get_tokenizer_config(name, **hub)
        named = settings.get("tokenizer_class")
        kind = getattr(transformers, named, None) if named is not None else None
        # transformers would load any of its classes that is named here, even a model with a pickle.
        if kind is not None and not (isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase)):
            raise ValueError(f"tokenizer_class={named!r} is not a tokenizer")
        if kind is None and settings.get("auto_map"):
            raise ValueError("auto_map names custom code, which is never run; save it as a tokenizer of transformers")
        if climbing := [n for n in settings.get("fast_tokenizer_files") or () if Path(n).name != n]:
            raise ValueError(f"fast_tokenizer_files names {climbing[0]!r:.80}, which is not in the same folder")
        # With a configuration, transformers reads no other. Without trust_remote_code, it would ask at the terminal.
        settings = {**kwargs, "config": config, "trust_remote_code": False}
        return AutoTokenizer.from_pretrained(name, **settings)  # nosec B615
    except OSError:
        raise
    # transformers and tokenizers raise errors of any type for invalid content of these files.
    except Exception as error:
        raise InputError(f"the tokenizer's files can't be read: {error}", source=name) from error
