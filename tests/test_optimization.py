"""Which parameter has which learning rate and decay, the schedule, clipping, and updates of the rows that were read."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn import functional as F

from flip_hf import FieldConfig, FlipConfig, FlipForCTR
from flip_hf.training.optimization import (
    LazyAdamW,
    build_optimizer,
    build_schedule,
    clip_gradients,
    learning_rates,
    parameter_groups,
)
from flip_hf.training.settings import TrainingSettings


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
    optimizer = build_optimizer(model, TrainingSettings(feature_updates=updates))
    assert optimizer.defaults["fused"] is True, "all parameters in one pass"
    return model, optimizer


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


def both_towers():
    text = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    text |= {"intermediate_size": 8, "max_position_embeddings": 8}
    fields = [FieldConfig("a", num_features=30), FieldConfig("b", num_features=12)]
    return FlipForCTR(
        FlipConfig(text_config=text, fields=fields, embedding_dim=4, backbone_options={"hidden_sizes": [4]})
    )


def test_groups_are_by_learning_rate_and_decay():
    model = both_towers()
    settings = {"learning_rate": 0.3, "text_learning_rate": 0.02, "weight_decay": 0.7}
    optimizer = build_optimizer(model, TrainingSettings(**settings))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is True
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(found) == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    for name, parameter in model.named_parameters():
        in_text = name.startswith("flip.text_model.")
        rate = "text_learning_rate" if in_text else "learning_rate"
        is_matrix = parameter.ndim >= 2 and "embedding" not in name
        assert found[name]["rate"] == rate, name
        assert found[name]["lr"] == settings[rate], name
        assert found[name]["weight_decay"] == (0.7 if is_matrix else 0.0), name
    # Of both kinds and of both towers there are some.
    assert len(optimizer.param_groups) == 4
    assert found["flip.feature_embeddings.weight"]["weight_decay"] == 0.0
    assert learning_rates(optimizer) == {"learning_rate": 0.3, "text_learning_rate": 0.02}


def test_one_tower_alone_has_its_own_groups():
    model, _ = build("dense")
    assert {group["rate"] for group in parameter_groups(model, TrainingSettings())} == {"learning_rate"}
    text = both_towers().in_mode("text")
    optimizer = build_optimizer(text, TrainingSettings(feature_updates="rows"))
    assert {group["rate"] for group in optimizer.param_groups} == {"learning_rate", "text_learning_rate"}


@pytest.mark.parametrize(("ratio", "total", "warmup"), [(0.25, 20, 5), (0.05, 30, 2), (0.0, 10, 0)])
def test_learning_rates_rise_in_a_line_and_fall_as_a_cosine(ratio, total, warmup):
    rates = [0.5, 0.01]
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])
    schedule = build_schedule(optimizer, TrainingSettings(warmup_ratio=ratio), total)
    for step in range(total):
        fallen = max(step - warmup, 0) / (total - warmup)
        factor = min(step / warmup if warmup else 1.0, (1 + math.cos(math.pi * fallen)) / 2)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([factor * rate for rate in rates])
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_weight_decay_and_learning_rates_move_what_they_should():
    """A step without gradients of the loss: only what is decayed moves, each part at its own rate."""
    model = both_towers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(
        model, TrainingSettings(learning_rate=0.3, text_learning_rate=0.02, weight_decay=0.5, feature_updates="rows")
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 0.02 if name.startswith("flip.text_model.") else 0.3
        decay = 0.5 if parameter.ndim >= 2 and "embedding" not in name else 0.0
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - rate * decay), msg=name)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_gradients_are_scaled_to_the_norm_and_no_further(accelerator, max_norm):
    for updates in ("dense", "rows"):
        model, _ = build(updates)
        ids = torch.tensor([[5, 35], [5, 36]])
        (1000 * model.eval()(feature_ids=ids, labels=torch.tensor([1.0, 0.0])).loss).backward()
        whole = {n: p.grad.to_dense().clone() for n, p in model.named_parameters()}
        before = torch.cat([g.flatten() for g in whole.values()]).norm()
        found = clip_gradients(model, accelerator, max_norm * before.item())
        torch.testing.assert_close(found, before)
        for name, parameter in model.named_parameters():
            expected = whole[name] * min(max_norm, 1.0)
            torch.testing.assert_close(parameter.grad.to_dense(), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_norm_of_a_sharded_table_is_that_of_all_shares(sparse):
    """Two processes, of which the other's share has a gradient of norm 2."""
    model, _ = build("rows" if sparse else "dense")
    ids = torch.tensor([[5, 35], [9, 36]])
    (1000 * model.eval()(feature_ids=ids, labels=torch.tensor([1.0, 0.0])).loss).backward()
    plain = SimpleNamespace(sharded_parameters={"table": model.flip.feature_embeddings.weight})
    whole = {n: p.grad.to_dense().clone() for n, p in model.named_parameters()}
    summed = []

    def reduce(value, reduction):
        summed.append((value.item(), reduction))
        return value + 4.0

    several = SimpleNamespace(unwrap_model=lambda prepared: plain, reduce=reduce)
    expected = (sum(g.square().sum() for g in whole.values()) + 4.0).sqrt()
    norm = clip_gradients(model, several, 0.5)
    torch.testing.assert_close(norm, expected)
    own = whole["flip.feature_embeddings.weight"].square().sum().item()
    assert summed == [(pytest.approx(own), "sum")], "each process's own rows are added up, once"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad.to_dense(), whole[name] * (0.5 / expected).clamp(max=1), rtol=1e-4, atol=1e-8
        )


def test_rows_under_a_group_of_their_own_follow_adam():
    """Against Adam written from its equations (Kingma and Ba, ICLR 2015, Algorithm 1), in double precision."""
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    rate, (beta1, beta2), eps = 0.07, (0.8, 0.95), 0.03
    optimizer = LazyAdamW([table], lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=0.0)
    expected = table.detach().clone()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step, ids in enumerate([[1, 3], [3, 3], [5, 1]], start=1):
        weights = torch.randn(2, 3, dtype=torch.float64)
        (F.embedding(torch.tensor(ids), table, sparse=True) * weights).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        gradient = torch.zeros_like(expected).index_add_(0, torch.tensor(ids), weights)
        for row in set(ids):
            first[row] = beta1 * first[row] + (1 - beta1) * gradient[row]
            second[row] = beta2 * second[row] + (1 - beta2) * gradient[row] ** 2
            corrected = (second[row] / (1 - beta2**step)).sqrt() + eps
            expected[row] -= rate * first[row] / (1 - beta1**step) / corrected
        torch.testing.assert_close(table.detach(), expected)
    state = optimizer.state[table]
    assert state["step"].item() == 3
    torch.testing.assert_close(state["exp_avg"], first)
    torch.testing.assert_close(state["exp_avg_sq"], second)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match=r"^LazyAdamW takes no closure$"):
        LazyAdamW([nn.Parameter(torch.zeros(1))]).step(lambda: 0.0)
