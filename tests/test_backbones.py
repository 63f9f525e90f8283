"""The contract of ID-based models, and each against a reading of its paper in NumPy."""

import numpy as np
import pytest
import torch

from flip_hf.backbones import BACKBONES, build_backbone
from flip_hf.nn.layers import BatchNorm, FactorizationMachine

NUM_FIELDS, DIM, ROWS = 4, 6, 5


def build(name, **options):
    torch.manual_seed(0)
    model = build_backbone(name, NUM_FIELDS, DIM, options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model, torch.randn(ROWS, NUM_FIELDS, DIM + model.extra_dim)


def arrays(model):
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def mlp(x, weights, name):
    layer = 0
    while f"{name}.{layer}.weight" in weights:
        x = np.maximum(x @ weights[f"{name}.{layer}.weight"].T + weights[f"{name}.{layer}.bias"], 0)
        layer += 3
    return x


def layer_norm(x, weight, bias):
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * weight + bias


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def assert_output(model, embeddings, representation, logits):
    output = model(embeddings)
    np.testing.assert_allclose(output.representation.detach(), representation, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output.logits.detach(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_no_parameter_is_a_scalar(name):
    # FSDP2 shards none.
    assert all(p.ndim > 0 for p in build(name)[0].parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_contract(name):
    model, embeddings = build(name)
    embeddings.requires_grad_()
    representation, logits = model(embeddings)
    assert representation.shape == (ROWS, model.representation_size)
    assert logits.shape == (ROWS,)
    (logits.sum() + representation.sum()).backward()
    assert (embeddings.grad != 0).any(dim=(0, 2)).all(), "every field is read"
    alone = model(embeddings[2:3])
    torch.testing.assert_close(alone.representation[0], representation[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.logits[0], logits[2], rtol=1e-5, atol=1e-5)
    assert BACKBONES[name].__doc__


@pytest.mark.parametrize("name", BACKBONES)
def test_a_batch_of_one_row_trains(name):
    model, embeddings = build(name)
    model.train()
    statistics = {key: value.clone() for key, value in model.named_buffers()}
    representation, logits = model(embeddings[:1])
    (logits.sum() + representation.sum()).backward()
    assert logits.isfinite().all()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    for key, value in model.named_buffers():
        assert value.isfinite().all(), key
        if key.startswith("deep."):  # one value a channel says nothing of their spread
            assert torch.equal(value, statistics[key]), key


@pytest.mark.parametrize("name", BACKBONES)
def test_the_logits_bias_tells_of_clicks_alone(name):
    model, embeddings = build(name)
    embeddings.requires_grad_()
    bias = model.get_submodule(model.logit_module).bias
    representation, logits = model(embeddings)
    (of_representation,) = torch.autograd.grad(representation.sum(), bias, retain_graph=True, allow_unused=True)
    (of_logits,) = torch.autograd.grad(logits.sum(), bias)
    assert of_representation is None
    assert of_logits.tolist() == [ROWS]


def test_one_row_is_normalised_by_the_running_statistics():
    torch.manual_seed(0)
    norm, plain = BatchNorm(3), torch.nn.BatchNorm1d(3)
    rows = torch.randn(8, 3)
    assert torch.equal(norm(rows), plain(rows))
    assert torch.equal(norm(rows[:1]), plain.eval()(rows[:1]))
    assert torch.equal(norm.running_mean, plain.running_mean)


def test_dcnv2_is_the_equations_of_its_paper():
    model, embeddings = build("dcnv2", hidden_sizes=[7, 5], cross_layers=2, low_rank=3, num_experts=2)
    weights = arrays(model)
    x0 = embeddings.reshape(ROWS, -1).double().numpy()
    x = x0
    for layer in range(2):
        own = {
            name.removeprefix(f"cross.{layer}."): v for name, v in weights.items() if name.startswith(f"cross.{layer}.")
        }
        gates = np.exp(x @ own["gate.weight"].T + own["gate.bias"])
        gates /= gates.sum(axis=1, keepdims=True)
        total = x
        for expert in range(2):
            v = own["down.weight"][3 * expert : 3 * expert + 3]
            low = np.tanh(np.tanh(x @ v.T) @ own["middle"][expert].T)
            total = total + gates[:, expert : expert + 1] * (x0 * (low @ own["up"][expert].T + own["bias"]))
        x = total
    representation = np.concatenate([x, mlp(x0, weights, "deep")], axis=1)
    logits = representation @ weights["output.weight"][0] + weights["output.bias"]
    assert_output(model, embeddings, representation, logits)


def test_deepfm_is_the_equations_of_its_paper():
    model, embeddings = build("deepfm", hidden_sizes=[7])
    weights = arrays(model)
    rows = embeddings.double().numpy()
    vectors, first_order = rows[..., :DIM], rows[..., DIM]
    pairs = [vectors[:, i] * vectors[:, j] for i in range(NUM_FIELDS) for j in range(i)]
    deep = mlp(vectors.reshape(ROWS, -1), weights, "deep")
    logits = (
        first_order.sum(axis=1)
        + np.sum(pairs, axis=(0, 2))
        + deep @ weights["output.weight"][0]
        + weights["output.bias"]
    )
    assert_output(model, embeddings, np.concatenate([np.sum(pairs, axis=0), deep], axis=1), logits)


def test_lr_is_a_bias_and_the_sum_of_the_weights():
    model, embeddings = build("lr")
    first_order = embeddings[..., DIM].double().numpy()
    assert_output(model, embeddings, first_order, arrays(model)["first_order.bias"] + sum(first_order.T))


def test_fm_is_the_equation_of_its_paper():
    model, embeddings = build("fm")
    rows = embeddings.double().numpy()
    representation, logits = np.zeros((ROWS, DIM)), np.full(ROWS, arrays(model)["first_order.bias"])
    for row in range(ROWS):
        for i in range(NUM_FIELDS):
            logits[row] += rows[row, i, DIM]
            for j in range(i + 1, NUM_FIELDS):
                logits[row] += np.dot(rows[row, i, :DIM], rows[row, j, :DIM])
                representation[row] += rows[row, i, :DIM] * rows[row, j, :DIM]
    assert_output(model, embeddings, representation, logits)


@pytest.mark.parametrize("gate_fields", [((), ()), ((0,), (1, 2))])
def test_finalmlp_is_the_equations_of_its_paper(gate_fields):
    # Streams of unequal widths, so that a bilinear form the wrong way round does not fit.
    options = {"hidden_sizes": [7, 6], "second_hidden_sizes": [4], "gate_size": 3, "num_heads": 2}
    model, embeddings = build("finalmlp", gate_fields=gate_fields, **options)
    weights = arrays(model)
    rows = embeddings.double().numpy()
    streams = []
    for k, fields in enumerate(gate_fields):
        gate = f"selections.{k}.gate"
        if fields:
            context = np.concatenate([rows[:, field] for field in fields], axis=1)
        else:
            context = np.tile(weights[f"selections.{k}.context"], (ROWS, 1))
        hidden = np.maximum(context @ weights[f"{gate}.0.weight"].T + weights[f"{gate}.0.bias"], 0)
        gates = 2 * sigmoid(hidden @ weights[f"{gate}.2.weight"].T + weights[f"{gate}.2.bias"])
        streams.append(mlp(gates * rows.reshape(ROWS, -1), weights, f"streams.{k}"))
    first, second = streams
    logits = np.zeros(ROWS)
    for row in range(ROWS):
        logits[row] = (
            weights["fusion.first.bias"][0]
            + np.dot(weights["fusion.first.weight"][0], first[row])
            + np.dot(weights["fusion.second.weight"][0], second[row])
        )
        for head in range(2):
            own_first, own_second = first[row, 3 * head : 3 * head + 3], second[row, 2 * head : 2 * head + 2]
            logits[row] += own_first @ weights["fusion.weight"][head] @ own_second
    assert_output(model, embeddings, np.concatenate(streams, axis=1), logits)


@pytest.mark.parametrize("structure", ["parallel", "serial"])
def test_masknet_is_the_equations_of_its_paper(structure):
    model, embeddings = build(
        "masknet", structure=structure, num_blocks=3, block_size=8, reduction=0.5, hidden_sizes=[7, 5]
    )
    weights = arrays(model)
    rows = embeddings.double().numpy()
    guide = rows.reshape(ROWS, -1)
    normed = np.concatenate(
        [
            layer_norm(rows[:, i], weights[f"field_norm.{i}.weight"], weights[f"field_norm.{i}.bias"])
            for i in range(NUM_FIELDS)
        ],
        axis=1,
    )

    def mask_block(k, x):
        own = {name.removeprefix(f"blocks.{k}."): v for name, v in weights.items() if name.startswith(f"blocks.{k}.")}
        aggregated = np.maximum(guide @ own["mask.0.weight"].T + own["mask.0.bias"], 0)
        mask = aggregated @ own["mask.2.weight"].T + own["mask.2.bias"]
        return np.maximum(layer_norm((mask * x) @ own["linear.weight"].T, own["norm.weight"], own["norm.bias"]), 0)

    if structure == "parallel":
        representation = mlp(np.concatenate([mask_block(k, normed) for k in range(3)], axis=1), weights, "deep")
    else:
        representation = mask_block(2, mask_block(1, mask_block(0, normed)))
    logits = representation @ weights["output.weight"][0] + weights["output.bias"]
    assert_output(model, embeddings, representation, logits)


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
def test_gdcn_is_the_equations_of_its_paper(structure):
    model, embeddings = build("gdcn", structure=structure, hidden_sizes=[7, 5], cross_layers=2)
    weights = arrays(model)
    c0 = embeddings.reshape(ROWS, -1).double().numpy()
    c = c0
    for layer in range(2):
        crossed = c0 * (c @ weights[f"cross.{layer}.linear.weight"].T + weights[f"cross.{layer}.linear.bias"])
        c = crossed * sigmoid(c @ weights[f"cross.{layer}.gate.weight"].T) + c
    if structure == "parallel":
        representation = np.concatenate([c, mlp(c0, weights, "deep")], axis=1)
    else:
        representation = mlp(c, weights, "deep")
    logits = representation @ weights["output.weight"][0] + weights["output.bias"]
    assert_output(model, embeddings, representation, logits)


def test_factorization_machine_sums_all_pairs():
    embeddings = torch.randn(3, 5, 4, dtype=torch.float64)
    pairs = sum(embeddings[:, i] * embeddings[:, j] for i in range(5) for j in range(i))
    torch.testing.assert_close(FactorizationMachine()(embeddings), pairs)


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"^backbone='dcn9' is not one of lr, fm, .*, gdcn$"):
        build_backbone("dcn9", 2, 4, {})
    with pytest.raises(ValueError, match="backbone 'deepfm' has no option 'layers' \\(known: hidden_sizes, dropout"):
        build_backbone("deepfm", 2, 4, {"layers": 3})


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("dcnv2", {"cross": "x"}, "cross='x'"),
        ("gdcn", {"structure": "x"}, "structure='x'"),
        ("masknet", {"structure": "x"}, "structure='x'"),
        ("fibinet", {"bilinear": "x"}, "bilinear='x'"),
        ("autoint", {"num_heads": 4}, "num_heads=4"),
        ("finalmlp", {"num_heads": 3, "hidden_sizes": [8]}, "num_heads=3"),
    ],
)
def test_an_option_that_cannot_be_is_named(name, options, named):
    with pytest.raises(ValueError, match=f"^backbone '{name}': {named} "):
        build_backbone(name, NUM_FIELDS, DIM, options)


@pytest.mark.parametrize("name", ["afm", "pnn", "fibinet"])
def test_pairs_need_two_fields(name):
    with pytest.raises(ValueError, match="at least 2 fields"):
        build_backbone(name, 1, DIM, {})
