"""One step over the same 24 rows, as 1, 2 or 4 accumulated batches: its gradients and how often they were sent."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from common import ARGUMENTS, build, check_processes, difference, load_log, report, train_in
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flip_hf import FlipForCTR, FlipForPreTraining
from flip_hf.data.distillation import student_rows
from flip_hf.training.settings import TrainingSettings

sent = []


class Counting(DistributedDataParallel):
    """Counts the messages that average gradients."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.register_comm_hook(None, self.count)

    @staticmethod
    def count(_, bucket):
        sent.append(bucket.index())
        return allreduce_hook(None, bucket)


torch.nn.parallel.DistributedDataParallel = Counting
gradients = []
register_optimizer_step_pre_hook(
    lambda optimizer, *_: gradients.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
)
accelerator = Accelerator(cpu=True)
check_processes()
processor, rows = load_log()
cases = {
    "mlm": {"objectives": {"mlm": 1.0}},
    "mtm": {"objectives": {"mtm": 1.0}},
    "ctr": {},
    "student": {"distillation_weight": 0.7},
}
found = {}
for case, settings in cases.items():
    cls = FlipForCTR if case in ("ctr", "student") else FlipForPreTraining
    log = rows.select(range(24))
    if case == "student":
        # The last rows have no label: most batches have other shares of such rows than the whole.
        unlabelled = log.select(range(9)).remove_columns("label")
        log = student_rows(log.select(range(15)), unlabelled, np.linspace(-3, 3, 24, dtype=np.float32))
    for accumulation in (1, 2, 4):
        training = TrainingSettings(
            per_device_train_batch_size=24 // accumulation // ARGUMENTS["processes"],
            gradient_accumulation_steps=accumulation,
            precision="fp32",
            max_grad_norm=1e9,
        )
        model = build(cls, processor, **settings)
        folder = Path(ARGUMENTS["report"]).parent / case
        result = train_in(folder, model, log, training, processor)
        assert result["steps"] == 1
        found[f"{case} {accumulation}"] = {"sent": len(sent)}
        sent.clear()
    once, *several = gradients[-3:]
    for accumulation, other in zip((2, 4), several, strict=True):
        found[f"{case} {accumulation}"]["distance"] = difference(other, once)[0]
report(found)
