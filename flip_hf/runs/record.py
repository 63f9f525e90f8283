"""The record of a run, and the comparison of settings that resuming needs."""

import json
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import cached_file

from flip_hf import __version__
from flip_hf.configuration_flip import FlipConfig
from flip_hf.data.files import without_credentials
from flip_hf.fields import FieldConfig, vector_sizes
from flip_hf.hub.card import flat, public_record
from flip_hf.runs.device import describe_hardware
from flip_hf.runs.folder import RECORD_NAME
from flip_hf.runs.settings import FinetuneSettings, PretrainSettings, RunSettings, as_plain, names_without_effect
from flip_hf.standard_json import measures_json

_PACKAGES = ("torch", "transformers", "accelerate", "datasets")
# Keys that say where a model's configuration comes from and which library wrote it.
_ORIGINS = ("_name_or_path", "transformers_version")


def new_record(settings: RunSettings, accelerator: Accelerator) -> dict[str, Any]:
    """Creates the record of a new run: its settings, the versions of packages, and the device."""
    record: dict[str, Any] = {
        "task": "pretraining" if isinstance(settings, PretrainSettings) else "finetuning",
        "settings": as_plain(settings),
        "command": [Path(sys.argv[0]).name, *map(without_credentials, sys.argv[1:])],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_at": [],
        "versions": {
            "python": platform.python_version(),
            "flip_hf": __version__,
            **{name: version(name) for name in _PACKAGES},
        },
        "device": {
            "kind": accelerator.device.type,
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "precision": accelerator.mixed_precision,
            **describe_hardware(),
        },
    }
    pretrained = settings.pretrained if isinstance(settings, FinetuneSettings) else None
    if pretrained is not None and (found := _record_beside(pretrained)) is not None:
        record["pretraining"] = json.loads(found.read_text(encoding="utf-8"))
    teacher = settings.teacher if isinstance(settings, FinetuneSettings) else None
    if teacher is not None:
        record["teacher"] = _describe_teacher(teacher)
    return record


def _record_beside(name: str) -> Path | None:
    """Finds the record of the run that trained a model, in its run's folder or beside it on the Hub.

    Args:
        name: folder or Hub repository of the model.

    Returns:
        The path of the record, or None if there is none.
    """
    if Path(name).exists():
        record = Path(name).parent / RECORD_NAME
        return record if record.is_file() else None
    found = cached_file(name, RECORD_NAME, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _describe_teacher(name: str) -> dict[str, Any]:
    """Describes the teacher for the record of its student; reads only the teacher's configuration and record.

    Args:
        name: folder or Hub repository of the teacher. For a folder, the record keeps only the last two parts of the
            path, such as `flip/model`.
    """
    config = FlipConfig.from_pretrained(name)
    shown = "/".join(Path(name).resolve().parts[-2:]) if Path(name).exists() else name
    described: dict[str, Any] = {"name": shown, "mode": config.mode, "backbone": config.backbone}
    if (found := _record_beside(name)) is not None:
        described["record"] = public_record(json.loads(found.read_text(encoding="utf-8")))
    return described


def describe_model(model: Any, processor: Any) -> dict[str, Any]:
    """Describes a model and its processor, for the model card."""
    config = model.config
    text: Any = config.text_config
    towers = {name: part for name, part in model.base_model.named_children() if any(True for _ in part.parameters())}
    return {
        "class": type(model).__name__,
        **{name: getattr(config, name) for name in ("mode", "backbone", "backbone_options", "embedding_dim", "fusion")},
        **{name: getattr(config, name) for name in ("objectives", "text_base_model", "text_pooling", "text_towers")},
        "text_layers": text.num_hidden_layers,
        "text_size": text.hidden_size,
        "features": config.num_features,
        "parameters": {
            "all": model.num_parameters(),
            **{name.replace("_", " "): sum(p.numel() for p in part.parameters()) for name, part in towers.items()},
        },
        "fields": [
            {"name": f.name, "kind": f.kind, "features": (f.num_features or 0) + sum(f.added_features)}
            for f in config.fields
        ],
        **_described_vectors(config.fields, processor),
    }


def _described_vectors(fields: Sequence[FieldConfig], processor: Any) -> dict[str, Any]:
    """Returns the vector sizes by field and the text features, each only if there are any."""
    sizes = vector_sizes(fields)
    features = [own.to_dict() for own in processor.vectors.features.values()]
    return ({"vector_sizes": sizes} if sizes else {}) | ({"text_features": features} if features else {})


def with_measures(record: Mapping[str, Any], started: float) -> dict[str, Any]:
    """Adds the wall time and the peak memory so far to a record.

    Args:
        record: the run's record.
        started: start of the run, from `time.monotonic`.
    """
    return {
        **record,
        "wall_seconds": round(time.monotonic() - started, 1),
        # Linux reports KiB.
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def deciding(values: Mapping[str, Any], kind: type[RunSettings]) -> dict[str, Any]:
    """Selects the values that affect a run's weights, under dotted names, as JSON types.

    Args:
        values: the run's settings, with any other values that affect the weights.
        kind: class of the settings.
    """
    found = flat(json.loads(measures_json(values, default=str)))
    without_effect = names_without_effect(kind)
    return {
        name: value
        for name, value in found.items()
        if not name.endswith(_ORIGINS) and not any(f"{name}.".startswith(f"{free}.") for free in without_effect)
    }


def refuse_differences(source: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError if two runs differ in values that affect the weights; it names up to three of these values.

    Args:
        source: the checkpoint or the record of the first run, for the error.
        before: values of the first run, from `deciding`.
        now: values of the second run, from `deciding`.
    """
    names = [*now, *(name for name in before if name not in now)]
    differing = [name for name in names if before.get(name) != now.get(name)]
    if differing:
        shown = [f"{name} was {before.get(name)!r:.80} and is {now.get(name)!r:.80}" for name in differing[:3]]
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise ValueError(
            f"{source} can't be resumed with different settings or data: {'; '.join(shown)}{more}. Resume with the "
            "original ones, or start a new run in another output_dir"
        )
