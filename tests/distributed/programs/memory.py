"""A step with a table that, with its gradient and Adam's moments, is larger than a process may allocate."""

import re
import resource
from pathlib import Path

import torch
from accelerate import Accelerator
from common import ARGUMENTS, check_processes, num_processes, rank, report

from flip_hf import FieldConfig, FlipConfig, FlipForCTR
from flip_hf.nn.sharded_embeddings import sharded_features
from flip_hf.training.optimization import build_optimizer, clip_gradients
from flip_hf.training.settings import TrainingSettings

ROWS, DIM = 1 << 20, 32
accelerator = Accelerator(cpu=True)
check_processes()
in_use = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) << 10
# Training holds the table four times.
limit = in_use + 3 * ROWS * DIM * 4
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def train():
    fields = [FieldConfig("user", num_features=ROWS), FieldConfig("kind", num_features=5)]
    config = FlipConfig(fields=fields, mode="id", embedding_dim=DIM, backbone_options={"hidden_sizes": [8]})
    torch.manual_seed(0)
    model = FlipForCTR(config)
    before = getattr(model.flip.feature_embeddings, "rows", torch.empty(0))[:100].detach().clone()
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, TrainingSettings()))
    ids = torch.stack([torch.randint(2, ROWS, (64,)), torch.full((64,), ROWS + 3)], dim=1)
    # Rows that both processes hold.
    ids[:8, 0] = torch.arange(2, ROWS, ROWS // 8)
    labels = torch.arange(64) % 2
    share = slice(rank(), None, num_processes())
    prepared(feature_ids=ids[share], labels=labels[share]).loss.backward()
    clip_gradients(prepared, accelerator, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    model.save_pretrained(ARGUMENTS["folder"])
    accelerator.wait_for_everyone()
    rows = model.flip.feature_embeddings.rows.detach()
    # To map a file counts against the limit, though it takes no memory.
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = FlipForCTR.from_pretrained(ARGUMENTS["folder"]).flip.feature_embeddings
    assert torch.equal(again.rows, rows)
    assert len(rows) < ROWS
    changed = (rows[:100] != before).any(dim=1).nonzero().flatten() + again.first
    assert set(changed.tolist()) == {i for i in ids.flatten().tolist() if again.first <= i < again.first + 100}
    return again.num_features


found = {"error": None}
with sharded_features():
    try:
        found["rows"] = train()
    except RuntimeError as error:
        found["error"] = str(error)
report(found)
