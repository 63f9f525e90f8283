"""The base class of the FLIP models."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from flip_hf.checkpoint.load_report import check_load_report, without_load_report
from flip_hf.checkpoint.sharded_table import add_table, read_rows
from flip_hf.checkpoint.weights_check import expecting, find_weights, limited_building
from flip_hf.configuration_flip import FlipConfig, check_settings
from flip_hf.fetch import public_name
from flip_hf.field_checks import check_fields
from flip_hf.fields import FieldConfig, with_nearest
from flip_hf.growth import FeatureGrowth, resize_feature_table
from flip_hf.hub import push_to_hub
from flip_hf.nn.embeddings import FeatureEmbedding
from flip_hf.nn.sharded_embeddings import ShardedFeatureEmbedding
from flip_hf.text_encoder import LOADING_ARGUMENTS, load_text_config, load_text_encoder
from flip_hf.text_towers import place_of_tower

_TABLE = "feature_embeddings.weight"
"""Name of the feature table in every checkpoint, without the model's prefix."""

_SETTINGS = {f.name for f in fields(FlipConfig)} - {f.name for f in fields(PreTrainedConfig)}
"""The settings that FlipConfig adds to those of transformers."""


class FittedProcessor(Protocol):
    """The part of a `FlipProcessor` that a new model reads."""

    @property
    def fields(self) -> Sequence[FieldConfig]:
        """The fitted fields."""

    @property
    def feature_counts(self) -> torch.Tensor:
        """int64 (features,): how often each feature was seen."""


class FlipPreTrainedModel(PreTrainedModel):
    """Base class of the FLIP models: initialisation, loading, saving, and starting from a pretrained text encoder."""

    config: FlipConfig
    config_class = FlipConfig
    base_model_prefix = "flip"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # Otherwise Trainer would not pass `num_items_in_batch`, and would divide the loss by the accumulated batches.
    accepts_loss_kwargs = True

    collator: ClassVar[str] = "FlipCTRCollator.from_model(processor, model)"
    """The call that creates the model's collator, for error messages."""

    new_parameters: tuple[str, ...] = ()
    """Prefixes of parameters that another FLIP model's checkpoint may lack: heads that this model initialises."""

    unused_parameters: tuple[str, ...] = ()
    """Prefixes of parameters in another FLIP model's checkpoint that this model ignores: heads that it lacks."""

    fresh_parameters: tuple[str, ...] = ()
    """Parameters that the checkpoint lacked, so `from_pretrained` initialised them; empty once the model is saved."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Raises ValueError for unknown settings of `from_pretrained`, which transformers passes to the constructor."""
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
        """As in transformers, except that `from_pretrained` reads the rows of a sharded feature table itself."""
        if self._sharded_table is not None:
            unexpected = self._keys_to_ignore_on_load_unexpected or ()
            self._keys_to_ignore_on_load_unexpected = [*unexpected, rf"(^|\.){_TABLE}$"]
            self._keys_to_ignore_on_load_missing: Any = [rf"^{name}$" for name in self.sharded_parameters]
        super().post_init()

    @property
    def _sharded_table(self) -> ShardedFeatureEmbedding | None:
        table: Any = self.base_model.feature_embeddings
        return table if isinstance(table, ShardedFeatureEmbedding) else None

    @property
    def sharded_parameters(self) -> dict[str, nn.Parameter]:
        """By name, the parameters of a sharded feature table, of which every process holds different rows."""
        table = self._sharded_table
        return {} if table is None else {name: p for name, p in self.named_parameters() if p is table.rows}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # Read by DistributedDataParallel. It would otherwise send the objectives' counts, which are as long as the
        # feature table, to all processes in every step, although they are equal everywhere and never change.
        return [*self.sharded_parameters, *(name for name, _ in self.named_buffers() if name.startswith("objectives."))]

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's token embeddings; raises NotImplementedError without one, as in transformers."""
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
        """As in transformers: the contexts in which a loaded model is built."""
        return [*super().get_init_context(*args, **kwargs), limited_building()]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as transformers does, but from safetensors only.

        The files are validated before memory is allocated for the weights.

        Args:
            pretrained_model_name_or_path: a local folder or a repository's name.
            args: as in transformers.
            kwargs: as in transformers. Settings of FlipConfig such as `mode="id"` replace the saved ones, or those of
                `config` if it is given. `mode=None` keeps the saved mode.

        Raises:
            OSError: there are no weights in safetensors files.
            ValueError: weights that the configuration asks for are missing in the checkpoint, or have another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["use_safetensors"] = True
        if kwargs.get("mode", "") is None:
            del kwargs["mode"]
        if isinstance(config := kwargs.get("config"), FlipConfig):
            # transformers would pass them to __init__; its pipelines pass the configuration and its settings together.
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
        check_load_report(model, info, source, may_mismatch)
        model.fresh_parameters = tuple(sorted(info["missing_keys"]))
        if (table := model._sharded_table) is not None and weights is not None:
            shape = table.num_features, table.rows.shape[1]
            first, end = table.bounds(dist.get_rank())
            with torch.no_grad():
                table.rows.copy_(read_rows(weights.files, _TABLE, shape, first, end))
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does.

        If the feature table is sharded, every process must call this. Process 0 writes one checkpoint, which loads
        into any number of processes. It receives the table in blocks of rows, so it never holds the whole table.

        Args:
            save_directory: a local folder.
            args: as in transformers; none with a sharded feature table.
            kwargs: as in transformers; no `push_to_hub` or `max_shard_size` with a sharded feature table.

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
                "unsharded and push the loaded one"
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
        """Pushes the model, its processor, its model card and the loading code in one commit.

        Args:
            repo_id: name of the repository, such as `org/name`.
            processor: the model's processor. Without it, only the model is pushed, with a warning.
            kwargs: as in `flip_hf.hub.push_to_hub`: `record`, `card`, `private`, `revision`, `token`, `commit_message`
                and more.

        Returns:
            The commit's hash.

        Raises:
            ValueError, OSError: as in `flip_hf.hub.push_to_hub`.
        """
        return push_to_hub(repo_id, model=self, processor=processor, **kwargs)

    @classmethod
    def from_text_pretrained(
        cls,
        name_or_path: str,
        config: FlipConfig | None = None,
        processor: FittedProcessor | None = None,
        text_weights: bool = True,
        **settings: Any,
    ) -> Self:
        """Creates a model whose text encoder starts from a plain transformers checkpoint. All other weights are random.

        `FlipForPreTraining.from_text_pretrained(encoder, processor=processor, text_layers=1, backbone="dcnv2")`

        Args:
            name_or_path: the text encoder: a local folder, or a repository's name, which is looked up in the local Hub
                cache and then on the Hub.
            config: the whole configuration; `config.text_config` must describe that text encoder. By default it is
                built from the text encoder's configuration, the processor's fields and `settings`.
            processor: the fitted `FlipProcessor`; needed without `config`. `FlipForPreTraining` also takes from it how
                often each feature was seen.
            text_weights: whether to load the text encoder's weights. If false, they are initialised randomly. Mode
                `"id"` loads none.
            settings: settings of `FlipConfig`, if `config` is not given; and transformers' loading arguments for the
                text encoder, such as `revision`, `dtype` or `attn_implementation`. Custom code of the text encoder runs
                only with `trust_remote_code=True`.

        Raises:
            ValueError: an unknown setting; settings of `FlipConfig` together with `config`; neither a configuration nor
                a processor, or their fields differ; or the checkpoint does not fit `config.text_config`.
            flip_hf.fetch.FetchError: the text encoder was not found anywhere.
        """
        called = f"{cls.__name__}.from_text_pretrained"
        loading = {name: settings.pop(name) for name in LOADING_ARGUMENTS & settings.keys()}
        check_settings(settings, called, LOADING_ARGUMENTS)
        if config is not None and settings:
            raise ValueError(f"{called}: set {', '.join(map(repr, settings))} in the config that you pass")
        if found := sorted({"fields", "text_config", "text_base_model"} & settings.keys()):
            raise ValueError(f"{called} sets {', '.join(found)} itself; pass config=FlipConfig(...) to choose")
        if config is None and processor is None:
            raise ValueError(f"{called} needs processor=, a fitted FlipProcessor, or config=")
        if config is None and processor is not None:
            text_config: Any = load_text_config(name_or_path, **loading)
            config = FlipConfig(text_config=text_config, fields=list(processor.fields), **settings)
        assert config is not None
        if processor is not None:
            check_fields(processor.fields, config.fields)
        text_model = None
        if text_weights and config.mode != "id":
            text_model = load_text_encoder(name_or_path, config.text_config, **loading)
            config.text_base_model = public_name(name_or_path)
        return cls(config, text_model=text_model)

    def tower_vectors(self, batch: Mapping[str, torch.Tensor], tower: str) -> torch.Tensor:
        """Returns a text tower's vectors of a batch, float32 (B, C), such as for an index of items.

        `CTRPredictionPipeline.tower_vectors` takes raw rows, and needs only the tower's fields.

        Args:
            batch: `input_ids` and `attention_mask`, int64 (B, towers, T), as `FlipCTRCollator` returns them.
            tower: the tower's name in `config.text_towers`. The towers of a list are named "0", "1" and so on.

        Raises:
            ValueError: the model has no text towers, or none of that name.
        """
        place = place_of_tower(tower, self.config)
        ids, mask = (batch[name][:, place] for name in ("input_ids", "attention_mask"))
        flip: Any = self.base_model
        vectors: torch.Tensor = flip.encode_texts(ids, mask)
        return vectors.float()

    def resize_feature_embeddings(self, growth: FeatureGrowth, init: str = "mean") -> FeatureEmbedding:
        """Adds rows for the features that `processor.extend(rows)` added; all others keep their ids and weights.

        Save the processor beside the model afterwards, because the two must agree. Rebuild an optimizer that holds the
        table's old parameter.

        Args:
            growth: the return value of `processor.extend`.
            init: initial value of new features. `"mean"`: the mean of their field. `"text"`: predicted from the text
                tower's vector of the feature's text by a ridge regression, which is fitted on the field's known
                features. If the text does not help (no lower leave-one-out error), the prediction is the mean.

        Returns:
            The larger table.

        Raises:
            ValueError: the growth belongs to another processor, the model lacks a tower that `init` needs, or the
                table is sharded.
        """
        return resize_feature_table(self.base_model, growth, init)
