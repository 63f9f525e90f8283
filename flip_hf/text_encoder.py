"""Loads the text encoder of a FLIP model from a plain transformers checkpoint."""

import logging
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from flip_hf.checkpoint.load_report import some_of, without_load_report
from flip_hf.fetch import resolve_pretrained

logger = logging.getLogger(__name__)

_WHERE = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
LOADING_ARGUMENTS = frozenset(
    {
        *_WHERE,
        "adapter_kwargs",
        "attn_implementation",
        "device_map",
        "disable_mmap",
        "dtype",
        "experts_implementation",
        "ignore_mismatched_sizes",
        "kernel_config",
        "key_mapping",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "quantization_config",
        "torch_dtype",
        "use_kernels",
        "variant",
    }
)
"""Arguments of transformers' `from_pretrained` that say where a text encoder's weights are and how to load them."""


def load_text_config(name_or_path: str, **kwargs: Any) -> PreTrainedConfig:
    """Loads the configuration of a text encoder, with the attention implementation of the caller's choice.

    Args:
        name_or_path: as in `load_text_encoder`.
        kwargs: `LOADING_ARGUMENTS`; those that concern weights are ignored.

    Raises:
        flip_hf.fetch.FetchError: the name was not found anywhere.
    """
    read = {name: value for name, value in kwargs.items() if name in (*_WHERE, "attn_implementation")}
    # The caller chooses the revision. Without trust_remote_code=False, transformers would ask at the terminal.
    config: PreTrainedConfig = AutoConfig.from_pretrained(  # nosec B615
        resolve_pretrained(name_or_path, "config", revision=kwargs.get("revision"), token=kwargs.get("token")),
        **{"trust_remote_code": False, **read},
    )
    return config


def load_text_encoder(name_or_path: str, text_config: Any, **kwargs: Any) -> PreTrainedModel:
    """Loads the text encoder of a plain transformers checkpoint, from safetensors only.

    Args:
        name_or_path: a local folder, or a repository's name, as in `flip_hf.fetch.resolve_pretrained`.
        text_config: configuration of the encoder to build; it may have fewer layers than the checkpoint.
        kwargs: `LOADING_ARGUMENTS`. Custom code of the checkpoint runs only with `trust_remote_code=True`.

    Raises:
        ValueError: the checkpoint does not fit `text_config`.
        flip_hf.fetch.FetchError: the name was not found anywhere.
    """
    path = resolve_pretrained(name_or_path, revision=kwargs.get("revision"), token=kwargs.get("token"))
    saved = load_text_config(path, **kwargs)
    for setting in ("model_type", "hidden_size", "vocab_size"):
        if getattr(text_config, setting) != getattr(saved, setting):
            raise ValueError(
                f"config.text_config has {setting}={getattr(text_config, setting)!r}, but the text encoder "
                f"{name_or_path} has {getattr(saved, setting)!r}; build the configuration with "
                f"text_config=AutoConfig.from_pretrained({str(path)!r})"
            )
    with without_load_report():
        text_model, info = AutoModel.from_pretrained(  # nosec B615
            path,
            config=text_config,
            output_loading_info=True,
            use_safetensors=True,
            **{"trust_remote_code": False, **kwargs},
        )
    if missing := sorted(k for k in info["missing_keys"] if not k.startswith("pooler.")):
        raise ValueError(f"the text encoder {name_or_path} lacks weights: {some_of(missing)}")
    if unexpected := [name for name in info["unexpected_keys"] if not _is_left_out(name, text_model)]:
        logger.warning("%s holds weights that its configuration does not have: %s", path, some_of(unexpected))
    loaded: PreTrainedModel = text_model
    return loaded


def _is_left_out(name: str, text_model: Any) -> bool:
    """Whether a weight of the checkpoint is left out on purpose: of a head, of the pooler or of a later layer."""
    inner = name.removeprefix(f"{text_model.base_model_prefix}.")
    parts = inner.split(".")
    layers = [int(part) for part in parts if part.isdigit()]
    if layers and layers[0] >= text_model.config.num_hidden_layers:
        return True
    return parts[0] == "pooler" or parts[0] not in dict(text_model.named_children())
