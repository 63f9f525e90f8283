"""Two steps under DistributedDataParallel as it is: it stops at the second where a parameter got no gradient."""

from itertools import chain, combinations

import torch
from accelerate import Accelerator
from common import build, check_processes, collator_of, load_log, num_processes, rank, report

from flip_hf import FieldConfig, FlipConfig, FlipForCTR, FlipForPreTraining
from flip_hf.backbones import BACKBONES
from flip_hf.objectives import OBJECTIVES

accelerator = Accelerator(cpu=True)
check_processes()
processor, rows = load_log()
subsets = chain.from_iterable(combinations(OBJECTIVES, n) for n in range(1, len(OBJECTIVES) + 1))
cases = [(FlipForPreTraining, {"objectives": dict.fromkeys(subset, 1.0)}) for subset in subsets]
cases += [(FlipForCTR, {"mode": mode}) for mode in ("joint", "id", "text")]
cases += [(FlipForCTR, {"fusion": "gated"})]
cases += [(FlipForCTR, {"mode": "id", "backbone": name, "backbone_options": {}}) for name in BACKBONES]
runs = []
for cls, settings in cases:
    batch = collator_of(cls, processor, settings.get("mode", "joint"))([rows[i] for i in range(8)])
    runs.append((build(cls, processor, **settings), batch))
bags = [
    FieldConfig("item", num_features=9),
    FieldConfig("seen", kind="sequence", share_embedding="item", target="item", max_values=3, num_features=0),
]
ids = torch.tensor([[5, 4, 6, 7], [6, 5, 0, 0]]).repeat(4, 1)
labels = torch.tensor([0.0, 1.0]).repeat(4)
runs.append((FlipForCTR(FlipConfig(fields=bags, mode="id")), {"feature_ids": ids, "labels": labels}))

for model, batch in runs:
    prepared = accelerator.prepare(model)
    assert not prepared.find_unused_parameters
    share = {name: values[rank() :: num_processes()] for name, values in batch.items()}
    for _ in range(2):
        prepared(**share).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
report({"runs": len(runs)})
