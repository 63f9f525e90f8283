"""Settings of the training loop."""

from dataclasses import dataclass, field
from typing import Any, Literal

from flip_hf.training.ranges import check_ranges

CHANGES_NO_WEIGHT: dict[str, Any] = {"changes_weights": False}
"""Metadata of a setting that does not change the weights, so a resumed run may change it."""


@dataclass
class TrainingSettings:
    """Settings of the training loop.

    Args:
        num_train_epochs: maximum number of passes over the training rows.
        max_steps: maximum number of optimiser steps; no limit by default.
        per_device_train_batch_size: rows in a batch on each device.
        gradient_accumulation_steps: number of batches whose gradients are accumulated in one optimiser step.
        contrastive_batches: the rows that pretraining contrasts with each other. "batch" contrasts the rows of one
            batch on all devices. "window" contrasts the rows of `gradient_accumulation_steps` batches and costs one
            more forward pass.
        learning_rate: peak learning rate of all parameters except the text encoder's.
        text_learning_rate: peak learning rate of the text encoder.
        weight_decay: weight decay of AdamW. It applies to matrices other than embeddings.
        oov_dropout: share of feature ids, from 0 to below 1, that finetuning replaces with the OOV (out-of-vocabulary)
            feature of their field. `fusion: gated` needs it, unless `fusion_rows: validation` learns the gate from rows
            with unseen values. One number applies to all fields; a mapping such as `{user_id: 0.3}` applies to the
            named fields only. If a field has `show_oov: false`, the text shows the replaced value as missing.
        feature_l2: weight of the L2 penalty on the feature embeddings that a batch reads.
        feature_updates: the rows of the feature table that an optimiser step updates. "dense" updates all rows; "rows"
            updates only the rows that the batch reads. The cost of "rows" does not grow with the table, but its AUC is
            slightly lower (benchmarks/README.md). With several processes, "rows" needs `shard_features`.
        warmup_ratio: share of the steps in which the learning rate rises linearly; afterwards it follows a cosine decay
            to 0.
        max_grad_norm: maximum norm of the gradients; larger gradients are scaled down to it.
        precision: "bf16" computes with bf16 autocast, "fp32" in single precision; "auto" chooses bf16 if the device
            supports it.
        torch_compile: compile the text encoder with torch.compile. Use it on GPUs; on a CPU steps take 50% longer
            (benchmarks/README.md).
        per_device_eval_batch_size: rows in an evaluation batch on each device. Pretraining ignores it and validates
            with `per_device_train_batch_size`, because the loss of ICL depends on the number of rows in a batch.
        evaluations_per_epoch: number of evaluations on the validation rows in each epoch.
        patience: stop after this many consecutive evaluations without improvement.
        logging_steps: number of optimiser steps between two lines of `log.jsonl`.
        report_to: experiment trackers that receive the log: tensorboard, trackio, wandb. The default is tensorboard if
            it is installed; `[]` turns trackers off.
        save_steps: number of optimiser steps between two checkpoints. A crash loses at most this many steps.
        save_total_limit: number of checkpoints to keep during the run. Each is about three times as large as the
            weights.
        dataloader_num_workers: number of processes that prepare batches; 0 prepares them in the main process.
        shard_features: distribute the rows of the feature table over the processes, for a table that is too large for
            one device.
        seed: seed of all random numbers except those of the data split.
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
