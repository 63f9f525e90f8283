"""One step over the same 24 rows, as 1, 2 or 4 accumulated batches: its gradients and how often they were sent."""

from pathlib import Path

import torch
from common import ARGUMENTS, build, check_processes, collator_of, difference, load_log, num_processes, report
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flip_hf import FlipForCTR, FlipForPreTraining
from flip_hf.training.loop import Goal, train
from flip_hf.training.run import Run
from flip_hf.training.run_config import TrainingConfig

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
processor, rows = load_log()
cases = {"mlm": {"objectives": {"mlm": 1.0}}, "mtm": {"objectives": {"mtm": 1.0}}, "ctr": {}}
found = {}
for case, settings in cases.items():
    cls = FlipForCTR if case == "ctr" else FlipForPreTraining
    for accumulation in (1, 2, 4):
        config = TrainingConfig(
            batch_size=24 // accumulation // ARGUMENTS["processes"],
            accumulation=accumulation,
            precision="fp32",
            max_gradient_norm=1e9,
        )
        run = Run(Path(ARGUMENTS["report"]).parent / case, config, 0, "fp32")
        check_processes()
        model = build(cls, processor, **settings)
        goal = Goal("step", True)
        collator = collator_of(cls, processor)
        result = train(model, rows.select(range(24)), collator, config, run, goal, lambda *_: {"step": 1.0}, processor)
        assert result["steps"] == 1
        found[f"{case} {accumulation}"] = {"sent": len(sent)}
        sent.clear()
    once, *several = gradients[-3:]
    for accumulation, other in zip((2, 4), several, strict=True):
        found[f"{case} {accumulation}"]["distance"] = difference(other, once)[0]
assert num_processes() == 2
report(found)
run.accelerator.end_training()
