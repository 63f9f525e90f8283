"""The FLIP models: the two towers (`towers.py`) with the pretraining objectives or the click heads."""

import copy
import logging
from collections.abc import Mapping
from typing import Any, Self

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple

from flip_hf.click_loss import ItemCounts, click_losses, count_rows
from flip_hf.click_training import is_saved_without_clicks, logit_biases, missing_click_training
from flip_hf.configuration_flip import FlipConfig
from flip_hf.fields import MODES
from flip_hf.growth import FeatureGrowth
from flip_hf.inputs import Vectors, takes_known_inputs
from flip_hf.nn.dropout import ByteDropout
from flip_hf.nn.embeddings import FeatureEmbedding
from flip_hf.nn.fusion import FUSION
from flip_hf.nn.layers import MLP
from flip_hf.objectives import OBJECTIVES, Objective, ObjectiveOutput, PretrainingBatch
from flip_hf.outputs import FlipForCTROutput, FlipForPreTrainingOutput, FlipModelOutput
from flip_hf.pretrained_model import FittedProcessor, FlipPreTrainedModel
from flip_hf.towers import FlipModel, OutputHiddenStates

__all__ = ["FlipForCTR", "FlipForPreTraining", "FlipModel", "FlipPreTrainedModel"]

logger = logging.getLogger(__name__)


class FlipForPreTraining(FlipPreTrainedModel):
    """Both towers with the pretraining objectives (FLIP, Section 3.3).

    The loss is the weighted sum of the objectives' losses. Each view is encoded once, if an active objective reads it.
    """

    collator = "FlipPretrainingCollator(processor)"
    new_parameters = ("objectives.",)
    unused_parameters = ("text_head.", "fusion.")

    def __init__(self, config: FlipConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.mode != "joint":
            raise ValueError(f"pretraining aligns both towers: mode must be 'joint', got {config.mode!r}")
        if config.text_towers is not None:
            raise ValueError(
                "pretraining reads each text as a whole: set text_towers to None now, and set it for finetuning"
            )
        # A configuration file of another version may name unknown objectives.
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

    @classmethod
    def from_text_pretrained(
        cls,
        name_or_path: str,
        config: FlipConfig | None = None,
        processor: FittedProcessor | None = None,
        text_weights: bool = True,
        **settings: Any,
    ) -> Self:
        """As in the base class; with a processor it also calls `set_feature_counts`."""
        model = super().from_text_pretrained(name_or_path, config, processor, text_weights, **settings)
        if processor is not None:
            model.set_feature_counts(processor.feature_counts)
        return model

    @property
    def _objectives(self) -> list[Objective]:
        objectives: Any = self.objectives
        return list(objectives.values())

    def set_feature_counts(self, counts: torch.Tensor) -> None:
        """Sets how often each feature was seen, for the objectives that sample negatives: int64 (features,)."""
        for objective in self._objectives:
            objective.set_feature_counts(counts)

    def set_mlm_tokens(self, tokens: torch.Tensor) -> None:
        """Restricts MLM and text MLM to these token ids, such as `value_tokens` of the training rows.

        A checkpoint does not store them: a loaded model scores the whole vocabulary.

        Args:
            tokens: int64 (tokens,), ascending.
        """
        for objective in self._objectives:
            objective.set_tokens(tokens)

    def resize_feature_embeddings(self, growth: FeatureGrowth, init: str = "mean") -> FeatureEmbedding:
        """As in the base class; also extends the objectives that have parameters or counts for each feature."""
        embeddings = super().resize_feature_embeddings(growth, init)
        for objective in self._objectives:
            objective.grow(self.config, growth.feature_counts)
        return embeddings

    @property
    def contrasts_rows(self) -> bool:
        """Whether an objective contrasts the rows of a batch with each other, as ICL does."""
        return "icl" in self.objectives

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Counts the items of each objective's loss over this batch, int64 (): masked tokens, features or rows."""
        counts = {}
        for name in self.objectives:
            cls = OBJECTIVES[name]
            counts[name] = cls.num_items(batch["feature_ids"], batch[cls.labels] if cls.labels else None)
        return counts

    def contrastive_views(
        self,
        feature_ids: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        vectors: Vectors = None,
        vector_places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The projected vectors that ICL compares, float32 (B, projection_dim) each; arguments as in `forward`."""
        icl: Any = self.objectives["icl"]
        tabular = self.flip.encode_tabular(feature_ids, vectors, vector_places).tabular_representation
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
        output_hidden_states: OutputHiddenStates = None,
        output_attentions: bool | None = None,
        vectors: Vectors = None,
        vector_places: torch.Tensor | None = None,
    ) -> FlipForPreTrainingOutput:
        """Computes the losses of one batch.

        Args:
            feature_ids: int64 (B, P), without masks.
            input_ids: int64 (B, T), without masks.
            attention_mask: int64 (B, T).
            masked_feature_ids: int64 (B, P), with the mask feature at masked positions.
            mtm_labels: int64 (B, F), the feature of each masked field; one of its features if the field holds several;
                -100 for fields that are not masked.
            masked_input_ids: int64 (B, T), with the tokenizer's mask token at masked positions.
            mlm_labels: int64 (B, T), the ids of the masked tokens; -100 elsewhere.
            num_items_in_batch: divisor of each objective's summed loss; by default the counts of this batch. A training
                loop passes the counts over all accumulated batches and processes, so that every masked item has the
                same weight.
            output_hidden_states: as in `FlipModel`.
            output_attentions: as in `FlipModel`.
            vectors: as in `FlipModel`.
            vector_places: as in `FlipModel`.
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
            # MLM reads the weights after their own forward, at the end of which FSDP2 would free them.
            token_embeddings.set_reshard_after_forward(False)
        # Before the text, as in contrastive_views, so that both draw the same dropout.
        tabular = self.flip.encode_tabular(feature_ids, vectors, vector_places)
        masked_tabular = masked_text = text = None
        if "text" in self.views:
            text = self.flip.encode_text(input_ids, attention_mask, output_hidden_states, output_attentions)
        if "masked_tabular" in self.views and masked_feature_ids is not None:
            masked_tabular = self.flip.encode_tabular(masked_feature_ids, vectors, vector_places)
        if "masked_text" in self.views and masked_input_ids is not None:
            masked_text = self.flip.encode_text(
                masked_input_ids, attention_mask, output_hidden_states, output_attentions
            )

        assert self.flip.feature_embeddings is not None
        losses: dict[str, torch.Tensor] = {}
        metrics: dict[str, torch.Tensor] = {}
        # accelerate loads offloaded weights only during their own module's forward.
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
            )
            for name, objective in self.objectives.items():
                output: ObjectiveOutput = objective(batch)
                divisor = output.num_items if num_items_in_batch is None else num_items_in_batch[name]
                losses[name] = output.loss_sum / torch.as_tensor(divisor, device=output.loss_sum.device).clamp(min=1)
                metrics.update(output.metrics)
        total = torch.stack([self.config.objectives[name] * loss for name, loss in losses.items()]).sum()
        assert tabular.id_logits is not None
        # No objective reads the click logit, but distributed training waits for a gradient of every parameter.
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
    """Click-through-rate prediction from one tower or from both (FLIP, Section 3.4).

    In mode `"joint"` the logit is `a * id_logits + (1 - a) * text_logits`, where `a` is a learned weight or the output
    of a gate (`config.fusion`). The loss is the sum of the binary cross-entropies of the three logits;
    `config.fusion_gradients` decides whether the fused logit's loss trains the towers. In the modes `"id"` and
    `"text"` the model has one tower, and the logit and the loss are that tower's.
    """

    new_parameters = ("text_head.", "fusion.")
    _keys_to_ignore_on_load_unexpected: Any = (r"^objectives\.",)

    def __init__(self, config: FlipConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        # Biases of the click logits, by name, as loaded from a checkpoint without click training; else empty.
        self.biases_without_clicks: dict[str, torch.Tensor] = {}
        self.flip = FlipModel(config, text_model)
        if config.mode != "id":
            size = self.flip.text_size
            head: list[nn.Module] = [ByteDropout(config.head_dropout)]
            if config.text_towers is not None:
                # A hidden layer, because a linear layer alone could only add the towers up.
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
        """As in the base class; warns if the checkpoint was never trained on clicks."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if is_saved_without_clicks(model.config):
            model.biases_without_clicks = {
                n: p.detach().clone() for n, p in logit_biases(model).items() if not p.is_meta
            }
        if reason := model.needs_finetuning:
            logger.warning("%s %s: finetune it before you use its logits", pretrained_model_name_or_path, reason)
        return loaded

    @property
    def needs_finetuning(self) -> str | None:
        """Why the click logits are not trained yet; None if any training loop has trained them.

        A model counts as trained if the bias of one tower's click logit is not zero. If it was loaded from a
        pretraining checkpoint, one of these biases must have changed since. If the checkpoint lacked the parameters of
        the text head or of the fusion, some of these must have changed since initialisation.

        A model that was trained in memory can therefore be scored at once. A model that was only initialised still
        counts as untrained after it is saved and loaded. The same rule works for older checkpoints, other training
        loops and merged PEFT adapters. `resize_feature_embeddings` and `in_mode` change no bias. Weights that
        accelerate has offloaded can't be read, and count as trained.

        Limitation: if a training loop freezes all of these biases, the model still counts as untrained. LoRA without
        the heads, on an untrained model, is an example. Train the heads too:
        `LoraConfig(modules_to_save=["text_head", "fusion"])`.
        """
        return missing_click_training(self)

    def check_finetuned(self) -> None:
        """Raises ValueError, with the reason, if the click logits were never trained."""
        if reason := self.needs_finetuning:
            raise ValueError(
                f"{self.name_or_path or 'the model'} {reason}, so its probabilities mean nothing. Finetune it "
                "(FlipForCTR, flip-hf finetune)"
            )

    def in_mode(self, mode: str) -> "FlipForCTR":
        """Returns one tower of this joint model as a model of its own. Both share the modules; nothing is copied.

        Args:
            mode: `"id"` or `"text"`. If this model is already in that mode, the model itself is returned.

        Raises:
            ValueError: this model lacks the tower.
        """
        if mode == self.config.mode:
            return self
        if self.config.mode != "joint" or mode not in MODES:
            raise ValueError(f"a model in mode={self.config.mode!r} has no tower for mode={mode!r}")
        config: Any = copy.deepcopy(self.config)
        config.mode = mode
        with torch.device("meta"):
            alone = type(self)(config)
        for whole, part in ((self.flip, alone.flip), (self, alone)):
            for name, _ in part.named_children():
                if name != "flip":
                    setattr(part, name, getattr(whole, name))
        alone.biases_without_clicks = self.biases_without_clicks
        alone.fresh_parameters = tuple(n for n in self.fresh_parameters if n in alone.state_dict())
        return alone.train(self.training)

    @property
    def contrasts_rows(self) -> bool:
        """False: the click loss of a row does not depend on other rows."""
        return False

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Counts the rows of each part of the loss over this batch.

        Args:
            batch: arguments of `forward`, with `labels`.

        Returns:
            int64 () each: `ctr`, the rows with a label; if the batch has teacher logits also `distillation`, all rows.

        Raises:
            ValueError: the batch has no labels.
        """
        if "labels" not in batch:
            raise ValueError(
                "the batch has no labels to learn from: encode the rows with processor.encode_dataset(dataset, "
                "with_label=True)"
            )
        return count_rows(batch["labels"], batch.get("teacher_logits"))

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
        vectors: Vectors = None,
        vector_places: torch.Tensor | None = None,
        tower_vectors: torch.Tensor | None = None,
        teacher_logits: torch.Tensor | None = None,
    ) -> FlipForCTROutput:
        """Computes click logits and, if labels are given, the loss.

        Args:
            feature_ids: int64 (B, P); ignored in mode "text".
            input_ids: int64 (B, T), with `text_towers` (B, towers, T); ignored in mode "id".
            attention_mask: int64, of the same shape as `input_ids`; ignored in mode "id".
            labels: 0 or 1, or -100 for a row without a label, any numeric type (B,).
            num_items_in_batch: divisor of the summed loss: the number of rows, or the counts that `num_items` returns;
                by default those of this batch.
            output_hidden_states: as in `FlipModel`.
            output_attentions: as in `FlipModel`.
            vectors: as in `FlipModel`.
            vector_places: as in `FlipModel`.
            tower_vectors: as in `FlipModel`.
            teacher_logits: another model's click logits of these rows, float (B,). If labels are given too, the logits
                of the ID-based model and of the text encoder and the fused logit learn from the labels and from the
                teacher's probabilities (Hinton et al., 2015, arXiv 1503.02531).

        Raises:
            ValueError: teacher logits are given, some rows lack a label, and `num_items_in_batch` is a single number.
                The two parts of the loss then need different divisors: pass the counts of `num_items`.
        """
        views = self.flip(
            feature_ids,
            input_ids,
            attention_mask,
            output_hidden_states,
            output_attentions,
            vectors,
            vector_places,
            tower_vectors,
            return_dict=True,
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
            logits = self.fusion(*fused, self.flip.oov_fractions(feature_ids))
        else:
            logits = id_logits if id_logits is not None else text_logits

        losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            learning = {"loss": logits}
            if id_logits is not None and text_logits is not None:
                learning |= {"id_loss": id_logits, "text_loss": text_logits}
            losses = click_losses(learning, labels, teacher_logits, self.config.distillation_weight, num_items_in_batch)
        return FlipForCTROutput(
            logits=logits,
            id_logits=id_logits,
            text_logits=text_logits,
            feature_penalty=_feature_penalty(views.field_embeddings),
            hidden_states=views.hidden_states,
            attentions=views.attentions,
            **losses,
        )


def _feature_penalty(field_embeddings: torch.Tensor | None) -> torch.Tensor | None:
    return None if field_embeddings is None else field_embeddings.float().square().sum(dim=(1, 2)).mean()
