"""Contrastive negatives from two real processes: loss and gradients are those of one process with all rows."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import torch
    import torch.distributed as dist
    from flip_hf import FieldConfig, FlipConfig
    from flip_hf.objectives import PretrainingBatch
    from flip_hf.objectives.icl import InstanceContrastiveLearning

    SHARES = [5, 3]  # the processes need not hold equally many rows
    config = FlipConfig(fields=[FieldConfig("a", num_features=9), FieldConfig("b", num_features=9)], projection_dim=6)
    torch.manual_seed(0)
    head = InstanceContrastiveLearning(config, 4, 7).double()
    ids = torch.randint(2, 5, (8, 2))
    tabular, text = torch.randn(8, 4).double(), torch.randn(8, 7).double()

    def gradients(rows, num_items):
        head.zero_grad()
        views = tabular[rows].clone().requires_grad_(), text[rows].clone().requires_grad_()
        absent = dict.fromkeys(["mtm_labels", "mlm_labels", "masked_tabular", "token_states", "masked_token_states"])
        empty = torch.empty(0)
        output = head(PretrainingBatch(
            feature_ids=ids[rows], attention_mask=empty, tabular=views[0], text=views[1],
            embed_features=None, token_embeddings=empty, **absent,
        ))
        (output.loss_sum / num_items).backward()
        return output.loss_sum.item(), [v.grad for v in views], [p.grad.clone() for p in head.parameters()]

    loss, of_views, of_parameters = gradients(slice(0, 8), 8)  # one process that holds all rows
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    start = sum(SHARES[:dist.get_rank()])
    own = slice(start, start + SHARES[dist.get_rank()])
    # What each process adds is averaged over processes, as distributed training does: hence 8 / 2 items.
    part, view_grads, parameter_grads = gradients(own, 8 / 2)
    total = torch.tensor(part)
    dist.all_reduce(total)
    assert abs(total.item() - loss) < 1e-5, (total, loss)
    for found, expected in zip(view_grads, of_views):
        assert torch.allclose(found / 2, expected[own], rtol=1e-5, atol=1e-7), (found / 2 - expected[own]).abs().max()
    for found, expected in zip(parameter_grads, of_parameters):
        dist.all_reduce(found)
        assert torch.allclose(found / 2, expected, rtol=1e-5, atol=1e-7), (found / 2 - expected).abs().max()
    dist.destroy_process_group()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("shares", ["[5, 3]", "[4, 4]", "[1, 7]"])
def test_two_processes_contrast_all_rows(tmp_path, shares):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM).replace("[5, 3]", shares))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
