"""Configuration of FLIP: settings of the two towers, the fusion and the pretraining objectives. Imports no torch."""

import copy
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from flip_hf.checkpoint.config_check import ONLY_CALLERS_SET, check_config_file
from flip_hf.checkpoint.loading_file import CONFIG_AUTO_MAP, write_loading_file
from flip_hf.fields import (
    MODES,
    FieldConfig,
    as_fields,
    feature_ranges,
    num_features,
    printable,
    tabular_fields,
    with_nearest,
)
from flip_hf.text_towers import named_towers

logger = logging.getLogger(__name__)

FUSIONS = ("learned_weight", "gated")
ATTENTION_NORMALIZATIONS = ("none", "length")
TEXT_POOLINGS = ("cls", "mean")
MTM_LOSSES = ("nce", "sampled_softmax", "full_softmax")
MTM_NEGATIVES = ("field", "global")
PRETRAINING_OBJECTIVES = ("mlm", "mtm", "icl", "text_mlm")
"""The keys of `flip_hf.objectives.OBJECTIVES`."""


@strict
class FlipConfig(PreTrainedConfig):
    """Configuration of the FLIP models (Wang et al., RecSys 2024, arXiv 2310.19453).

    Args:
        text_config: configuration of the text encoder, any transformers encoder (BERT by default).
        fields: the fitted fields, `processor.fields`. Their order is the order of the columns of `feature_ids`, in
            which a field takes `num_positions` columns.
        mode: `"joint"` builds both towers, `"id"` the ID-based model alone, `"text"` the text encoder alone.
        embedding_dim: width of a feature's embedding.
        feature_initializer_range: standard deviation of the feature table at initialisation. With much smaller values
            the tabular vector is almost the same for every row, and the contrastive loss does not decrease.
        vector_hidden_dim: hidden width of the two-layer projection of vector fields and text features.
        attention_normalization: how to normalise the weights with which a target attends to a sequence: `"none"`, as
            in DIN, or `"length"`, which divides them by the number of values.
        backbone: name of the ID-based model, a key of `flip_hf.backbones.BACKBONES`.
        backbone_options: keyword arguments of that backbone, such as `{"hidden_sizes": [256, 128]}`.
        text_base_model: the checkpoint that the text encoder's weights came from, for the model card;
            `from_text_pretrained` sets it.
        text_layers: number of layers of the text encoder to build, counted from the first; all by default.
        text_pooling: `"mean"` over tokens, or `"cls"` as in the paper (Section 3.3).
        text_towers: groups of field names, such as `{"user": ["user_id", "age"], "item": ["title", "genre"]}`. A list
            of groups names them "0", "1" and so on. The groups must name every field that has a text exactly once, in
            the order of the fields. The text encoder reads the text of each group separately, and the head fuses the
            vectors (late fusion, as in CTR-BERT: Muhamed et al., 2021). Needs mean pooling. None, the default, reads
            the text as a whole. Mode `"id"` reads no text and ignores this setting.
        fusion: how a joint model combines its two logits: `"learned_weight"`, as in the paper, or `"gated"`, a gate
            that also reads which fields are OOV.
        fusion_gradients: whether the loss of the fused logit trains the towers, as in the paper. If false, each tower
            learns from its own loss alone, and the fusion learns from both logits as constants.
        head_dropout: dropout before the heads.
        distillation_weight: share of the click loss that comes from a teacher's logits, from 0 to 1; the labels have
            the rest. It has an effect only if a batch has teacher logits.
        objectives: weight of each pretraining objective; the names are the keys of `flip_hf.objectives.OBJECTIVES`:
            `mlm` (masked language modelling), `mtm` (masked tabular modelling), `icl` (instance-level contrastive
            learning) and `text_mlm` (MLM of the text alone).
        projection_dim: width of the space in which ICL compares the views.
        contrastive_temperature: temperature of ICL.
        mtm_loss: `"nce"` (the paper's), `"sampled_softmax"` or `"full_softmax"`.
        mtm_negatives: where MTM samples negatives: from the masked feature's own `"field"`, or `"global"`, from all
            features.
        mtm_num_negatives: sampled negatives for each masked feature. With `mtm_negatives="field"`, a field with no
            more features than this is scored exactly.
    """

    model_type = "flip"
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert")}
    # Trainer does not collect these during evaluation, because they have no value for each row.
    keys_to_ignore_at_inference: ClassVar = ["id_loss", "text_loss", "distillation_loss", "feature_penalty"]

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    fields: list[Any] = field(default_factory=list)
    mode: str = "joint"
    embedding_dim: int = 32
    feature_initializer_range: int | float = 0.1
    vector_hidden_dim: int = 128
    attention_normalization: str = "none"
    backbone: str = "dcnv2"
    backbone_options: dict[str, Any] = field(default_factory=dict)
    text_base_model: str | None = None
    text_layers: int | None = None
    text_pooling: str = "mean"
    text_towers: list[list[str]] | dict[str, list[str]] | None = None
    fusion: str = "learned_weight"
    fusion_gradients: bool = True
    head_dropout: int | float = 0.1
    distillation_weight: int | float = 0.9
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
        # FLIP has one sigmoid, not a softmax. Trainer then knows that its label smoothing does not apply.
        self.problem_type = "multi_label_classification"
        if self.text_layers is not None:
            # Copied, because the caller may use the text configuration for other models.
            self.text_config = first_layers(copy.deepcopy(self.text_config), self.text_layers)

    def validate_choices(self) -> None:
        """Checks the settings that take one of a few words."""
        for setting, allowed in (
            ("mode", MODES),
            ("fusion", FUSIONS),
            ("attention_normalization", ATTENTION_NORMALIZATIONS),
            ("text_pooling", TEXT_POOLINGS),
            ("mtm_loss", MTM_LOSSES),
            ("mtm_negatives", MTM_NEGATIVES),
        ):
            if (value := getattr(self, setting)) not in allowed:
                raise ValueError(f"FlipConfig: {setting}={value!r} is not one of {', '.join(allowed)}")

    def validate_text_towers(self) -> None:
        """Checks `text_towers`. They need mean pooling, because only the first part of a text has a `[CLS]` token."""
        if self.text_towers is not None and self.text_pooling != "mean":
            raise ValueError(f"FlipConfig: text_towers need text_pooling='mean', not {self.text_pooling!r}")
        _ = self.towers

    def validate_ranges(self) -> None:
        """Checks the settings that are numbers with bounds."""
        for setting in ("embedding_dim", "vector_hidden_dim", "projection_dim", "mtm_num_negatives"):
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
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"FlipConfig: distillation_weight={self.distillation_weight} must be in [0, 1]")
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
        """As in transformers, but a missing `config.json` is an error instead of a default configuration.

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
        # Checked before transformers warns of settings that it does not expect.
        check_config_file(values, cls.model_type)
        return values, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but restricts what a file from an untrusted source can ask for.

        Settings of the file that this version does not know are ignored and named in a warning. They are kept, and
        saved again.

        Args:
            config_dict: the contents of `config.json`.
            kwargs: settings that replace those of the file. They come from the caller, so they are not restricted.

        Raises:
            ValueError: the file does not describe a FLIP model, or it has settings that would make transformers load
                other models, code or files; or the caller passed a setting that does not exist.
        """
        check_config_file(config_dict, cls.model_type)
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        check_settings({name: value for name, value in kwargs.items() if name == "objectives"})
        if unknown := _unknown_settings(config_dict):
            logger.warning(
                "config.json: this version of flip_hf does not know the settings %s and ignores them; another version "
                "may have written them",
                ", ".join(map(repr, unknown)),
            )
        # Set afterwards, because the constructor would treat them as settings of the caller.
        later = {name: config_dict[name] for name in {name.partition(".")[0] for name in unknown}}
        try:
            known = {name: value for name, value in config_dict.items() if name not in later}
            config, unused = super().from_dict(known, return_unused_kwargs=True, **kwargs)
            # The constructor checked the settings of the file only, not those of the caller.
            config.validate()
            for name in later.keys() - kwargs.keys():
                setattr(config, name, later[name])
        # For a setting of the wrong type transformers raises errors of any type, which don't name the file.
        except Exception as error:
            why = printable(str(error))
            raise ValueError(f"config.json, or a setting passed with it, does not fit a FLIP model: {why}") from error
        if wants_unused:
            # The caller handles unknown settings itself: a model passes them to its constructor.
            return config, unused
        check_settings(unused)
        return config

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As in transformers; reads the file as `from_pretrained` does."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @property
    def towers(self) -> dict[str, list[str]] | None:
        """The fields of each text tower by the tower's name, in the order of the text; None without `text_towers`."""
        return None if self.text_towers is None else named_towers(self.text_towers, self.fields)

    @property
    def tabular_fields(self) -> list[FieldConfig]:
        """The fields of the tabular view, in order."""
        return tabular_fields(self.fields)

    @property
    def feature_ranges(self) -> list[list[tuple[int, int]]]:
        """For each field of the tabular view, the ranges (first, end) of the ids that it may hold."""
        return feature_ranges(self.fields)

    @property
    def position_ranges(self) -> list[list[tuple[int, int]]]:
        """For each position (column of `feature_ids`), the ranges (first, end) of the ids that it may hold."""
        fields = zip(self.tabular_fields, self.feature_ranges, strict=True)
        return [ranges for field, ranges in fields for _ in range(field.num_positions)]

    @property
    def num_features(self) -> int:
        """Number of rows of the feature table."""
        return num_features(self.fields)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers. Also saves the code for `trust_remote_code` if the configuration was loaded with it."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        if getattr(self, "auto_map", None) == CONFIG_AUTO_MAP:
            write_loading_file(Path(save_directory))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dict of plain JSON types."""
        output: dict[str, Any] = super().to_dict()
        output["fields"] = [f.to_dict() for f in self.fields]
        # transformers.Trainer sets it in the configuration of every model, and loading would call it unknown.
        output.pop("use_cache", None)
        if output["text_config"] is not None:
            # This is a path on the machine that built the model; transformers removes only FLIP's own.
            output["text_config"]["_name_or_path"] = ""
        return output


def check_settings(settings: Mapping[str, Any], owner: str = "FlipConfig", others: Iterable[str] = ()) -> None:
    """Raises ValueError if a caller passed a setting that `FlipConfig` does not have, and names the nearest known one.

    Args:
        settings: the settings by name; the names inside `objectives` are checked too.
        owner: the owner of the settings, such as `model.options`, for the error message.
        others: names of further settings of the owner, which the error may suggest.
    """
    if unknown := _unknown_settings(settings):
        inherited = {f.name for f in fields(PreTrainedConfig)}
        known = [f.name for f in fields(FlipConfig) if f.name not in inherited]
        known += [*(f"objectives.{name}" for name in PRETRAINING_OBJECTIVES), *others]
        raise ValueError(f"{owner} has no setting {with_nearest(unknown, known)}")


def _unknown_settings(settings: Mapping[str, Any]) -> list[str]:
    unknown = [name for name in settings if not _is_setting(name)]
    objectives = settings.get("objectives")
    if isinstance(objectives, dict):
        unknown += [f"objectives.{name}" for name in objectives if name not in PRETRAINING_OBJECTIVES]
    return unknown


def _is_setting(name: str) -> bool:
    """Whether FLIP or transformers reads a setting of that name.

    transformers would silently drop any other setting (such as `temperature`, of text generation), or keep it as an
    attribute that nothing reads.
    """
    properties = (getattr(FlipConfig, spelled, None) for spelled in (name, f"_{name}"))
    return (
        name in {f.name for f in fields(FlipConfig)}
        or name in FlipConfig.attribute_map
        # What to_dict writes, including the model type and the location of the code.
        or name in (*vars(PreTrainedConfig()), "model_type", "auto_map")
        or any(isinstance(found, property) and found.fset is not None for found in properties)
        or name in ONLY_CALLERS_SET
    )


def first_layers(text_config: Any, layers: int) -> Any:
    """Cuts a text encoder's configuration to its first layers, in place, and returns it.

    Args:
        text_config: configuration of a text encoder.
        layers: number of layers to keep.

    Raises:
        ValueError: the text encoder has fewer layers.
    """
    depth = text_config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise ValueError(f"text_layers={layers}, but the text encoder has {depth} layers")
    text_config.num_hidden_layers = layers
    # Encoders with several kinds of layers list the kind of each layer.
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = list(text_config.layer_types)[:layers]
    return text_config
