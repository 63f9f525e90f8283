"""Configuration of FLIP: what the fields are, and how the two towers are built. Needs no torch of its own."""

import copy
import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from flip_hf.loading_file import CONFIG_AUTO_MAP, write_loading_file

logger = logging.getLogger(__name__)

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

MOST_FIELDS = 2048
"""Most fields of a row: the text of more has no room for their names."""
MOST_POSITIONS = 16_384
"""Most columns of `feature_ids`: what is as wide is read for every row, whatever the row holds."""
MOST_EXTENSIONS = 4096
"""Most times that a field can be extended."""

BUCKETINGS = ("quantile", "log")
MODES = ("joint", "id", "text")
FUSIONS = ("learned_weight", "gated")
TEXT_POOLINGS = ("cls", "mean")
MTM_LOSSES = ("nce", "sampled_softmax", "full_softmax")
MTM_NEGATIVES = ("field", "global")
PRETRAINING_OBJECTIVES = ("mlm", "mtm", "icl", "text_mlm")
"""The keys of `flip_hf.objectives.OBJECTIVES`."""


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


_VALUES = frozenset({"min_count", "hash_buckets", "share_embedding", "show_oov"})
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
        show_oov: whether the text shows values that fitting did not keep. Of a title they tell something; of an id that
            names and does not describe they mislead the text encoder: with False such a value is shown as missing, and
            left out where a field shows several.
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
        value_hashes: fingerprints of the values that got features of their own in fitting and in each extension, by
            which a processor and a model know that they belong together.
    """

    name: str
    text_name: str | None = None
    kind: str = "categorical"
    max_tokens: int = 64
    min_count: int = 1
    hash_buckets: int | None = None
    share_embedding: str | None = None
    show_oov: bool = True
    separator: str | None = None
    max_values: int = 20
    target: str | None = None
    text_values: int | None = None
    bucketing: str = "quantile"
    num_buckets: int = 32
    num_features: int | None = None
    added_features: tuple[int, ...] = ()
    value_hashes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a field needs a column name, such as FieldConfig('user_id'); got {self.name!r}")
        for setting in ("text_name", "kind", "share_embedding", "separator", "target", "bucketing"):
            value = getattr(self, setting)
            if not isinstance(value, str) and (value is not None or _DEFAULTS[setting] is not None):
                raise ValueError(f"field {self.name!r}: {setting}={value!r} must be a string")
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
            if not _is_whole(value) or value < number:
                raise ValueError(
                    f"field {self.name!r}: {setting}={value!r} must be a whole number of at least {number}"
                )
        if self.bucketing not in BUCKETINGS:
            raise ValueError(f"field {self.name!r}: bucketing={self.bucketing!r} is not one of {', '.join(BUCKETINGS)}")
        if self.separator == "":
            raise ValueError(f"field {self.name!r}: separator must not be empty")
        added = self.added_features
        if not isinstance(added, list | tuple) or not all(_is_whole(n) and n >= 0 for n in added):
            raise ValueError(f"field {self.name!r}: added_features={added!r} must be whole numbers of at least 0")
        if len(added) > MOST_EXTENSIONS:
            raise ValueError(f"field {self.name!r}: extended {len(added)} times, {MOST_EXTENSIONS} are the most")
        object.__setattr__(self, "added_features", tuple(added))
        hashes = self.value_hashes
        if not isinstance(hashes, list | tuple) or not all(isinstance(value, str) for value in hashes):
            raise ValueError(f"field {self.name!r}: value_hashes={hashes!r:.80} must be strings")
        if hashes and len(hashes) != 1 + len(added):
            raise ValueError(
                f"field {self.name!r}: {len(hashes)} value_hashes for a field that was extended {len(added)} times"
            )
        object.__setattr__(self, "value_hashes", tuple(hashes))
        own = [setting for setting in ("min_count", "hash_buckets") if getattr(self, setting) != _DEFAULTS[setting]]
        if self.share_embedding is not None and own:
            raise ValueError(
                f"field {self.name!r}: {own[0]} belongs to {self.share_embedding!r}, whose features it uses"
            )
        if not isinstance(self.show_oov, bool):
            raise ValueError(f"field {self.name!r}: show_oov={self.show_oov!r} must be true or false")
        others = [setting for setting in ("min_count", "show_oov") if getattr(self, setting) != _DEFAULTS[setting]]
        if self.hash_buckets is not None and others:
            raise ValueError(f"field {self.name!r}: {others[0]} has no meaning with hash_buckets; set one of the two")

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
        cls.check_names(values)
        return cls(**values)

    @classmethod
    def check_saved(cls, fields: Any, source: str) -> None:
        """Raises ValueError for settings of fields in a saved file that this version does not have.

        Args:
            fields: what the file holds as the fields; the check ignores what is not a list of dicts.
            source: the file's name.
        """
        for values in fields if isinstance(fields, list) else []:
            if isinstance(values, dict):
                try:
                    cls.check_names(values)
                except ValueError as error:
                    raise ValueError(
                        f"{source}: {error}; written by a newer version? Upgrade flip_hf, because the model would "
                        "differ without them"
                    ) from error

    @classmethod
    def check_names(cls, values: Mapping[str, Any]) -> None:
        """Raises ValueError for settings, by their names, that a field does not have."""
        known = sorted(f.name for f in fields(cls))
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"field {values.get('name')!r}: unknown settings {with_nearest(unknown, known)}")

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not at their defaults, as plain JSON types."""
        values = {name: value for name, value in asdict(self).items() if value != _DEFAULTS.get(name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def fitted(self, num_features: int, value_hash: str | None = None) -> "FieldConfig":
        """This field with the size that fitting gave it, and the fingerprint of its values."""
        return replace(self, num_features=num_features, value_hashes=() if value_hash is None else (value_hash,))

    def extended(self, num_features: int, value_hash: str) -> "FieldConfig":
        """This field with so many features more, and the fingerprint of their values."""
        # A field that was fitted by an earlier version has none.
        hashes = (*self.value_hashes, value_hash) if self.value_hashes else ()
        return replace(self, added_features=(*self.added_features, num_features), value_hashes=hashes)


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(FieldConfig) if f.name != "name"}


def with_nearest(unknown: Iterable[str], known: Collection[str]) -> str:
    """Unknown names for an error message, each with the known name that is nearest, or with all where none is near."""
    shown = []
    for name in unknown:
        near = nearest(name, known)
        shown.append(f"{name!r} (did you mean {near!r}?)" if near else f"{name!r} (known: {', '.join(known)})")
    return ", ".join(shown)


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most like a misspelt one; None where none is like it."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def as_fields(values: Sequence[FieldConfig | dict[str, Any] | str]) -> list[FieldConfig]:
    """Fields from what users and JSON files hold: FieldConfig, dict or plain column name.

    Raises:
        ValueError: the fields are not a list, two have one name, a field names another that can't be what it says, or
            there are too many.
    """
    if isinstance(values, str | bytes | Mapping | FieldConfig) or not isinstance(values, Iterable):
        raise ValueError(
            f"fields={values!r:.80} must be a list of column names and FieldConfig; put a single one into a list"
        )
    values = list(values)
    if len(values) > MOST_FIELDS:
        raise ValueError(f"{len(values)} fields: a model has {MOST_FIELDS} at most")
    result = []
    for value in values:
        if isinstance(value, dict):
            result.append(FieldConfig.from_dict(value))
        elif isinstance(value, str | FieldConfig):
            result.append(FieldConfig(value) if isinstance(value, str) else value)
        else:
            raise ValueError(f"a field is a column name or a dict of settings; got {value!r}")
    if repeated := sorted(name for name, number in Counter(f.name for f in result).items() if number > 1):
        raise ValueError(f"fields named twice: {', '.join(map(repr, repeated))}")
    if (num_positions := sum(f.num_positions for f in result)) > MOST_POSITIONS:
        widest = max(result, key=lambda f: f.num_positions)
        raise ValueError(
            f"field {widest.name!r}: max_values={widest.max_values}, and all fields together take {num_positions} "
            f"columns of feature_ids; {MOST_POSITIONS} are the most"
        )
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
            if owner.hash_buckets is not None and not f.show_oov:
                raise ValueError(
                    f"field {f.name!r}: show_oov has no meaning where {owner.name!r}, whose features it uses, has "
                    "hash_buckets; leave it out"
                )
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
    sizes = []
    for i, f in enumerate(fields):
        if f.num_features is None:
            raise ValueError(f"field {f.name!r} is not fitted; pass the fields of a fitted processor: processor.fields")
        if f.owns_features:
            sizes += [(generation, i, size) for generation, size in enumerate((f.num_features, *f.added_features))]
    end = NUM_SHARED_FEATURES
    for generation, i, size in sorted(sizes):
        if size or generation == 0:
            ranges[i].append((end, end + size))
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


def check_text_towers(text_towers: Sequence[Sequence[str]], fields: Sequence[FieldConfig]) -> None:
    """Raises ValueError unless the groups cut the text, in which the fields come in this order, into parts."""
    names, grouped = [f.name for f in fields], [name for group in text_towers for name in group]
    if len(text_towers) < 2 or not all(text_towers):
        raise ValueError(f"text_towers={text_towers} must be two groups of fields or more, none of them empty")
    if sorted(grouped) != sorted(names):
        raise ValueError(f"text_towers={text_towers} must name every field exactly once: {', '.join(map(repr, names))}")
    if grouped != names:
        raise ValueError(
            f"text_towers={text_towers} cut the text into parts, so order their fields as the text does, which is the "
            f"order of the fields: {', '.join(map(repr, names))}"
        )


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
        text_towers: groups of field names, in the order of the fields, such as the user's and the item's. The text
            encoder reads each group's part of the text by itself, and the head fuses the vectors (late fusion, as
            CTR-BERT does: Muhamed et al., 2021). Only in mode `"text"` with mean pooling; by default the text is one.
        fusion: how a joint model's two logits become one: `"learned_weight"`, the paper's, or `"gated"`, by a gate that
            sees which fields are OOV.
        fusion_gradients: whether the loss of the fused logit reaches the towers, as in the paper. Without, each tower
            learns from its own loss alone, as if it were finetuned by itself, and the fusion from what they say.
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
    text_towers: list[list[str]] | None = None
    fusion: str = "learned_weight"
    fusion_gradients: bool = True
    head_dropout: int | float = 0.1
    objectives: dict[str, Any] = field(default_factory=lambda: {"mlm": 1.0, "mtm": 1.0, "icl": 1.0})
    projection_dim: int = 128
    contrastive_temperature: int | float = 0.1
    mtm_loss: str = "nce"
    mtm_negatives: str = "field"
    mtm_num_negatives: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        check_settings({**kwargs, "objectives": self.objectives})
        super().__post_init__(**kwargs)
        self.fields = as_fields(self.fields)
        self.num_labels = 1
        # One sigmoid, not a softmax over classes: Trainer then knows that its label smoothing is not for these logits.
        self.problem_type = "multi_label_classification"
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

    def validate_text_towers(self) -> None:
        """The parts of a text that are read apart, of which only the first has a `[CLS]`."""
        if self.text_towers is None:
            return
        if self.mode != "text" or self.text_pooling != "mean":
            raise ValueError(
                "FlipConfig: text_towers are for mode='text' and text_pooling='mean', not for "
                f"mode={self.mode!r} and text_pooling={self.text_pooling!r}"
            )
        check_text_towers(self.text_towers, self.fields)

    def validate_ranges(self) -> None:
        """Each setting that is a number with bounds."""
        for setting in ("embedding_dim", "projection_dim", "mtm_num_negatives"):
            if (value := getattr(self, setting)) < 1:
                raise ValueError(f"FlipConfig: {setting}={value} must be at least 1")
        if not 0 < self.contrastive_temperature < math.inf:
            raise ValueError(f"FlipConfig: contrastive_temperature={self.contrastive_temperature} must be positive")
        if not 0 <= self.feature_initializer_range < math.inf:
            raise ValueError(
                f"FlipConfig: feature_initializer_range={self.feature_initializer_range} must be at least 0"
            )
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"FlipConfig: head_dropout={self.head_dropout} must be in [0, 1)")
        weights = self.objectives.values()
        are_weights = all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in weights)
        if not are_weights or not any(weights):
            raise ValueError(
                f"FlipConfig: objectives={self.objectives} need weights of 0 or more, one of them positive"
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, to which no `config.json` at all means that every setting is at its default.

        Raises:
            OSError: there is no `config.json`, or it is not JSON.
            ValueError: as in `from_dict`.
        """
        try:
            values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except RecursionError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: config.json is nested too deeply") from error
        if not values:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json with a configuration in it")
        # Before transformers warns of what it finds strange.
        _check_file(values)
        return values, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, except that a file from anywhere may not ask for everything.

        Unknown settings of the file, as of a newer version, are ignored and named in a warning. They are saved again.

        Args:
            config_dict: what `config.json` holds.
            kwargs: settings that replace those of the file; they come from the caller and may ask for anything.

        Raises:
            ValueError: the file does not describe a FLIP model, or would have transformers load something else than
                that; or the caller passed a setting that does not exist.
        """
        _check_file(config_dict)
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        check_settings({name: value for name, value in kwargs.items() if name == "objectives"})
        if unknown := _unknown_settings(config_dict):
            logger.warning(
                "config.json: this version of flip_hf ignores the settings %s, which it does not know; another version "
                "may have written them",
                ", ".join(map(repr, unknown)),
            )
        # Set afterwards, because the constructor takes them for the caller's.
        later = {name: config_dict[name] for name in {name.partition(".")[0] for name in unknown}}
        try:
            known = {name: value for name, value in config_dict.items() if name not in later}
            config, unused = super().from_dict(known, return_unused_kwargs=True, **kwargs)
            # The constructor has checked the settings of the file alone.
            config.validate()
            for name in later.keys() - kwargs.keys():
                setattr(config, name, later[name])
        # What transformers raises over a setting of the wrong type is of any type, and does not say whose it is.
        except Exception as error:
            why = printable(str(error))
            raise ValueError(f"config.json, or a setting passed with it, is not of a FLIP model: {why}") from error
        if wants_unused:
            # Whoever asks for them knows other settings, too: a model passes them to its constructor.
            return config, unused
        check_settings(unused)
        return config

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As in transformers; the file is read as by `from_pretrained`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

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
            output["text_config"]["_name_or_path"] = ""
        return output


def check_settings(settings: Mapping[str, Any], owner: str = "FlipConfig") -> None:
    """Raises ValueError for a setting of a caller that `FlipConfig` does not have, with the name that is nearest.

    Args:
        settings: the settings by name; of `objectives` the names inside are checked, too.
        owner: what the error names as the place of the settings.
    """
    if unknown := _unknown_settings(settings):
        inherited = {f.name for f in fields(PreTrainedConfig)}
        known = [f.name for f in fields(FlipConfig) if f.name not in inherited]
        known += [f"objectives.{name}" for name in PRETRAINING_OBJECTIVES]
        raise ValueError(f"{owner} has no setting {with_nearest(unknown, known)}")


def _unknown_settings(settings: Mapping[str, Any]) -> list[str]:
    unknown = [name for name in settings if not _is_setting(name)]
    objectives = settings.get("objectives")
    if isinstance(objectives, dict):
        unknown += [f"objectives.{name}" for name in objectives if name not in PRETRAINING_OBJECTIVES]
    return unknown


def _is_setting(name: str) -> bool:
    """Whether FLIP or transformers reads a setting of that name.

    transformers would silently drop any other one (`temperature`, or whatever generates text has), or keep it as an
    attribute that nobody reads.
    """
    properties = (getattr(FlipConfig, spelled, None) for spelled in (name, f"_{name}"))
    return (
        name in {f.name for f in fields(FlipConfig)}
        or name in FlipConfig.attribute_map
        # What to_dict writes, the type of the model and where its code lies included.
        or name in (*vars(PreTrainedConfig()), "model_type", "auto_map")
        or any(isinstance(found, property) and found.fset is not None for found in properties)
        or name in _ONLY_CALLERS_SET
    )


def _first_layers(text_config: Any, layers: int) -> Any:
    depth = text_config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise ValueError(f"FlipConfig: text_layers={layers}, but the text encoder has {depth} layers")
    text_config.num_hidden_layers = layers
    # Encoders with more than one kind of layer list the kinds, one a layer.
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = list(text_config.layer_types)[:layers]
    return text_config


def printable(text: str) -> str:
    """The text on one line, with an escape for each character that would steer a terminal instead of being shown."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# Within these bounds no size of a tensor overflows, and none but a feature table's is as large.
_LARGEST_NUMBER = 1 << 30
_MOST_FEATURES = 1 << 40
# Configurations of transformers count these out one by one when they are built.
_COUNTED_OUT = re.compile(r".*(layers?|labels)")
_MOST_COUNTED_OUT = 1 << 16
_DEEPEST = 16
_DTYPES = ("None", "float64", "float32", "bfloat16", "float16")
# By key, the values that are harmless. With others transformers fetches and runs code of the Hub, replaces classes
# of the whole process, or reads other files than those that were looked at.
_ONLY_CALLERS_SET: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), (None, "eager", "sdpa", "flex_attention")),
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), (None, "eager", "batched_mm", "grouped_mm")),
    **dict.fromkeys(("quantization_config", "fusion_config", "transformers_weights"), (None,)),
}
# Models that consist of others, which they would fetch by the name that stands here.
_COMPOSITES = ("flip", "timm_backbone", "timm_wrapper")
_NAMES_OF_PARTS = ("backbone", "backbone_config")


def _check_file(values: Any) -> None:
    """Raises ValueError for what `config.json` of a FLIP model must not hold."""
    kind = values.get("model_type", FlipConfig.model_type) if isinstance(values, dict) else type(values).__name__
    if kind != FlipConfig.model_type:
        raise ValueError(f"config.json describes a model of type {kind!r:.80}, not {FlipConfig.model_type!r}")
    _check_values(values, "", 0)
    FieldConfig.check_saved(values.get("fields"), "config.json")


def _check_values(value: Any, place: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"config.json: {place} is nested too deeply")
    if isinstance(value, list | tuple):
        for item in value:
            _check_values(item, place, depth + 1)
    elif isinstance(value, dict):
        for name, inner in value.items():
            key = str(name)
            inner_place = f"{place}.{printable(key)}" if place else printable(key)
            _check_setting(key, inner, inner_place)
            _check_values(inner, inner_place, depth + 1)
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"config.json: {place} is not a number")
    elif _is_whole(value) and abs(value) > (_MOST_FEATURES if place.startswith("fields.") else _LARGEST_NUMBER):
        raise ValueError(f"config.json: {place} is larger than anything can be")


def _check_setting(key: str, value: Any, place: str) -> None:
    if key in _ONLY_CALLERS_SET and value not in _ONLY_CALLERS_SET[key]:
        raise ValueError(
            f"config.json: {place} is refused, because transformers would run or read what it names; remove it, and "
            f"pass {key.lstrip('_')} to from_pretrained if you want it"
        )
    if key in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") not in _DTYPES:
        raise ValueError(f"config.json: {place}={value!r:.80} is not one of {', '.join(_DTYPES)}")
    is_text = place.startswith("text_config.")
    if is_text and (key in _NAMES_OF_PARTS or (key == "model_type" and value in _COMPOSITES)):
        raise ValueError(f"config.json: {place}={value!r:.80} is not a text encoder's")
    if key.startswith("__") or callable(getattr(PreTrainedConfig, key, None)):
        raise ValueError(f"config.json: {place} is no setting")
    if _COUNTED_OUT.fullmatch(key) and _is_whole(value) and value > _MOST_COUNTED_OUT:
        raise ValueError(f"config.json: {place} is more than any model has; {_MOST_COUNTED_OUT} are the most")
