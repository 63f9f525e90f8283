"""Rows of all processes with their gradients: among threads, and as contrastive negatives of two real processes."""

import copy
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flip_hf import FieldConfig, FlipConfig
from flip_hf.nn import gather
from flip_hf.nn.gather import first_row, gather_rows, is_distributed, row_counts
from flip_hf.objectives.icl import InstanceContrastiveLearning

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


class Group:
    """`torch.distributed` among threads: the collectives that `gather` calls, and what they ask of their tensors."""

    def __init__(self, world_size):
        self.world_size, self.barrier, self.ranks = world_size, threading.Barrier(world_size), threading.local()
        self.sent = [None] * world_size

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def get_world_size(self):
        return self.world_size

    def get_rank(self):
        return self.ranks.rank

    def of_all(self, tensor):
        assert tensor.is_contiguous()
        self.sent[self.get_rank()] = tensor.clone()
        self.barrier.wait(60)
        found = list(self.sent)
        assert len({(part.shape, part.dtype) for part in found}) == 1
        self.barrier.wait(60)
        return found

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.of_all(tensor)))

    def all_gather(self, parts, tensor):
        for part, found in zip(parts, self.of_all(tensor), strict=True):
            part.copy_(found)


@pytest.fixture
def in_threads(monkeypatch):
    """Runs a function of a rank in as many threads as there shall be processes."""

    def run(world_size, function):
        group = Group(world_size)
        monkeypatch.setattr(gather, "dist", group)

        def of_rank(rank):
            group.ranks.rank = rank
            try:
                return function(rank)
            except BaseException:
                group.barrier.abort()
                raise

        with ThreadPoolExecutor(world_size) as threads:
            return list(threads.map(of_rank, range(world_size)))

    return run


COUNTS = [2, 0, 3, 1]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("counts", [COUNTS, [2, 2], [1, 5]], ids=str)
def test_rows_of_all_processes_with_gradients_of_all_losses(in_threads, counts, shape):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sum(counts), *shape, generator=generator, dtype=torch.float64)
    # The loss of each process weighs all rows by numbers of its own.
    weights = torch.randn(len(counts), sum(counts), *shape, generator=generator, dtype=torch.float64)
    starts = [sum(counts[:rank]) for rank in range(len(counts))]

    def of_rank(rank):
        own = whole[starts[rank] : starts[rank] + counts[rank]].clone().requires_grad_()
        found = row_counts(len(own), own.device)
        gathered = gather_rows(own, found)
        (gathered * weights[rank]).sum().backward()
        return is_distributed(), found, first_row(found), gathered.detach(), own.grad

    for rank, (several, found, first, gathered, gradient) in enumerate(in_threads(len(counts), of_rank)):
        assert several is True
        assert found == counts
        assert all(type(count) is int for count in found)
        assert first == starts[rank]
        assert torch.equal(gathered, whole)
        own = slice(starts[rank], starts[rank] + counts[rank])
        torch.testing.assert_close(gradient, weights.sum(dim=0)[own])


def test_rows_that_do_not_lie_together_in_memory_are_gathered(in_threads):
    whole = torch.arange(24).reshape(4, 6).T

    def of_rank(rank):
        own = whole[3 * rank : 3 * rank + 3]
        assert not own.is_contiguous()
        return gather_rows(own, [3, 3])

    for gathered in in_threads(2, of_rank):
        assert gathered.dtype == torch.int64
        assert torch.equal(gathered, whole)


def test_one_process_has_its_own_rows(in_threads):
    rows = torch.randn(3, 2)
    assert is_distributed() is False
    assert row_counts(3, rows.device) == [3]
    assert first_row([3]) == 0
    assert gather_rows(rows, [3]) is rows
    (alone,) = in_threads(1, lambda rank: (is_distributed(), row_counts(3, rows.device), first_row([3])))
    assert alone == (False, [3], 0)


@pytest.mark.parametrize("counts", [[5, 3], [1, 7], [2, 0, 4, 2]], ids=str)
def test_rows_of_all_processes_are_contrasted_as_one_process_contrasts_them(in_threads, counts):
    generator = torch.Generator().manual_seed(0)
    fields = [FieldConfig("a", num_features=9), FieldConfig("b", num_features=9)]
    head = InstanceContrastiveLearning(FlipConfig(fields=fields, projection_dim=6), 4, 7)
    # Rows 1 and 6 have the same features, and most processes hold one of them.
    ids = torch.tensor([[2, 3], [2, 4], [3, 3], [4, 4], [5, 3], [6, 2], [2, 4], [7, 7]])
    # The views of each row nearly agree, so a shifted target lowers the accuracy and raises the loss.
    views = [torch.nn.functional.normalize(torch.randn(8, 6, generator=generator), dim=1) for _ in range(2)]
    views[1] = torch.nn.functional.normalize(views[0] + 0.3 * views[1], dim=1)

    def contrast(own):
        parts = [view[own].clone().requires_grad_() for view in views]
        output = copy.deepcopy(head).contrast(*parts, ids[own])
        output.loss_sum.backward()
        return output, [part.grad for part in parts]

    whole, gradients = contrast(slice(0, 8))
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    found = in_threads(len(counts), lambda rank: contrast(slice(starts[rank], starts[rank] + counts[rank])))
    assert [output.num_items.item() for output, _ in found] == counts
    torch.testing.assert_close(sum(output.loss_sum for output, _ in found), whole.loss_sum)
    for name, value in whole.metrics.items():
        assert value > 0.8
        right = sum(output.metrics[name] * count for (output, _), count in zip(found, counts, strict=True))
        torch.testing.assert_close(right / 8, value)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(torch.cat([own[i] for _, own in found]), gradient)
