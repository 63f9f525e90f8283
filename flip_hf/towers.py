"""FlipModel: the two towers of FLIP side by side."""

from typing import Any, TypeAlias

import torch
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.utils import can_return_tuple

from flip_hf.backbones import Backbone, backbone_class, build_backbone
from flip_hf.configuration_flip import FlipConfig
from flip_hf.fields import vector_owners, vector_sizes
from flip_hf.inputs import Vectors, takes_known_inputs
from flip_hf.nn.bags import FieldPooling
from flip_hf.nn.embeddings import FeatureEmbedding
from flip_hf.nn.pooling import TEXT_POOLING
from flip_hf.nn.sharded_embeddings import feature_embedding_class
from flip_hf.nn.vectors import VectorProjection
from flip_hf.outputs import FlipModelOutput
from flip_hf.pretrained_model import FlipPreTrainedModel

_TABULAR_PARTS = ("feature_embeddings", "field_pooling", "vector_projection", "backbone")

OutputHiddenStates: TypeAlias = bool | int | list[int] | None
"""Whether to return all hidden states, the indices of those to return, or None to follow the configuration."""


class FlipModel(FlipPreTrainedModel):
    """The two towers: an ID-based model for the tabular view, a text encoder for the textual view."""

    unused_parameters = ("objectives.", "text_head.", "fusion.")

    def __init__(self, config: FlipConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.feature_embeddings: FeatureEmbedding | None = None
        self.field_pooling: FieldPooling | None = None
        self.vector_projection: VectorProjection | None = None
        self.backbone: Backbone | None = None
        self.text_model: Any = None
        if config.mode != "text":
            fields = config.tabular_fields
            places = {f.name: i for i, f in enumerate(fields)}
            self.feature_embeddings = feature_embedding_class()(
                config.num_features,
                config.position_ranges,
                config.embedding_dim,
                config.feature_initializer_range,
                backbone_class(config.backbone).extra_dim,
            )
            self.field_pooling = FieldPooling(
                [f.num_positions for f in fields],
                [None if f.target is None else places[f.target] for f in fields],
                config.embedding_dim,
                config.attention_normalization,
            )
            if sizes := vector_sizes(config.fields):
                self.vector_projection = VectorProjection(
                    sizes,
                    vector_owners(config.fields),
                    config.embedding_dim,
                    config.vector_hidden_dim,
                    config.feature_initializer_range,
                )
            self.backbone = build_backbone(config.backbone, len(fields), config.embedding_dim, config.backbone_options)
        if config.mode != "id":
            if text_model is None:
                text_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
            self.text_model = text_model
            if getattr(self.text_model, "pooler", None) is not None:
                # Nothing reads the pooler, and distributed training stops at parameters without gradients.
                self.text_model.pooler = None
        absent = {"joint": (), "id": ("text_model",), "text": _TABULAR_PARTS}
        self._keys_to_ignore_on_load_unexpected: Any = [rf"^(flip\.)?{part}\." for part in absent[config.mode]]
        self.post_init()

    @property
    def tabular_size(self) -> int:
        """Width of the tabular representation."""
        assert self.backbone is not None
        return self.backbone.representation_size

    @property
    def text_size(self) -> int:
        """Width of the pooled text: the text encoder's width, times the number of text towers."""
        text_config: Any = self.config.text_config
        size: int = text_config.hidden_size
        return size if self.config.text_towers is None else size * len(self.config.text_towers)

    def encode_tabular(
        self, feature_ids: torch.Tensor, vectors: Vectors = None, vector_places: torch.Tensor | None = None
    ) -> FlipModelOutput:
        """Runs the tabular tower: int64 (B, P) -> its parts of FlipModelOutput; the rest as in `forward`."""
        assert self.feature_embeddings is not None and self.field_pooling is not None and self.backbone is not None
        features = self.feature_embeddings(feature_ids)  # (B, P, D), or wider
        if self.vector_projection is not None:
            if vectors is None or vector_places is None:
                raise ValueError(
                    f"fields have vectors: vectors and vector_places are needed; {self.collator} makes them"
                )
            added = self.vector_projection(feature_ids, vectors, vector_places)  # (B, P, D)
            # Columns of the table beyond the embedding (first-order weights) get nothing added.
            features = features + F.pad(added, (0, features.shape[-1] - added.shape[-1]))
        embeddings = self.field_pooling(features, feature_ids)  # (B, F, D)
        representation, logits = self.backbone(embeddings)
        return FlipModelOutput(field_embeddings=embeddings, tabular_representation=representation, id_logits=logits)

    def oov_fractions(self, feature_ids: torch.Tensor) -> torch.Tensor:
        """The fraction of each field's features that are OOV: int64 (B, P) -> float (B, F)."""
        assert self.feature_embeddings is not None and self.field_pooling is not None
        return self.field_pooling.marked_fractions(self.feature_embeddings.is_oov(feature_ids), feature_ids)

    def encode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        output_hidden_states: OutputHiddenStates = None,
        output_attentions: bool | None = None,
    ) -> FlipModelOutput:
        """Runs the textual tower: int64 (B, T) twice -> its parts of FlipModelOutput; the rest as in `forward`."""
        towers = self.config.text_towers
        if towers is not None:
            if input_ids.shape[1:-1] != (len(towers),) or attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"with text_towers, input_ids and attention_mask must have the shape (B, {len(towers)}, T), but "
                    f"have {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}; "
                    "FlipCTRCollator.from_model(processor, model) makes them"
                )
            # The text encoder reads each part as a text of its own: no part sees another, and positions start at 0.
            input_ids, attention_mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        output = self._read(input_ids, attention_mask, output_hidden_states, output_attentions)
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

    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Encodes texts of any tower, one vector each: int64 (texts, T) twice -> float (texts, C)."""
        states = self._read(input_ids, attention_mask).last_hidden_state
        return TEXT_POOLING[self.config.text_pooling](states, attention_mask)

    def _read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        output_hidden_states: OutputHiddenStates = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """Runs the text encoder on texts, int64 (texts, T) twice, and returns its output."""
        asked: dict[str, Any] = {}
        for name, value in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
            # If neither the call nor this configuration asks for them, the text encoder's own configuration decides.
            if value is not None or getattr(self.config, name):
                asked[name] = True if value is None else value
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask, **asked)

    def _known_text(self, tower_vectors: torch.Tensor) -> FlipModelOutput:
        """The result of `encode_text` for texts whose tower vectors are known: float (B, towers, C)."""
        if self.config.text_towers is None:
            raise ValueError("tower_vectors need text_towers; pass input_ids and attention_mask to this model instead")
        text_config: Any = self.config.text_config
        shape = len(self.config.text_towers), text_config.hidden_size
        if tower_vectors.shape[1:] != shape:
            raise ValueError(
                f"tower_vectors must have the shape (B, {shape[0]}, {shape[1]}), but have {tuple(tower_vectors.shape)}"
            )
        return FlipModelOutput(text_representation=tower_vectors.to(self.dtype).flatten(1))

    @can_return_tuple  # type: ignore[untyped-decorator]
    @takes_known_inputs
    def forward(
        self,
        feature_ids: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: OutputHiddenStates = None,
        output_attentions: bool | None = None,
        vectors: Vectors = None,
        vector_places: torch.Tensor | None = None,
        tower_vectors: torch.Tensor | None = None,
    ) -> FlipModelOutput:
        """Encodes the views of the towers that are built.

        Args:
            feature_ids: int64 (B, P); needed unless the mode is "text".
            input_ids: int64 (B, T), with `text_towers` (B, towers, T); needed unless the mode is "id".
            attention_mask: int64 of the same shape, 1 on tokens and 0 on padding; needed with `input_ids`.
            output_hidden_states: whether to return the text encoder's hidden states, or the indices of those to return;
                by default the configuration decides.
            output_attentions: whether to return its attention weights, which needs `attn_implementation="eager"`; by
                default the configuration decides.
            vectors: for each field that owns vectors, the distinct vectors of the batch, float (1, vectors, size);
                needed if fields have vectors, unless the mode is "text".
            vector_places: int64 (B, P), for each position the index of its vector in `vectors`, -1 for none; needed
                with `vectors`.
            tower_vectors: with `text_towers`, the vectors of the towers' texts, float (B, towers, C), instead of
                `input_ids` and `attention_mask`; the text encoder is then not called.
        """
        parts: dict[str, Any] = {}
        if self.config.mode != "text":
            if feature_ids is None:
                raise ValueError(f"mode={self.config.mode!r} needs feature_ids; {self.collator} makes them")
            parts.update(self.encode_tabular(feature_ids, vectors, vector_places))
        if self.config.mode != "id" and tower_vectors is not None:
            parts.update(self._known_text(tower_vectors))
        elif self.config.mode != "id":
            if input_ids is None or attention_mask is None:
                raise ValueError(
                    f"mode={self.config.mode!r} needs input_ids and attention_mask; {self.collator} makes them"
                )
            parts.update(self.encode_text(input_ids, attention_mask, output_hidden_states, output_attentions))
        return FlipModelOutput(**parts)
