"""Writes model cards; a run's record is their only source."""

import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from flip_hf.metrics import METRICS
from flip_hf.standard_json import measures_json

TEMPLATE = Path(__file__).with_name("card_template.md")

_PAPER = """@inproceedings{wang2024flip,
  author    = {Wang, Hangyu and Lin, Jianghao and Li, Xiangyang and Chen, Bo and Zhu, Chenxu and Tang, Ruiming and
               Zhang, Weinan and Yu, Yong},
  title     = {{FLIP}: Fine-grained Alignment between {ID}-based Models and Pretrained Language Models for {CTR} Prediction},
  booktitle = {Proceedings of the 18th ACM Conference on Recommender Systems},
  year      = {2024}
}"""  # noqa: E501
_TOWERS = {
    "joint": "an ID-based model and a text encoder, whose logits are combined with learned weights",
    "id": "an ID-based model",
    "text": "a text encoder",
    "aligned id": "the ID-based model of an aligned pair (FLIP_ID)",
    "aligned text": "the text encoder of an aligned pair (FLIP_PLM)",
    "text towers": "a text encoder that encodes groups of fields separately, with late fusion",
    "joint text towers": "an ID-based model and a text encoder that encodes groups of fields separately; their logits "
    "are combined with learned weights",
}
# The task under which the Hub's search lists the model; the Hub has no task for click-through rates.
_HUB_TASK = "tabular-classification"
_MARK = "flip_hf wrote this card; the next push replaces it unless it was edited: sha256"
_MARKER = re.compile(rf"\n<!-- {re.escape(_MARK)} ([0-9a-f]{{64}}) -->\n\Z")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#|!~$])")


class Markdown(str):
    """Text that is already Markdown and must not be escaped again."""


def escaped(value: object) -> Markdown:
    """Escapes a value so that it appears literally, on one line: Markdown and HTML in it have no effect."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_MARKDOWN.sub(r"\\\1", html.escape(_on_one_line(value), quote=False)))


def _on_one_line(value: object) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's record without the paths of its machine: only the last part of each absolute path is kept."""
    public: dict[str, Any] = _without_paths(json.loads(measures_json(record, default=str)))
    return public


def render_card(record: Mapping[str, Any], repo_id: str, pictures: Mapping[str, str]) -> str:
    """Renders a model card with its metadata.

    Args:
        record: record of a run (`run.json`).
        repo_id: Hub repository of the model, such as `org/name`.
        pictures: captions of the PNG files beside the card, by file name.

    Raises:
        KeyError: the record lacks an entry, because another version of flip_hf wrote it.
    """
    record = public_record(record)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, finalize=escaped, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {
        "code": lambda value: Markdown(measures_json(value, indent=4)),
        "verbatim": lambda value: Markdown(str(value).replace("```", "'''")),
        "number": lambda value: Markdown("" if value is None else f"{value:.4f}"),
        "interval": lambda value: Markdown(f"{value[0]:.4f} to {value[1]:.4f}" if _is_known(value) else ""),
        "duration": lambda seconds: Markdown(f"{int(seconds // 60)} min {int(seconds % 60):02d} s"),
        "url": lambda value: Markdown(re.sub(r"[^\w.:/?#=&%~-]", "", str(value))),
    }
    result = record["result"]
    intervals = result.get("test_intervals", {})
    metrics = [
        {
            "name": _metric_name(name),
            "validation": value,
            "test": result.get("test", {}).get(name),
            "interval": intervals.get(name),
        }
        for name, value in result["validation"].items()
    ]
    stages = {"Pretraining": record["pretraining"]} if record.get("pretraining") else {}
    stages["Finetuning" if record["task"] == "finetuning" else "Pretraining"] = record
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        record=record,
        task=record["task"],
        title=repo_id.split("/")[-1],
        repo=repo_id,
        what=_TOWERS[_towers(record)],
        metrics=metrics,
        has_test="test" in result,
        group_field=record["settings"]["data"].get("group_field") if "gauc" in result["validation"] else None,
        pictures=pictures,
        example=_example(record["model"]),
        data=record["data"],
        model=record["model"],
        teacher=_TOWERS[record["teacher"]["mode"]] if "teacher" in record else None,
        stages={name: _stage(run) for name, run in stages.items()},
        versions=[f"{name} {version}" for name, version in record["versions"].items()],
        paper=_PAPER,
    )
    return marked(f"---\n{_metadata(record, repo_id).to_yaml()}\n---\n{body}")


def marked(card: str) -> str:
    """Adds a checksum to a card, so that the next push can detect whether somebody has edited it."""
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"{card}\n<!-- {_MARK} {digest} -->\n"


def is_untouched(card: str) -> bool:
    """Returns whether `marked` wrote a card and nobody has edited it since."""
    found = _MARKER.search(card)
    return found is not None and hashlib.sha256(card[: found.start()].encode()).hexdigest() == found[1]


def _towers(record: Mapping[str, Any]) -> str:
    mode: str = record["model"]["mode"]
    if record["model"].get("text_towers") and mode != "id":
        return {"text": "text towers", "joint": "joint text towers"}[mode]
    return f"aligned {mode}" if record.get("pretraining") and mode != "joint" else mode


def _metadata(record: Mapping[str, Any], repo_id: str) -> ModelCardData:
    model, data, result = record["model"], record["data"], record["result"]
    dataset = data.get("dataset") or {"name": _on_one_line(data.get("name", "files of the user's own"))}
    results = [
        EvalResult(
            task_type=_HUB_TASK,
            task_name="Click-through-rate prediction",
            dataset_type=dataset["name"],
            dataset_name=dataset["name"],
            dataset_split="test",
            dataset_args={name: data[name] for name in ("split", "split_seed") if name in data}
            | {"fingerprint": data["fingerprints"]["test"]},
            metric_type=name,
            metric_name=_metric_name(name),
            metric_value=round(value, 6),
            metric_args={"interval": [round(end, 6) for end in result["test_intervals"][name]], "level": 0.95}
            if _is_known(result["test_intervals"].get(name))
            else None,
        )
        for name, value in result.get("test", {}).items()
        # AUC is undefined (None) if all rows have the same label.
        if value is not None
    ]
    # A name without an owner may be that of a folder.
    base = model["text_base_model"] if "/" in (model["text_base_model"] or "") else None
    return ModelCardData(
        library_name="flip_hf",
        pipeline_tag=_HUB_TASK,
        tags=["flip", "click-through-rate", "ctr-prediction", "recommendation", "arxiv:2310.19453"],
        base_model=base if model["mode"] != "id" else None,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
        ignore_metadata_errors=False,
    )


def _stage(run: Mapping[str, Any]) -> dict[str, Any]:
    device = run["device"]
    hardware = f"{device['processor']}, {device['cores']} cores, {device['memory_gib']} GiB"
    if device.get("accelerators"):
        hardware = f"{', '.join(device['accelerators'])}; {hardware}"
    precision = "bf16 autocast" if device["precision"] == "bf16" else "fp32"
    shown = {name: value for name, value in flat(run["settings"]).items() if value is not None}
    settings = {"hardware": hardware, "precision": precision, "flat_settings": shown}
    return {**run, **settings}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _is_known(interval: Sequence[float | None] | None) -> bool:
    return interval is not None and None not in interval


def _metric_name(name: str) -> str:
    tower, _, metric = name.rpartition("_")
    if metric not in METRICS:
        return name.replace("_", " ")
    shown = METRICS[metric].title
    return f"{shown} of the {'ID-based model' if tower == 'id' else 'text encoder'}" if tower else shown


def _example(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an example row with placeholder values of the right types."""
    values = {"numeric": 1.5, "multi_categorical": ["a", "b"], "sequence": ["a", "b"], "text": "some words"}
    sizes = model.get("vector_sizes", {})
    row = {
        f["name"]: [0.0] * sizes[f["name"]] if f["kind"] == "vector" else values.get(f["kind"], "a")
        for f in model["fields"]
    }
    for own in model.get("text_features", []):
        row |= {own["column"]: [0.0] * own["size"]} if "column" in own else {}
        row |= {name: "some words" for name in own.get("fields", []) if name not in row}
    return row


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str):
        # The path may follow the name of a flag, as in --output_dir=/home/me/run.
        head, equals, tail = value.rpartition("=")
        if PurePosixPath(tail).is_absolute() or tail.startswith("~") or PureWindowsPath(tail).is_absolute():
            return f"{head}{equals}{PureWindowsPath(tail).name}"
    return value
