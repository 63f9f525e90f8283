"""The FLIP models: wiring of the two towers, the objectives and the heads."""

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import torch
import torch.distributed as dist
from accelerate.utils import align_module_device
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from flip_hf.backbones import Backbone, backbone_class, build_backbone
from flip_hf.checkpoint.sharded_table import add_table, read_rows
from flip_hf.checkpoint.weights_check import expecting, find_weights, limited_building, some_of, without_load_report
from flip_hf.configuration_flip import FlipConfig, check_settings
from flip_hf.fetch import public_name, resolve_pretrained
from flip_hf.fields import MODES, NUM_RESERVED_FEATURES, FieldConfig, num_features, owned_ranges, with_nearest
from flip_hf.growth import FeatureGrowth
from flip_hf.hub import push_to_hub
from flip_hf.nn.attention import use_cpu_attention
from flip_hf.nn.bags import FieldPooling
from flip_hf.nn.dropout import ByteDropout, use_byte_dropout
from flip_hf.nn.embeddings import FeatureEmbedding
from flip_hf.nn.fusion import FUSION
from flip_hf.nn.layers import MLP
from flip_hf.nn.pooling import TEXT_POOLING
from flip_hf.nn.ridge import ridge_predictions
from flip_hf.nn.sharded_embeddings import ShardedFeatureEmbedding, feature_embedding_class
from flip_hf.objectives import OBJECTIVES, ContrastiveShare, ObjectiveOutput, PretrainingBatch
from flip_hf.outputs import FlipForCTROutput, FlipForPreTrainingOutput, FlipModelOutput

logger = logging.getLogger(__name__)

ItemCounts = Mapping[str, torch.Tensor | float]
"""What each part of a loss is divided by, by the part's name."""

OutputHiddenStates: TypeAlias = bool | int | list[int] | None
"""All hidden states, some by their numbers, or what the configuration says."""

_TABLE = "feature_embeddings.weight"
"""The feature table in every checkpoint, behind the prefix of the model."""

_SETTINGS = {f.name for f in fields(FlipConfig)} - {f.name for f in fields(PreTrainedConfig)}
"""What FlipConfig adds to a configuration."""


def takes_known_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a model's `forward`: refuses inputs that it does not take, and says which collator makes those it does.

    PEFT passes `inputs_embeds=None` to every model, which is taken; a value is refused.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    known = {p.name for p in parameters}
    required = [p.name for p in parameters if p.default is p.empty]

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError(f"{type(self).__name__} reads input_ids: inputs_embeds must be None")
        unknown = [name for name in kwargs if name not in known]
        absent = [name for name in required[len(args) :] if name not in kwargs]
        if unknown or absent:
            wrong = f"does not take {', '.join(unknown)}" if unknown else f"needs {', '.join(absent)}"
            raise TypeError(f"{type(self).__name__} {wrong}; batches for it are made by {self.collator}")
        return forward(self, *args, **kwargs)

    return checked


class FlipPreTrainedModel(PreTrainedModel):
    """What the FLIP models share: initialisation, loading, and how a text encoder is taken over."""

    config_class = FlipConfig
    base_model_prefix = "flip"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # transformers.Trainer passes `num_items_in_batch`, or divides by the accumulated batches where it can't count.
    accepts_loss_kwargs = True

    collator: ClassVar[str] = "FlipCTRCollator(processor, model.config.mode)"
    """What makes batches for the model, as errors say it."""

    new_parameters: tuple[str, ...] = ()
    """Prefixes of what a checkpoint of another FLIP model may lack: the heads that this model starts afresh."""

    unused_parameters: tuple[str, ...] = ()
    """Prefixes of what a checkpoint of another FLIP model may hold: the heads that this model does not have."""

    fresh_parameters: tuple[str, ...] = ()
    """Names of the parameters that the checkpoint lacked and `from_pretrained` started afresh; none once saved."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """As in Python; names a setting of `from_pretrained` that nobody knows, which transformers hands on to here."""
        own = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        if unknown := kwargs.keys() - set(own):
            known = [*own, *sorted(_SETTINGS)]
            raise ValueError(f"{cls.__name__} has no setting {with_nearest(sorted(unknown), known)}")
        return super().__new__(cls)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            for name, value in module.named_buffers():
                init.constant_(value, 1 if name == "running_var" else 0)
        elif callable(start := getattr(module, "init_parameters", None)):
            start()

    def post_init(self) -> None:
        """As in transformers; of a sharded feature table, `from_pretrained` reads the rows itself."""
        if self._sharded_table is not None:
            unexpected = self._keys_to_ignore_on_load_unexpected or ()
            self._keys_to_ignore_on_load_unexpected = [*unexpected, rf"(^|\.){_TABLE}$"]
            self._keys_to_ignore_on_load_missing: Any = [rf"^{name}$" for name in self.sharded_parameters]
        super().post_init()

    def use_cpu_attention(self) -> None:
        """Has the text encoder, if there is one and it attends by `"sdpa"`, train by `nn.attention.cpu_attention`."""
        if self.base_model.text_model is not None:
            use_cpu_attention(self.base_model.text_model)

    @property
    def _sharded_table(self) -> ShardedFeatureEmbedding | None:
        table: Any = self.base_model.feature_embeddings
        return table if isinstance(table, ShardedFeatureEmbedding) else None

    @property
    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """By name, the parameters of which every process holds rows of its own: those of a sharded feature table."""
        table = self._sharded_table
        return {} if table is None else {name: p for name, p in self.named_parameters() if p is table.rows}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads this. It would send the objectives' counts, as long as the feature table, to all
        # processes in every step; they are set alike everywhere and never change.
        return [*self.sharded_parameters, *(name for name, _ in self.named_buffers() if name.startswith("objectives."))]

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's token embeddings; NotImplementedError, as in transformers, where there is none."""
        embeddings: nn.Module = self._text_model().get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text encoder's token embeddings."""
        self._text_model().set_input_embeddings(value)

    def _text_model(self) -> Any:
        text_model: Any = self.base_model.text_model
        if text_model is None:
            raise NotImplementedError(f"a model in mode={self.config.mode!r} has no text encoder")
        return text_model

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[AbstractContextManager[Any]]:
        """As in transformers: what a model is built in when it is loaded."""
        return [*super().get_init_context(*args, **kwargs), limited_building()]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as transformers does, but from safetensors only.

        A checkpoint that is not what its configuration says is refused, before room is made for what it is not.

        Args:
            pretrained_model_name_or_path: a local folder or a repository's name.
            args: as in transformers.
            kwargs: as in transformers; settings of FlipConfig such as `mode="id"` replace the saved ones, or those of
                `config` where that is given.

        Raises:
            OSError: there are no weights in safetensors files.
            ValueError: weights that the configuration asks for are not in the checkpoint, or have another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["use_safetensors"] = True
        if isinstance(config := kwargs.get("config"), FlipConfig):
            # transformers would hand them to __init__. Its pipelines give both the configuration and what made it.
            settings = {name: kwargs.pop(name) for name in _SETTINGS & kwargs.keys()}
            check_settings(settings)
            if any(getattr(config, name) != value for name, value in settings.items()):
                kwargs["config"] = type(config).from_dict(config.to_dict() | settings)
        source = pretrained_model_name_or_path
        weights = None if source is None else find_weights(str(source), kwargs)
        with expecting(weights), without_load_report():
            loaded: Any = super().from_pretrained(
                source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = loaded
        if info["mismatched_keys"] and not may_mismatch:
            name, saved, wanted = sorted(info["mismatched_keys"])[0]
            raise ValueError(
                f"{pretrained_model_name_or_path}: {name} has the shape {tuple(saved)} in the weights, but config.json "
                f"describes {tuple(wanted)}; one of the two was edited or belongs to another model"
            )
        if missing := [name for name in info["missing_keys"] if not name.startswith(cls.new_parameters)]:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks weights that mode={model.config.mode!r} needs: "
                f"{some_of(missing)}. Load it in the mode it was saved in, or repair config.json so that it describes "
                "these weights"
            )
        if reshaped := [name for name, *_ in info["mismatched_keys"]]:
            logger.warning("%s has other shapes of %s, which start afresh", source, some_of(reshaped))
        if unexpected := [name for name in info["unexpected_keys"] if not name.startswith(cls.unused_parameters)]:
            logger.warning("%s holds weights that %s does not have: %s", source, cls.__name__, some_of(unexpected))
        model.fresh_parameters = tuple(sorted(info["missing_keys"]))
        if (table := model._sharded_table) is not None and weights is not None:
            shape = table.num_features, table.rows.shape[1]
            first, end = table.bounds(dist.get_rank())
            with torch.no_grad():
                table.rows.copy_(read_rows(weights.files, _TABLE, shape, first, end))
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does.

        Where the feature table is sharded, every process must call this; process 0 writes, and what it writes loads
        into any number of processes. The table passes through it a block of rows at a time.

        Args:
            save_directory: a local folder.
            args: as in transformers; none with a sharded feature table.
            kwargs: as in transformers; no `push_to_hub` with a sharded feature table.

        Raises:
            ValueError: `push_to_hub` or `max_shard_size` with a sharded feature table.
        """
        if (table := self._sharded_table) is None:
            super().save_pretrained(save_directory, *args, **kwargs)
        else:
            self._save_sharded(table, save_directory, *args, **kwargs)
        self.fresh_parameters = ()

    def _save_sharded(self, table: ShardedFeatureEmbedding, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if args or kwargs.pop("push_to_hub", False) or "max_shard_size" in kwargs:
            raise ValueError(
                "the feature table is sharded: save the model to a folder first, without max_shard_size, then load it "
                "unsharded and push that"
            )
        if dist.get_rank() != 0:
            table.send_rows()
            return
        own, weights = self.sharded_parameters, kwargs.pop("state_dict", None) or self.state_dict()
        kwargs |= {"is_main_process": True, "state_dict": {k: v for k, v in weights.items() if k not in own}}
        super().save_pretrained(save_directory, **kwargs)
        name = next(iter(own)).removesuffix("rows") + "weight"
        shape = table.num_features, table.rows.shape[1]
        add_table(Path(save_directory), name, shape, table.rows.dtype, table.all_rows())

    def push_to_hub(self, repo_id: str, *, processor: Any = None, **kwargs: Any) -> str:  # type: ignore[override]
        """Pushes the model, its processor, its card and the code that loads them, in one commit.

        Args:
            repo_id: as in `org/name`.
            processor: the model's. Without it the model is pushed alone, with a warning.
            kwargs: as in `flip_hf.hub.push_to_hub`: `record`, `card`, `private`, `revision`, `token`, `commit_message`
                and more.

        Returns:
            The commit's hash.

        Raises:
            ValueError, OSError: as in `flip_hf.hub.push_to_hub`.
        """
        return push_to_hub(repo_id, model=self, processor=processor, **kwargs)

    @classmethod
    def from_text_pretrained(cls, name_or_path: str, config: FlipConfig, **kwargs: Any) -> Self:
        """A new model whose text encoder starts from a plain transformers checkpoint; all else starts afresh.

        Args:
            name_or_path: the text encoder: a local folder, or a repository's name, which is looked up in the local Hub
                cache and then on the Hub.
            config: `config.text_config` must describe that text encoder.
            kwargs: passed on to the loading of the text encoder, such as `revision`. Code that it brings runs with
                `trust_remote_code=True` only.

        Raises:
            ValueError: the checkpoint is not what `config.text_config` describes.
            flip_hf.fetch.FetchError: the name could not be found anywhere.
        """
        path = resolve_pretrained(name_or_path, revision=kwargs.get("revision"), token=kwargs.get("token"))
        # Left out, transformers would ask whoever sits at the terminal.
        kwargs.setdefault("trust_remote_code", False)
        # The revision is the caller's.
        saved = AutoConfig.from_pretrained(path, **kwargs)  # nosec B615
        wanted: Any = config.text_config
        for setting in ("model_type", "hidden_size", "vocab_size"):
            if getattr(wanted, setting) != getattr(saved, setting):
                raise ValueError(
                    f"config.text_config has {setting}={getattr(wanted, setting)!r}, but the text encoder "
                    f"{name_or_path} has {getattr(saved, setting)!r}; build the configuration with "
                    f"text_config=AutoConfig.from_pretrained({str(path)!r})"
                )
        with without_load_report():
            text_model, info = AutoModel.from_pretrained(  # nosec B615
                path, config=wanted, output_loading_info=True, use_safetensors=True, **kwargs
            )
        if missing := sorted(k for k in info["missing_keys"] if not k.startswith("pooler.")):
            raise ValueError(f"the text encoder {name_or_path} lacks weights: {some_of(missing)}")
        if unexpected := [name for name in info["unexpected_keys"] if not _is_left_out(name, text_model)]:
            logger.warning("%s holds weights that its configuration does not have: %s", path, some_of(unexpected))
        # Where a folder lies is nobody else's business.
        config.text_base_model = public_name(name_or_path)
        return cls(config, text_model=text_model)

    @torch.no_grad()
    def resize_feature_embeddings(self, growth: FeatureGrowth, init: str = "mean") -> FeatureEmbedding:
        """Makes room for the features that `processor.extend(rows)` added; all others keep their ids and weights.

        Save the processor beside the model afterwards: the two must agree. An optimizer that holds the table's
        old parameter must be built anew.

        Args:
            growth: what `processor.extend` returned.
            init: new features start from the `"mean"` of their field, or from `"text"`: what the text tower's vector of
                a feature's text predicts for its row of the table, by a ridge regression over the features that are
                there. Where the text tells nothing (its leave-one-out error is no better), that is the mean again.

        Returns:
            The larger table.

        Raises:
            ValueError: the growth is not of this model's processor, or the mode has not what `init` needs.
        """
        flip: Any = self.base_model
        if init not in ("mean", "text"):
            raise ValueError(f"init={init!r} is not one of mean, text")
        if flip.feature_embeddings is None or (init == "text" and flip.text_model is None):
            raise ValueError(
                f"a model in mode={self.config.mode!r} has not the towers that resizing its features with "
                f"init={init!r} needs"
            )
        if self._sharded_table is not None:
            raise ValueError("the feature table is sharded: save the model, load it unsharded and resize that")
        _check_growth(self.config.fields, growth.fields)
        old: torch.Tensor = flip.feature_embeddings.weight
        fields = growth.fields
        table = torch.cat([old, old.new_zeros(num_features(fields) - len(old), old.shape[1])])
        for ranges in owned_ranges(fields):
            ids = torch.cat([torch.arange(*bounds) for bounds in ranges or [(0, 0)]]).to(old.device)
            valued = ids[NUM_RESERVED_FEATURES:]
            known = valued[valued < len(old)]
            # A field that knew no value yet has its OOV feature to go by.
            table[valued[valued >= len(old)]] = old[known if len(known) else ids[:1]].mean(dim=0)
        if init == "text":
            for known_texts, new_texts in growth.texts():
                table[new_texts.feature_ids.to(old.device)] = ridge_predictions(
                    self._pooled(known_texts.tokens),
                    old[known_texts.feature_ids.to(old.device)],
                    self._pooled(new_texts.tokens),
                ).to(old.dtype)
        # One configuration, which all parts of the model hold.
        flip.config.fields = fields
        flip.feature_embeddings.weight = nn.Parameter(table, requires_grad=old.requires_grad)
        flip.feature_embeddings.set_position_ranges(_position_ranges(flip.config))
        embeddings: FeatureEmbedding = flip.feature_embeddings
        return embeddings

    def _pooled(self, texts: list[torch.Tensor], batch_size: int = 256) -> torch.Tensor:
        """The text tower's vectors of texts given as their tokens, float (texts, C)."""
        flip: Any = self.base_model
        was_training = flip.training
        flip.eval()
        parts = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            masks = [torch.ones_like(tokens) for tokens in batch]
            padded = (nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device) for rows in (batch, masks))
            parts.append(flip.encode_text(*padded).text_representation.float())
        flip.train(was_training)
        return torch.cat(parts)


class FlipModel(FlipPreTrainedModel):
    """The two towers: an ID-based model over the tabular view, a text encoder over the textual view."""

    unused_parameters = ("objectives.", "text_head.", "fusion.")

    def __init__(self, config: FlipConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.feature_embeddings: FeatureEmbedding | None = None
        self.field_pooling: FieldPooling | None = None
        self.backbone: Backbone | None = None
        self.text_model: Any = None
        if config.mode != "text":
            fields = config.tabular_fields
            places = {f.name: i for i, f in enumerate(fields)}
            self.feature_embeddings = feature_embedding_class()(
                config.num_features,
                _position_ranges(config),
                config.embedding_dim,
                config.feature_initializer_range,
                backbone_class(config.backbone).extra_dim,
            )
            self.field_pooling = FieldPooling(
                [f.num_positions for f in fields],
                [None if f.target is None else places[f.target] for f in fields],
                config.embedding_dim,
            )
            self.backbone = build_backbone(config.backbone, len(fields), config.embedding_dim, config.backbone_options)
        if config.mode != "id":
            if text_model is None:
                text_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
            self.text_model = text_model
            use_byte_dropout(text_model)
            if getattr(self.text_model, "pooler", None) is not None:
                # Nothing reads it, and distributed training stops at parameters without gradients.
                self.text_model.pooler = None
        absent = {"joint": (), "id": ("text_model",), "text": ("feature_embeddings", "field_pooling", "backbone")}
        self._keys_to_ignore_on_load_unexpected: Any = [rf"^(flip\.)?{part}\." for part in absent[config.mode]]
        self.post_init()

    @property
    def tabular_size(self) -> int:
        """Width of the tabular representation."""
        assert self.backbone is not None
        return self.backbone.representation_size

    @property
    def text_size(self) -> int:
        """Width of the pooled text: the text encoder's, once for each of the towers."""
        size: int = self.config.text_config.hidden_size
        return size if self.config.text_towers is None else size * len(self.config.text_towers)

    def encode_tabular(self, feature_ids: torch.Tensor) -> FlipModelOutput:
        """The tabular tower: int64 (B, P) -> its parts of FlipModelOutput."""
        assert self.feature_embeddings is not None and self.field_pooling is not None and self.backbone is not None
        vectors = self.feature_embeddings(feature_ids)  # (B, P, D)
        embeddings = self.field_pooling(vectors, feature_ids)  # (B, F, D)
        representation, logits = self.backbone(embeddings)
        return FlipModelOutput(field_embeddings=embeddings, tabular_representation=representation, id_logits=logits)

    def oov_shares(self, feature_ids: torch.Tensor) -> torch.Tensor:
        """The share of each field's features that are OOV: int64 (B, P) -> float (B, F)."""
        assert self.feature_embeddings is not None and self.field_pooling is not None
        return self.field_pooling.shares(self.feature_embeddings.is_oov(feature_ids), feature_ids)

    def encode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        output_hidden_states: OutputHiddenStates = None,
        output_attentions: bool | None = None,
    ) -> FlipModelOutput:
        """The textual tower: int64 (B, T) twice -> its parts of FlipModelOutput; the rest as in `forward`."""
        towers = self.config.text_towers
        if towers is not None:
            if input_ids.shape[1:-1] != (len(towers),) or attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"text_towers read texts cut apart, input_ids and attention_mask (B, {len(towers)}, T), not "
                    f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}; FlipCTRCollator(processor, 'text', "
                    "text_towers=model.config.text_towers) makes them"
                )
            # To the text encoder each part is a text of its own: none sees another, and each has positions from 0.
            input_ids, attention_mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        asked: dict[str, Any] = {}
        for name, value in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
            # What neither the call nor this configuration asks for is left to the text encoder's own configuration.
            if value is not None or getattr(self.config, name):
                asked[name] = True if value is None else value
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **asked)
        states = output.last_hidden_state  # (B, T, C)
        representation = TEXT_POOLING[self.config.text_pooling](states, attention_mask)  # (B, C)
        if towers is not None:
            states = states.unflatten(0, (-1, len(towers)))  # (B, towers, T, C)
            representation = representation.unflatten(0, (-1, len(towers))).flatten(1)  # (B, towers * C)
        return FlipModelOutput(
            token_states=states,
            text_representation=representation,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    @can_return_tuple  # type: ignore[untyped-decorator]
    @takes_known_inputs
    def forward(
        self,
        feature_ids: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: OutputHiddenStates = None,
        output_attentions: bool | None = None,
    ) -> FlipModelOutput:
        """Encodes the views of the towers that are built.

        Args:
            feature_ids: int64 (B, P); needed unless the mode is "text".
            input_ids: int64 (B, T), with `text_towers` (B, towers, T); needed unless the mode is "id".
            attention_mask: int64 of the same shape, 1 on tokens and 0 on padding; needed with `input_ids`.
            output_hidden_states: whether to return the text encoder's hidden states, or the numbers of those to return;
                by default what the configuration says.
            output_attentions: whether to return its attention weights, which need `attn_implementation="eager"`; by
                default what the configuration says.
        """
        parts: dict[str, Any] = {}
        if self.config.mode != "text":
            if feature_ids is None:
                raise ValueError(f"mode={self.config.mode!r} needs feature_ids; {self.collator} makes them")
            parts.update(self.encode_tabular(feature_ids))
        if self.config.mode != "id":
            if input_ids is None or attention_mask is None:
                raise ValueError(
                    f"mode={self.config.mode!r} needs input_ids and attention_mask; {self.collator} makes them"
                )
            parts.update(self.encode_text(input_ids, attention_mask, output_hidden_states, output_attentions))
        return FlipModelOutput(**parts)


class FlipForPreTraining(FlipPreTrainedModel):
    """Both towers with the pretraining objectives (FLIP, Section 3.3).

    Each view that an active objective declares is encoded once; the total is the weighted sum of their losses.
    """

    collator = "FlipPretrainingCollator(processor)"
    new_parameters = ("objectives.",)
    unused_parameters = ("text_head.", "fusion.")

    def __init__(self, config: FlipConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.mode != "joint":
            raise ValueError(f"pretraining aligns both towers: mode must be 'joint', got {config.mode!r}")
        # A configuration from a file may name those of another version.
        if unknown := sorted(set(config.objectives) - set(OBJECTIVES)):
            raise ValueError(f"objectives {', '.join(map(repr, unknown))} are not among {', '.join(OBJECTIVES)}")
        self.flip = FlipModel(config, text_model)
        self.objectives = nn.ModuleDict(
            {
                name: objective(config, self.flip.tabular_size, self.flip.text_size)
                for name, objective in OBJECTIVES.items()
                if config.objectives.get(name, 0) > 0
            }
        )
        if self._sharded_table is not None and "mtm" in self.objectives and config.mtm_loss == "full_softmax":
            raise ValueError(
                "mtm_loss='full_softmax' scores all features of a field, and the feature table is sharded because no "
                "process can hold them; set mtm_loss to 'nce' or 'sampled_softmax', or shard_features to false"
            )
        self.views = frozenset().union(*(OBJECTIVES[name].views for name in self.objectives))
        self.post_init()

    def set_feature_counts(self, counts: torch.Tensor) -> None:
        """Tells the objectives that sample negatives how often each feature was seen: int64 (features,)."""
        for objective in self.objectives.values():
            if callable(set_counts := getattr(objective, "set_feature_counts", None)):
                set_counts(counts)

    def set_mlm_tokens(self, tokens: torch.Tensor) -> None:
        """Has MLM score these tokens alone, such as `value_tokens` of the training rows: int64 (tokens,), ascending.

        So does MLM of the text alone. A checkpoint does not keep them: a model that was loaded scores the whole
        vocabulary.
        """
        for objective in self.objectives.values():
            if callable(set_tokens := getattr(objective, "set_tokens", None)):
                set_tokens(tokens)

    def resize_feature_embeddings(self, growth: FeatureGrowth, init: str = "mean") -> FeatureEmbedding:
        """As in the base class; the objectives that know features learn of the new ones too."""
        embeddings = super().resize_feature_embeddings(growth, init)
        for objective in self.objectives.values():
            if callable(grow := getattr(objective, "grow", None)):
                grow(self.config, growth.feature_counts)
        return embeddings

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What each objective's loss over this batch is summed over, int64 (): masked tokens, features or rows."""
        counts = {}
        for name in self.objectives:
            cls = OBJECTIVES[name]
            counts[name] = cls.num_items(batch["feature_ids"], batch[cls.labels] if cls.labels else None)
        return counts

    def contrastive_views(
        self, feature_ids: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The projected vectors that ICL compares, float32 (B, projection_dim) twice; arguments as in `forward`."""
        icl: Any = self.objectives["icl"]
        tabular = self.flip.encode_tabular(feature_ids).tabular_representation
        views: tuple[torch.Tensor, torch.Tensor] = icl.project(
            tabular, self.flip.encode_text(input_ids, attention_mask).text_representation
        )
        return views

    @can_return_tuple  # type: ignore[untyped-decorator]
    @takes_known_inputs
    def forward(
        self,
        feature_ids: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        masked_feature_ids: torch.Tensor | None = None,
        mtm_labels: torch.Tensor | None = None,
        masked_input_ids: torch.Tensor | None = None,
        mlm_labels: torch.Tensor | None = None,
        num_items_in_batch: ItemCounts | None = None,
        contrast: ContrastiveShare | None = None,
        output_hidden_states: OutputHiddenStates = None,
        output_attentions: bool | None = None,
    ) -> FlipForPreTrainingOutput:
        """The losses of one batch.

        Args:
            feature_ids: int64 (B, P), complete.
            input_ids: int64 (B, T), complete.
            attention_mask: int64 (B, T).
            masked_feature_ids: int64 (B, P), with the mask feature where masked.
            mtm_labels: int64 (B, F), a masked field's feature, one of them where it holds several, -100 elsewhere.
            masked_input_ids: int64 (B, T), with the tokenizer's mask token where masked.
            mlm_labels: int64 (B, T), the masked tokens' ids, -100 elsewhere.
            num_items_in_batch: what to divide each objective's summed loss by; by default what this batch holds. A
                training loop passes the number over all accumulated batches and processes, so that every masked item
                weighs the same.
            contrast: this batch's share of a larger contrastive batch; by default ICL contrasts the rows of this
                batch on all processes.
            output_hidden_states: as in `FlipModel`.
            output_attentions: as in `FlipModel`.
        """
        inputs = {
            "masked_tabular": masked_feature_ids,
            "masked_text": masked_input_ids,
            "mtm_labels": mtm_labels,
            "mlm_labels": mlm_labels,
        }
        needed = self.views | {OBJECTIVES[name].labels for name in self.objectives}
        if absent := sorted(name for name, value in inputs.items() if name in needed and value is None):
            raise ValueError(
                f"objectives {', '.join(self.objectives)} need {', '.join(absent)}; FlipPretrainingCollator makes them"
            )
        token_embeddings: Any = self.get_input_embeddings()
        if isinstance(token_embeddings, FSDPModule):
            # MLM reads them once more than their own forward does, which would give them back.
            token_embeddings.set_reshard_after_forward(False)
        # First as in contrastive_views, whose dropout must be the same.
        tabular = self.flip.encode_tabular(feature_ids)
        masked_tabular = masked_text = text = None
        if "text" in self.views:
            text = self.flip.encode_text(input_ids, attention_mask, output_hidden_states, output_attentions)
        if "masked_tabular" in self.views and masked_feature_ids is not None:
            masked_tabular = self.flip.encode_tabular(masked_feature_ids)
        if "masked_text" in self.views and masked_input_ids is not None:
            masked_text = self.flip.encode_text(
                masked_input_ids, attention_mask, output_hidden_states, output_attentions
            )

        assert self.flip.feature_embeddings is not None
        losses: dict[str, torch.Tensor] = {}
        metrics: dict[str, torch.Tensor] = {}
        # Where accelerate has offloaded them, weights are there during their own module's forward only.
        with align_module_device(token_embeddings), align_module_device(self.flip.feature_embeddings):
            batch = PretrainingBatch(
                feature_ids=feature_ids,
                attention_mask=attention_mask,
                mtm_labels=mtm_labels,
                mlm_labels=mlm_labels,
                tabular=tabular.tabular_representation,
                masked_tabular=masked_tabular.tabular_representation if masked_tabular else None,
                text=text.text_representation if text else None,
                token_states=text.token_states if text else None,
                masked_token_states=masked_text.token_states if masked_text else None,
                embed_features=self.flip.feature_embeddings.embed,
                token_embeddings=token_embeddings.weight,
                contrast=contrast,
            )
            for name, objective in self.objectives.items():
                output: ObjectiveOutput = objective(batch)
                divisor = output.num_items if num_items_in_batch is None else num_items_in_batch[name]
                losses[name] = output.loss_sum / torch.as_tensor(divisor, device=output.loss_sum.device).clamp(min=1)
                metrics.update(output.metrics)
        total = torch.stack([self.config.objectives[name] * loss for name, loss in losses.items()]).sum()
        assert tabular.id_logits is not None
        # No objective reads the click logit, and distributed training waits for a gradient of every parameter.
        total = total + 0.0 * tabular.id_logits.sum()
        shown = text or masked_text or FlipModelOutput()
        return FlipForPreTrainingOutput(
            loss=total,
            **{f"{name}_loss": loss for name, loss in losses.items()},
            metrics=metrics,
            feature_penalty=_feature_penalty(tabular.field_embeddings),
            hidden_states=shown.hidden_states,
            attentions=shown.attentions,
        )


class FlipForCTR(FlipPreTrainedModel):
    """Click-through-rate prediction from either tower or from both (FLIP, Section 3.4).

    In mode `"joint"` the logit is `a * id_logits + (1 - a) * text_logits`, with `a` learned or from a gate
    (`config.fusion`), and the loss is the sum of the binary cross-entropies of the three logits, of which the first
    reaches the towers or not (`config.fusion_gradients`). In the modes `"id"` and `"text"` one tower is built, and its
    logit and loss are the model's.
    """

    new_parameters = ("text_head.", "fusion.")
    _keys_to_ignore_on_load_unexpected: Any = (r"^objectives\.",)

    def __init__(self, config: FlipConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        # The biases of the click logits that a checkpoint held which had not learned clicks; zero where not named.
        self._start: dict[str, torch.Tensor] = {}
        self.flip = FlipModel(config, text_model)
        if config.mode != "id":
            size = self.flip.text_size
            head: list[nn.Module] = [ByteDropout(config.head_dropout)]
            if config.text_towers is not None:
                # Here the towers meet, and a linear layer would add them up.
                fusion = MLP(size, [size // len(config.text_towers)], config.head_dropout)
                head, size = [*head, fusion], fusion.output_size
            self.text_head = nn.Sequential(*head, nn.Linear(size, 1))
        if config.mode == "joint":
            self.fusion = FUSION[config.fusion](len(config.tabular_fields))
            self._keep_in_fp32_modules_strict = {"fusion"}
        absent = {"joint": [], "id": [r"^text_head\.", r"^fusion\."], "text": [r"^fusion\."]}
        self._keys_to_ignore_on_load_unexpected = [*self._keys_to_ignore_on_load_unexpected, *absent[config.mode]]
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; warns of a checkpoint that has not learned clicks."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model._saved_without_clicks:
            model._start = {name: p.detach().clone() for name, p in model._logit_biases().items() if not p.is_meta}
        if reason := model.needs_finetuning:
            logger.warning("%s %s: finetune it before you use its logits", pretrained_model_name_or_path, reason)
        return loaded

    @property
    def needs_finetuning(self) -> str | None:
        """Why the click logits mean nothing yet; None once any training loop has trained them.

        The weights themselves show it. Each tower's click logit has a bias that starts at zero. Clicks alone train it
        (pretraining leaves it at zero), and every optimiser moves it in its first step. A model counts as trained if a
        bias of one of its towers is not zero; if a pretraining checkpoint was loaded, if one has changed since. If the
        checkpoint lacked parameters, at least one of these must have moved since it was initialised.

        Checkpoints therefore need no mark. A model that was trained in memory may be scored at once, and a model that
        was only initialised stays known as such when it is saved and loaded. The same holds for older checkpoints, for
        other training loops and for merged PEFT adapters. `resize_feature_embeddings` and `in_mode` change no bias.
        Weights that accelerate has offloaded can't be read and count as trained.

        A loop that freezes all of these biases is not noticed, such as LoRA without the heads on a model whose heads
        were never trained. Train the heads too: `LoraConfig(modules_to_save=["text_head", "fusion"])`.
        """
        reasons = []
        if not any(map(self._has_learned, self._logit_parts)):
            if self._saved_without_clicks:
                reasons.append(f"was saved by {self._saved_by}, which does not learn clicks")
            elif not self.fresh_parameters:
                reasons.append("was never trained on clicks (the biases of its click logits are zero, as at the start)")
        fresh = {name.split(".")[0] for name in self.fresh_parameters}
        has_moved = "text_head" in fresh and self._has_learned("text_head.")
        if fresh and not has_moved and not ("fusion" in fresh and self._fusion_has_moved()):
            reasons.append(f"lacks {', '.join(self.fresh_parameters)}, which start afresh")
        return " and ".join(reasons) or None

    @property
    def _saved_by(self) -> str:
        return (self.config.architectures or [""])[0]

    @property
    def _saved_without_clicks(self) -> bool:
        return self._saved_by in (FlipModel.__name__, FlipForPreTraining.__name__)

    @property
    def _logit_parts(self) -> list[str]:
        """Prefixes of the parameters that make the towers' click logits."""
        backbone = self.flip.backbone
        return [
            *([] if backbone is None else [f"flip.backbone.{backbone.logit_module}."]),
            *([] if self.config.mode == "id" else ["text_head."]),
        ]

    def _logit_biases(self, part: str = "") -> dict[str, nn.Parameter]:
        # Not by the modules: PEFT wraps them.
        parts = tuple(name for name in self._logit_parts if name.startswith(part))
        return {name: p for name, p in self.named_parameters() if name.startswith(parts) and name.endswith("bias")}

    def _has_learned(self, part: str) -> bool:
        return any(
            p.is_meta or bool((p != self._start.get(name, torch.zeros(1)).to(p)).any())
            for name, p in self._logit_biases(part).items()
        )

    def _fusion_has_moved(self) -> bool:
        start = FUSION[self.config.fusion](len(self.config.tabular_fields))
        start.init_parameters()
        return any(
            now.is_meta or not torch.equal(now.detach().cpu().float(), start.get_parameter(name.split(".")[-1]))
            for name, now in self.fusion.named_parameters()
        )

    def check_finetuned(self) -> None:
        """Raises ValueError, which says why, if the click logits were never trained."""
        if reason := self.needs_finetuning:
            raise ValueError(
                f"{self.name_or_path or 'the model'} {reason}: its probabilities would mean nothing. Finetune it "
                "(FlipForCTR, examples/finetune.py)"
            )

    def in_mode(self, mode: str) -> "FlipForCTR":
        """One tower of this joint model as a model of its own, of the same modules: nothing is copied.

        Args:
            mode: `"id"` or `"text"`; with the mode that this model is in, it is returned itself.

        Raises:
            ValueError: this model has not the tower.
        """
        if mode == self.config.mode:
            return self
        if self.config.mode != "joint" or mode not in MODES:
            raise ValueError(f"a model in mode={self.config.mode!r} has no part in mode={mode!r}")
        config: Any = copy.deepcopy(self.config)
        config.mode = mode
        with torch.device("meta"):
            alone = type(self)(config)
        for whole, part in ((self.flip, alone.flip), (self, alone)):
            for name, _ in part.named_children():
                if name != "flip":
                    setattr(part, name, getattr(whole, name))
        alone._start = self._start
        alone.fresh_parameters = tuple(n for n in self.fresh_parameters if n in alone.state_dict())
        return alone.train(self.training)

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the loss over this batch is summed over, int64 (): rows.

        Raises:
            ValueError: the batch has no labels.
        """
        if "labels" not in batch:
            raise ValueError(
                "the batch has no labels to learn from: encode the rows with processor.encode_dataset(dataset, "
                "with_label=True)"
            )
        return {"ctr": torch.tensor(len(batch["labels"]), device=batch["labels"].device)}

    @can_return_tuple  # type: ignore[untyped-decorator]
    @takes_known_inputs
    def forward(
        self,
        feature_ids: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: ItemCounts | torch.Tensor | float | None = None,
        output_hidden_states: OutputHiddenStates = None,
        output_attentions: bool | None = None,
    ) -> FlipForCTROutput:
        """Click logits, and the loss where labels are given.

        Args:
            feature_ids: int64 (B, P); not read in mode "text".
            input_ids: int64 (B, T), with `text_towers` (B, towers, T); not read in mode "id".
            attention_mask: int64 of the same shape; not read in mode "id".
            labels: 0 or 1, any numeric type (B,).
            num_items_in_batch: the number of rows to divide the summed loss by, or `{"ctr": n}`; by default this
                batch's.
            output_hidden_states: as in `FlipModel`.
            output_attentions: as in `FlipModel`.
        """
        views = self.flip(
            feature_ids, input_ids, attention_mask, output_hidden_states, output_attentions, return_dict=True
        )
        id_logits: torch.Tensor | None = views.id_logits
        text_logits: torch.Tensor | None = None
        if views.text_representation is not None:
            text_logits = self.text_head(views.text_representation).squeeze(-1)
        if id_logits is not None and text_logits is not None:
            assert feature_ids is not None
            fused = [id_logits, text_logits]
            if not self.config.fusion_gradients:
                fused = [tower_logits.detach() for tower_logits in fused]
            logits = self.fusion(*fused, self.flip.oov_shares(feature_ids))
        else:
            logits = id_logits if id_logits is not None else text_logits

        losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            divisor = num_items_in_batch["ctr"] if isinstance(num_items_in_batch, Mapping) else num_items_in_batch
            divisor = labels.numel() if divisor is None else divisor
            losses["loss"] = _mean_cross_entropy(logits, labels, divisor)
            if id_logits is not None and text_logits is not None:
                losses["id_loss"] = _mean_cross_entropy(id_logits, labels, divisor)
                losses["text_loss"] = _mean_cross_entropy(text_logits, labels, divisor)
                losses["loss"] = losses["loss"] + losses["id_loss"] + losses["text_loss"]
        return FlipForCTROutput(
            logits=logits,
            id_logits=id_logits,
            text_logits=text_logits,
            feature_penalty=_feature_penalty(views.field_embeddings),
            hidden_states=views.hidden_states,
            attentions=views.attentions,
            **losses,
        )


def _mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, divisor: torch.Tensor | float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum") / divisor


def _feature_penalty(field_embeddings: torch.Tensor | None) -> torch.Tensor | None:
    return None if field_embeddings is None else field_embeddings.float().square().sum(dim=(1, 2)).mean()


def _is_left_out(name: str, text_model: Any) -> bool:
    """Whether a text encoder is built without a weight of its checkpoint: a head's, the pooler's or a later layer's."""
    inner = name.removeprefix(f"{text_model.base_model_prefix}.")
    parts = inner.split(".")
    layers = [int(part) for part in parts if part.isdigit()]
    if layers and layers[0] >= text_model.config.num_hidden_layers:
        return True
    return parts[0] == "pooler" or parts[0] not in dict(text_model.named_children())


def _check_growth(fields: Sequence[FieldConfig], grown: Sequence[FieldConfig]) -> None:
    """Raises unless the second fields are the first ones with features added."""
    same = [f.name for f in fields] == [f.name for f in grown] and all(
        replace(
            new,
            added_features=new.added_features[: len(old.added_features)],
            value_hashes=new.value_hashes[: len(old.value_hashes)],
        )
        == old
        for old, new in zip(fields, grown, strict=True)
    )
    if not same:
        raise ValueError(
            "this growth is not of the processor that was saved with this model; extend that one: "
            "FlipProcessor.from_pretrained(the model's folder).extend(rows)"
        )


def _position_ranges(config: FlipConfig) -> list[list[tuple[int, int]]]:
    """The ranges of ids that each position may hold."""
    fields = zip(config.tabular_fields, config.feature_ranges, strict=True)
    return [ranges for field, ranges in fields for _ in range(field.num_positions)]
