"""How to train."""

from dataclasses import dataclass, field
from typing import Any, Literal

from flip_hf.training.ranges import check_ranges

CHANGES_NO_WEIGHT: dict[str, Any] = {"changes_weights": False}
"""Metadata of a setting that changes no weight: a resumed run may set it otherwise."""


@dataclass
class TrainingSettings:
    """How to train.

    Args:
        num_train_epochs: maximum number of passes over the training rows.
        max_steps: stop after this many optimiser steps; no limit by default.
        per_device_train_batch_size: rows in a batch on each device.
        gradient_accumulation_steps: number of batches whose gradients are accumulated in one optimiser step.
        contrastive_batches: the rows that pretraining contrasts with each other: one "batch" on all devices, or a
            "window" of `gradient_accumulation_steps` batches, which costs one more forward pass.
        learning_rate: peak learning rate of all parameters except the text encoder's.
        text_learning_rate: peak learning rate of the text encoder.
        weight_decay: weight decay of AdamW. It applies to matrices other than embeddings.
        oov_dropout: share of feature ids that finetuning replaces by the OOV feature of their field, from 0 to 1. A
            gated fusion needs it. One number is for all fields; a mapping such as `{user_id: 0.3}` is for the named
            fields only. A field with `show_oov: false` is then also shown as missing in the text.
        feature_l2: L2 penalty on the feature embeddings that a batch reads.
        feature_updates: the part of the feature table that an optimiser step updates: the whole table ("dense"), or
            only the "rows" that the batch read. The cost of "rows" does not grow with the table, but it lowers AUC a
            little (benchmarks/README.md). On several processes "rows" needs `shard_features`.
        warmup_ratio: share of the steps in which the learning rate rises; afterwards it falls as a cosine.
        max_grad_norm: larger gradients are scaled down to this norm.
        precision: "bf16" for autocast, "fp32", or "auto" for bf16 if the device computes in it.
        torch_compile: compile the text encoder with torch.compile. Use it on GPUs; on a CPU steps take 50% longer
            (benchmarks/README.md).
        per_device_eval_batch_size: rows in an evaluation batch on each device. Pretraining ignores it and validates
            with `per_device_train_batch_size`, because the loss of ICL depends on the number of rows in a batch.
        evaluations_per_epoch: number of evaluations on the validation rows in each epoch.
        patience: stop after this many evaluations in a row without improvement.
        logging_steps: optimiser steps between two lines of `log.jsonl`.
        report_to: services that receive the log: tensorboard, trackio, wandb. The default is tensorboard if it is
            installed; `[]` is none.
        save_steps: optimiser steps between two checkpoints. An interruption loses at most this many steps.
        save_total_limit: number of checkpoints to keep during the run. Each is about three times as large as the
            weights.
        dataloader_num_workers: number of processes that prepare batches; 0 prepares them in the main process.
        shard_features: spread the rows of the feature table over the processes, for a table that does not fit into
            one of them.
        seed: seed of all random numbers except the data split.
    """

    num_train_epochs: int = 1
    max_steps: int | None = None
    per_device_train_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    contrastive_batches: Literal["batch", "window"] = "batch"
    learning_rate: float = 1e-3
    text_learning_rate: float = 1e-4
    weight_decay: float = 0.01
    oov_dropout: float | dict[str, float] = 0.0
    feature_l2: float = 0.0
    feature_updates: Literal["dense", "rows"] = "dense"
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = field(default="auto", metadata=CHANGES_NO_WEIGHT)
    torch_compile: bool = False
    per_device_eval_batch_size: int = 512
    evaluations_per_epoch: int = 1
    patience: int = 2
    logging_steps: int = field(default=10, metadata=CHANGES_NO_WEIGHT)
    report_to: list[str] | None = field(default=None, metadata=CHANGES_NO_WEIGHT)
    save_steps: int = field(default=500, metadata=CHANGES_NO_WEIGHT)
    save_total_limit: int = field(default=2, metadata=CHANGES_NO_WEIGHT)
    dataloader_num_workers: int = field(default=0, metadata=CHANGES_NO_WEIGHT)
    shard_features: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, "training")
