"""Configuration of FLIP: what the fields are, and how the two towers are built. Needs no torch of its own."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from flip_hf.loading_file import CONFIG_AUTO_MAP, write_loading_file

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

BUCKETINGS = ("quantile", "log")
MODES = ("joint", "id", "text")
FUSIONS = ("learned_weight", "gated")
TEXT_POOLINGS = ("cls", "mean")
MTM_LOSSES = ("nce", "sampled_softmax", "full_softmax")
MTM_NEGATIVES = ("field", "global")


@dataclass(frozen=True)
class FieldKindTraits:
    """What the models must know of a kind of field; how its values are read is in `flip_hf.data.kinds`.

    Args:
        settings: the `FieldConfig` settings that only some kinds have, of those that this one has.
        has_features: whether the tabular view shows it.
        is_bag: whether a row holds any number of values.
    """

    settings: frozenset[str]
    has_features: bool = True
    is_bag: bool = False


_VALUES = frozenset({"min_count", "hash_buckets", "share_embedding"})
_SEVERAL = _VALUES | {"separator", "max_values"}

FIELD_KINDS: dict[str, FieldKindTraits] = {
    "categorical": FieldKindTraits(_VALUES),
    "numeric": FieldKindTraits(frozenset({"bucketing", "num_buckets"})),
    "multi_categorical": FieldKindTraits(_SEVERAL, is_bag=True),
    "sequence": FieldKindTraits(_SEVERAL | {"target", "text_values"}, is_bag=True),
    "text": FieldKindTraits(frozenset(), has_features=False),
}
"""The kinds of field."""


@dataclass(frozen=True)
class FieldConfig:
    """One field (column) of the click log and how both views show it.

    Args:
        name: column name.
        text_name: words that name the field in the text; by default `name` with spaces for underscores.
        kind: `"categorical"`, one value a row; `"numeric"`, a number, by its bucket in the table and as it is in the
            text; `"multi_categorical"`, any number of values whose order means nothing; `"sequence"`, values in the
            order of time, the most recent last; `"text"`, shown in the text only.
        max_tokens: tokens that the field may contribute to a row's text; the rest is cut and counted.
        min_count: values seen fewer times than this in fitting share the field's OOV feature.
        hash_buckets: values hash into this many features, none is remembered and none is OOV; for fields with too
            many values to keep.
        share_embedding: name of the field whose features (vocabulary and rows of the feature table) this field uses
            too.
        separator: what stands between the values of a multi-valued column of strings; a column of lists needs none.
        max_values: most values of a row that the tabular view shows; of a sequence the last ones.
        target: name of the single-valued field whose embedding attends to the sequence's, as in DIN (Zhou et al., KDD
            2018, arXiv 1706.06978, Section 4.3); without it the sequence is averaged.
        text_values: most values of a sequence that the text shows, the most recent first; by default `max_values`.
        bucketing: a number's bucket is one of `"quantile"`, equally many training rows in each, or `"log"`, equal
            ratios between the bounds.
        num_buckets: most buckets.
        num_features: rows of the feature table that the field owned when it was fitted, OOV and MISSING included.
        added_features: rows added by each `FlipProcessor.extend` since.
    """

    name: str
    text_name: str | None = None
    kind: str = "categorical"
    max_tokens: int = 64
    min_count: int = 1
    hash_buckets: int | None = None
    share_embedding: str | None = None
    separator: str | None = None
    max_values: int = 20
    target: str | None = None
    text_values: int | None = None
    bucketing: str = "quantile"
    num_buckets: int = 32
    num_features: int | None = None
    added_features: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a field needs a column name, such as FieldConfig('user_id'); got {self.name!r}")
        if self.kind not in FIELD_KINDS:
            raise ValueError(f"field {self.name!r}: kind={self.kind!r} is not one of {', '.join(FIELD_KINDS)}")
        for setting in _SEVERAL | {"target", "text_values", "bucketing", "num_buckets"}:
            if setting not in self.traits.settings and getattr(self, setting) != _DEFAULTS[setting]:
                kinds = ", ".join(name for name, traits in FIELD_KINDS.items() if setting in traits.settings)
                raise ValueError(
                    f"field {self.name!r}: {setting} is a setting of the kinds {kinds}, not of kind={self.kind!r}"
                )
        least = {"max_tokens": 1, "min_count": 1, "hash_buckets": 1, "max_values": 1, "text_values": 1}
        least |= {"num_buckets": 2, "num_features": NUM_RESERVED_FEATURES if self.owns_features else 0}
        for setting, number in least.items():
            value = getattr(self, setting)
            if value is None and _DEFAULTS[setting] is None:
                continue
            if not isinstance(value, int) or value < number:
                raise ValueError(
                    f"field {self.name!r}: {setting}={value!r} must be a whole number of at least {number}"
                )
        if self.bucketing not in BUCKETINGS:
            raise ValueError(f"field {self.name!r}: bucketing={self.bucketing!r} is not one of {', '.join(BUCKETINGS)}")
        if self.separator == "":
            raise ValueError(f"field {self.name!r}: separator must not be empty")
        object.__setattr__(self, "added_features", tuple(self.added_features))
        own = [setting for setting in ("min_count", "hash_buckets") if getattr(self, setting) != _DEFAULTS[setting]]
        if self.share_embedding is not None and own:
            raise ValueError(
                f"field {self.name!r}: {own[0]} belongs to {self.share_embedding!r}, whose features it uses"
            )
        if len(own) == 2:
            raise ValueError(f"field {self.name!r}: min_count has no meaning with hash_buckets; set one of the two")

    @property
    def traits(self) -> FieldKindTraits:
        """What the models must know of the field's kind."""
        return FIELD_KINDS[self.kind]

    @property
    def owns_features(self) -> bool:
        """Whether rows of the feature table are this field's own."""
        return self.traits.has_features and self.share_embedding is None

    @property
    def num_positions(self) -> int:
        """Columns of `feature_ids` that the field takes."""
        if not self.traits.has_features:
            return 0
        return self.max_values if self.traits.is_bag else 1

    @property
    def display_name(self) -> str:
        """The words that name the field in the text."""
        return self.text_name if self.text_name is not None else self.name.replace("_", " ")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FieldConfig":
        """The field that `to_dict` wrote down; a setting that does not exist is a ValueError."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"field {values.get('name')!r}: unknown settings {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not at their defaults, as plain JSON types."""
        values = {name: value for name, value in asdict(self).items() if value != _DEFAULTS.get(name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def fitted(self, num_features: int) -> "FieldConfig":
        """This field with the size that fitting gave it."""
        return replace(self, num_features=num_features)

    def extended(self, num_features: int) -> "FieldConfig":
        """This field with so many features more."""
        return replace(self, added_features=(*self.added_features, num_features))


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(FieldConfig) if f.name != "name"}


def as_fields(values: Sequence[FieldConfig | dict[str, Any] | str]) -> list[FieldConfig]:
    """Fields from what users and JSON files hold: FieldConfig, dict or plain column name.

    Raises:
        ValueError: two fields have one name, or a field names another that can't be what it says.
    """
    result = []
    for value in values:
        if isinstance(value, dict):
            result.append(FieldConfig.from_dict(value))
        else:
            result.append(FieldConfig(value) if isinstance(value, str) else value)
    names = [f.name for f in result]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"fields named twice: {', '.join(repeated)}")
    by_name = {f.name: f for f in result}
    for f in result:
        for setting in ("share_embedding", "target"):
            other = getattr(f, setting)
            if other is not None and other not in by_name:
                raise ValueError(f"field {f.name!r}: {setting}={other!r} is not the name of a field")
        if f.share_embedding is not None:
            owner = by_name[f.share_embedding]
            if not owner.owns_features or "share_embedding" not in owner.traits.settings:
                raise ValueError(f"field {f.name!r}: {owner.name!r} has no features of its own to share")
        if f.target is not None and by_name[f.target].num_positions != 1:
            raise ValueError(f"field {f.name!r}: target={f.target!r} must be a field with one feature a row")
    return result


def tabular_fields(fields: Sequence[FieldConfig]) -> list[FieldConfig]:
    """The fields that the tabular view shows, in order."""
    return [f for f in fields if f.traits.has_features]


def owned_ranges(fields: Sequence[FieldConfig]) -> list[list[tuple[int, int]]]:
    """For each field the ranges (first, end) of the global id space that it owns.

    The first range is what fitting found, OOV and MISSING at its head; each `FlipProcessor.extend` adds one behind
    everything that was there, so that ids never change.

    Raises:
        ValueError: a field has no `num_features` yet.
    """
    ranges: list[list[tuple[int, int]]] = [[] for _ in fields]
    end = NUM_SHARED_FEATURES
    generations = max((len(f.added_features) for f in fields), default=0)
    for generation in range(-1, generations):
        for own, f in zip(ranges, fields, strict=True):
            if f.num_features is None:
                raise ValueError(
                    f"field {f.name!r} is not fitted; pass the fields of a fitted processor: processor.fields"
                )
            size = f.num_features if generation < 0 else (*f.added_features, *[0] * generations)[generation]
            if f.owns_features and (generation < 0 or size):
                own.append((end, end + size))
                end += size
    return ranges


def feature_ranges(fields: Sequence[FieldConfig]) -> list[list[tuple[int, int]]]:
    """For each field of the tabular view the ranges (first, end) of the ids that it may hold: its own, or those it
    shares.

    The first id of the first range is the OOV feature, the next one the MISSING feature.
    """
    by_name = dict(zip((f.name for f in fields), owned_ranges(fields), strict=True))
    return [by_name[f.share_embedding or f.name] for f in tabular_fields(fields)]


def num_features(fields: Sequence[FieldConfig]) -> int:
    """Rows of the feature table."""
    return max((end for ranges in owned_ranges(fields) for _, end in ranges), default=NUM_SHARED_FEATURES)


@strict
class FlipConfig(PreTrainedConfig):
    """Configuration of the FLIP models (Wang et al., RecSys 2024, arXiv 2310.19453).

    Args:
        text_config: configuration of the text encoder, any transformers encoder (BERT by default).
        fields: the fitted fields, `processor.fields`; their order is the order of `feature_ids`, in which a field
            takes `num_positions` columns.
        mode: `"joint"` builds both towers, `"id"` the ID-based model alone, `"text"` the text encoder alone.
        embedding_dim: width of a feature's embedding.
        feature_initializer_range: standard deviation of the feature table at the start. Much smaller values leave
            the tabular vector almost the same for every row, and the contrastive loss does not move.
        backbone: name of the ID-based model, a key of `flip_hf.backbones.BACKBONES`.
        backbone_options: keyword arguments of that backbone, such as `{"hidden_sizes": [256, 128]}`.
        text_base_model: the checkpoint that the text encoder's weights came from, for the model card; set by
            `from_text_pretrained`.
        text_layers: build only the first layers of the text encoder; all by default.
        text_pooling: `"mean"` over tokens, or `"cls"` as in the paper (Section 3.3).
        fusion: how a joint model's two logits become one: `"learned_weight"`, the paper's, or `"gated"`, by a gate that
            sees which fields are OOV.
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
    # What Trainer does not collect over an evaluation: it has no value for each row.
    keys_to_ignore_at_inference: ClassVar = ["id_loss", "text_loss", "feature_penalty"]

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    fields: list[Any] = field(default_factory=list)
    mode: str = "joint"
    embedding_dim: int = 32
    feature_initializer_range: int | float = 0.1
    backbone: str = "dcnv2"
    backbone_options: dict[str, Any] = field(default_factory=dict)
    text_base_model: str | None = None
    text_layers: int | None = None
    text_pooling: str = "mean"
    fusion: str = "learned_weight"
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
            ("fusion", FUSIONS),
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
    def tabular_fields(self) -> list[FieldConfig]:
        """The fields that the tabular view shows, in order."""
        return tabular_fields(self.fields)

    @property
    def feature_ranges(self) -> list[list[tuple[int, int]]]:
        """For each field of the tabular view the ranges (first, end) of the ids that it may hold."""
        return feature_ranges(self.fields)

    @property
    def num_features(self) -> int:
        """Rows of the feature table."""
        return num_features(self.fields)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers; what was loaded from a checkpoint with loading code is saved with it."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        if getattr(self, "auto_map", None) == CONFIG_AUTO_MAP:
            write_loading_file(Path(save_directory))

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain JSON types."""
        output: dict[str, Any] = super().to_dict()
        output["fields"] = [f.to_dict() for f in self.fields]
        if output["text_config"] is not None:
            # Where the text encoder lay on the machine that built this; transformers leaves out only FLIP's own.
            output["text_config"].pop("_name_or_path", None)
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
