"""Ten steps of the package's own loop on the same global batches, however many processes share them."""

from pathlib import Path

import torch
from common import ARGUMENTS, build, check_processes, collator_of, load_log, num_processes, report

from flip_hf import FlipForCTR, FlipForPreTraining
from flip_hf.nn.sharded_embeddings import sharded_features
from flip_hf.training.loop import Goal, train
from flip_hf.training.run import Run
from flip_hf.training.run_config import TrainingConfig

config = TrainingConfig(
    max_steps=10,
    batch_size=12 // ARGUMENTS["processes"],
    precision="fp32",
    log_steps=1,
    max_gradient_norm=0.5,
    shard_features=ARGUMENTS["sharded"],
)
folder = Path(ARGUMENTS["folder"])
processor, rows = load_log()
for cls in (FlipForPreTraining, FlipForCTR):
    run = Run(folder / cls.__name__, config, config.seed, config.precision)
    check_processes()
    with sharded_features(config.shard_features):
        # Adam turns the rounding of a gradient that is zero into a step: hence double precision.
        model = build(cls, processor, torch.float64, mtm_loss="nce", mtm_num_negatives=500)
    # Where nothing is drawn, the negatives of MTM are all features of the field.
    result = train(
        model, rows, collator_of(cls, processor), config, run, Goal("step", True), lambda *_: {"step": 1.0}, processor
    )
    assert result["steps"] == 10
    assert bool(model.sharded_parameters) == (config.shard_features and num_processes() > 1)
report({})
run.accelerator.end_training()
