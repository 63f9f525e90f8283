"""Configuration of FLIP: what the fields are, and how the two towers are built. Needs no torch of its own."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

PADDING_ID = 0
"""Feature id that stands for nothing; its embedding is zero."""
MASK_ID = 1
"""Feature id that replaces a masked feature in the tabular view."""
IGNORED_LABEL = -100
"""Label of a position that was not masked."""
NUM_SHARED_FEATURES = 2
"""Rows at the head of the feature table that belong to no field: padding and mask."""
OOV_OFFSET = 0
"""Place of a field's out-of-vocabulary (OOV) feature within the field's own range."""
MISSING_OFFSET = 1
"""Place of a field's MISSING feature within the field's own range."""
NUM_RESERVED_FEATURES = 2
"""Features at the head of each field's range that stand for no value: OOV and MISSING."""

FIELD_KINDS = ("categorical",)
MODES = ("joint", "id", "text")
TEXT_POOLINGS = ("cls", "mean")
MTM_LOSSES = ("nce", "sampled_softmax", "full_softmax")
MTM_NEGATIVES = ("field", "global")


@dataclass(frozen=True)
class FieldConfig:
    """One field (column) of the click log and how both views show it.

    Args:
        name: column name.
        text_name: words that name the field in the text; by default `name` with spaces for underscores.
        kind: one of `FIELD_KINDS`.
        min_count: values seen fewer times than this in fitting share the field's OOV feature.
        max_tokens: tokens that one value may contribute to the text; the rest is cut and counted.
        num_features: rows of the feature table that the field owns, OOV and MISSING included; set by fitting.
    """

    name: str
    text_name: str | None = None
    kind: str = "categorical"
    min_count: int = 1
    max_tokens: int = 64
    num_features: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a field needs a column name, such as FieldConfig('user_id'); got {self.name!r}")
        if self.kind not in FIELD_KINDS:
            raise ValueError(f"field {self.name!r}: kind={self.kind!r} is not one of {', '.join(FIELD_KINDS)}")
        for setting, least in (("min_count", 1), ("max_tokens", 1), ("num_features", NUM_RESERVED_FEATURES)):
            value = getattr(self, setting)
            if setting == "num_features" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"field {self.name!r}: {setting}={value!r} must be a whole number of at least {least}")

    @property
    def display_name(self) -> str:
        """The words that name the field in the text."""
        return self.text_name if self.text_name is not None else self.name.replace("_", " ")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FieldConfig":
        """The field that `dataclasses.asdict` wrote down; a setting that does not exist is a ValueError."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"field {values.get('name')!r}: unknown settings {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def fitted(self, num_features: int) -> "FieldConfig":
        """This field with the size that fitting gave it."""
        return replace(self, num_features=num_features)


def as_fields(values: Sequence[FieldConfig | dict[str, Any] | str]) -> list[FieldConfig]:
    """Fields from what users and JSON files hold: FieldConfig, dict or plain column name. Names must differ."""
    result = []
    for value in values:
        if isinstance(value, dict):
            result.append(FieldConfig.from_dict(value))
        else:
            result.append(FieldConfig(value) if isinstance(value, str) else value)
    names = [f.name for f in result]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"fields named twice: {', '.join(repeated)}")
    return result


def field_bounds(fields: Sequence[FieldConfig]) -> list[int]:
    """Ends of the fields' ranges in the global id space, `len(fields) + 1` numbers: field `i` owns ids `b[i]:b[i + 1]`.

    Raises:
        ValueError: a field has no `num_features` yet.
    """
    bounds = [NUM_SHARED_FEATURES]
    for f in fields:
        if f.num_features is None:
            raise ValueError(f"field {f.name!r} is not fitted; pass the fields of a fitted processor: processor.fields")
        bounds.append(bounds[-1] + f.num_features)
    return bounds


@strict
class FlipConfig(PreTrainedConfig):
    """Configuration of the FLIP models (Wang et al., RecSys 2024, arXiv 2310.19453).

    Args:
        text_config: configuration of the text encoder, any transformers encoder (BERT by default).
        fields: the fitted fields, `processor.fields`; their order is the order of `feature_ids`.
        mode: `"joint"` builds both towers, `"id"` the ID-based model alone, `"text"` the text encoder alone.
        embedding_dim: width of a feature's embedding.
        feature_initializer_range: standard deviation of the feature table at the start. Much smaller values leave
            the tabular vector almost the same for every row, and the contrastive loss does not move.
        backbone: name of the ID-based model, a key of `flip_hf.backbones.BACKBONES`.
        backbone_options: keyword arguments of that backbone, such as `{"hidden_sizes": [256, 128]}`.
        text_layers: build only the first layers of the text encoder; all by default.
        text_pooling: `"mean"` over tokens, or `"cls"` as in the paper (Section 3.3).
        head_dropout: dropout before the heads.
        objectives: weight of each pretraining objective, keys of `flip_hf.objectives.OBJECTIVES`.
        projection_dim: width of the space in which ICL compares the views.
        contrastive_temperature: temperature of ICL.
        mtm_loss: `"nce"` (the paper's), `"sampled_softmax"` or `"full_softmax"`.
        mtm_negatives: sampled inside the masked feature's own `"field"`, or `"global"` over all features.
        mtm_num_negatives: sampled negatives of each masked feature. A field with no more features than this is scored
            exactly when negatives come from the field.
    """

    model_type = "flip"
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert")}

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    fields: list[Any] = field(default_factory=list)
    mode: str = "joint"
    embedding_dim: int = 32
    feature_initializer_range: int | float = 0.1
    backbone: str = "dcnv2"
    backbone_options: dict[str, Any] = field(default_factory=dict)
    text_layers: int | None = None
    text_pooling: str = "mean"
    head_dropout: int | float = 0.1
    objectives: dict[str, Any] = field(default_factory=lambda: {"mlm": 1.0, "mtm": 1.0, "icl": 1.0})
    projection_dim: int = 128
    contrastive_temperature: int | float = 0.1
    mtm_loss: str = "nce"
    mtm_negatives: str = "field"
    mtm_num_negatives: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.fields = as_fields(self.fields)
        self.num_labels = 1
        if self.text_layers is not None:
            # A copy: the caller's text configuration may serve other models too.
            self.text_config = _first_layers(copy.deepcopy(self.text_config), self.text_layers)

    def validate_choices(self) -> None:
        """Each setting that is one of a few words."""
        for setting, allowed in (
            ("mode", MODES),
            ("text_pooling", TEXT_POOLINGS),
            ("mtm_loss", MTM_LOSSES),
            ("mtm_negatives", MTM_NEGATIVES),
        ):
            if (value := getattr(self, setting)) not in allowed:
                raise ValueError(f"FlipConfig: {setting}={value!r} is not one of {', '.join(allowed)}")

    def validate_ranges(self) -> None:
        """Each setting that is a number with bounds."""
        for setting in ("embedding_dim", "projection_dim", "mtm_num_negatives"):
            if (value := getattr(self, setting)) < 1:
                raise ValueError(f"FlipConfig: {setting}={value} must be at least 1")
        if self.contrastive_temperature <= 0:
            raise ValueError(f"FlipConfig: contrastive_temperature={self.contrastive_temperature} must be positive")
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"FlipConfig: head_dropout={self.head_dropout} must be in [0, 1)")
        if not any(weight > 0 for weight in self.objectives.values()) or min(self.objectives.values()) < 0:
            raise ValueError(
                f"FlipConfig: objectives={self.objectives} need weights of 0 or more, one of them positive"
            )

    @property
    def field_bounds(self) -> list[int]:
        """Ends of the fields' id ranges, `len(fields) + 1` numbers."""
        return field_bounds(self.fields)

    @property
    def num_features(self) -> int:
        """Rows of the feature table."""
        return self.field_bounds[-1]

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain JSON types."""
        output: dict[str, Any] = super().to_dict()
        output["fields"] = [asdict(f) for f in self.fields]
        return output


def _first_layers(text_config: Any, layers: int) -> Any:
    depth = text_config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise ValueError(f"FlipConfig: text_layers={layers}, but the text encoder has {depth} layers")
    text_config.num_hidden_layers = layers
    # Encoders with more than one kind of layer list the kinds, one a layer.
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = list(text_config.layer_types)[:layers]
    return text_config


# Also a tokenizer's loading reads config.json, and warns of a model type that it does not know.
AutoConfig.register("flip", FlipConfig, exist_ok=True)
