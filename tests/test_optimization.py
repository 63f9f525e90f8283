"""The optimiser that changes the rows that were read."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn import functional as F

from flip_hf import FieldConfig, FlipConfig, FlipForCTR
from flip_hf.training.optimization import LazyAdamW, build_optimizer, clip_gradients
from flip_hf.training.run_config import TrainingConfig


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    # What comes next in this process may want another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_rows_move_as_under_sparse_adam_and_the_rest_as_under_adamw():
    torch.manual_seed(0)
    start, weight = torch.randn(20, 4), torch.randn(4, 3)
    tables = [nn.Parameter(start.clone()) for _ in range(2)]
    dense = [nn.Parameter(weight.clone()) for _ in range(2)]
    lazy = LazyAdamW([{"params": [tables[0], dense[0]], "weight_decay": 0.0}], lr=0.1, eps=1e-12)
    # SparseAdam adds eps before it corrects the bias, AdamW after it; one this small is nothing to either.
    references = [
        torch.optim.SparseAdam([tables[1]], lr=0.1, eps=1e-12),
        torch.optim.AdamW([dense[1]], lr=0.1, weight_decay=0.0, eps=1e-12),
    ]
    for _ in range(5):
        # Some ids come twice, and no step reads the same ones.
        ids, target = torch.randint(1, 15, (8,)), torch.randn(8, 3)
        for table, matrix in zip(tables, dense, strict=True):
            (F.embedding(ids, table, sparse=True) @ matrix - target).square().mean().backward()
        for optimizer in (lazy, *references):
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(tables[0], tables[1], atol=1e-6)
    assert torch.allclose(dense[0], dense[1], atol=1e-6)
    assert torch.equal(tables[0][15:], start[15:])
    assert torch.equal(tables[0][0], start[0])
    assert not torch.equal(tables[0], start)


def test_weight_decay_of_rows_is_refused():
    table = nn.Parameter(torch.randn(5, 2))
    optimizer = LazyAdamW([table], lr=0.1, weight_decay=0.1)
    F.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    with pytest.raises(ValueError, match="can't have weight decay"):
        optimizer.step()


def test_a_state_that_is_saved_goes_on_alike():
    table = nn.Parameter(torch.randn(6, 2))
    optimizer = LazyAdamW([table], lr=0.1, weight_decay=0.0)

    def step(parameter, by):
        F.embedding(torch.tensor([1, 3]), parameter, sparse=True).square().sum().backward()
        by.step()
        by.zero_grad()

    step(table, optimizer)
    again = nn.Parameter(table.detach().clone())
    other = LazyAdamW([again], lr=0.1, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(table, optimizer)
    step(again, other)
    assert torch.equal(table, again)


def build(updates):
    torch.manual_seed(0)
    fields = [FieldConfig("a", num_features=30), FieldConfig("b", num_features=12)]
    model = FlipForCTR(FlipConfig(fields=fields, mode="id", backbone="deepfm", embedding_dim=4))
    return model, build_optimizer(model, TrainingConfig(feature_updates=updates))


def test_norms_and_clipped_gradients_are_those_of_dense_ones(accelerator):
    ids, labels = torch.tensor([[5, 35], [5, 36], [9, 35]]), torch.tensor([1.0, 0.0, 1.0])
    found = []
    for updates in ("dense", "rows"):
        model, _ = build(updates)
        (1000 * model.eval()(feature_ids=ids, labels=labels).loss).backward()
        norm = clip_gradients(model, accelerator, 1.0)
        table = model.flip.feature_embeddings.weight.grad
        assert table.is_sparse == (updates == "rows")
        found.append((norm, table.to_dense() if table.is_sparse else table))
    assert found[0][0] > 1
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5)


def test_the_first_step_is_the_dense_one_on_the_rows_that_were_read():
    ids, labels = torch.tensor([[5, 35], [9, 36]]), torch.tensor([1.0, 0.0])
    tables = []
    for updates in ("dense", "rows"):
        model, optimizer = build(updates)
        model.eval()(feature_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        tables.append(model.flip.feature_embeddings.weight.detach())
    assert torch.allclose(tables[0], tables[1], atol=1e-6)
