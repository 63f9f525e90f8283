"""Ten steps of the package's own loop on the same global batches, however many processes share them."""

from pathlib import Path

import torch
from accelerate import Accelerator
from common import ARGUMENTS, build, check_processes, load_log, num_processes, report, train_in

from flip_hf import FlipForCTR, FlipForPreTraining
from flip_hf.nn.sharded_embeddings import sharded_features
from flip_hf.training.settings import TrainingSettings

settings = TrainingSettings(
    max_steps=10,
    per_device_train_batch_size=12 // ARGUMENTS["processes"],
    precision="fp32",
    logging_steps=1,
    max_grad_norm=0.5,
    shard_features=ARGUMENTS["sharded"],
)
accelerator = Accelerator(cpu=True)
check_processes()
folder = Path(ARGUMENTS["folder"])
processor, rows = load_log()
for cls in (FlipForPreTraining, FlipForCTR):
    with sharded_features(settings.shard_features):
        # Adam turns the rounding of a gradient that is zero into a step: hence double precision. Nothing is drawn: all
        # features of a field are MTM's negatives.
        model = build(cls, processor, torch.float64, mtm_loss="nce", mtm_num_negatives=500)
    result = train_in(folder / cls.__name__, model, rows, settings, processor)
    assert result["steps"] == 10
    assert bool(model.sharded_parameters) == (settings.shard_features and num_processes() > 1)
report({})
