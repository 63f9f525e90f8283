"""The contract of ID-based models, and each against a reading of its paper in NumPy."""

import numpy as np
import pytest
import torch

from flip_hf.backbones import BACKBONES, build_backbone
from flip_hf.nn.layers import FactorizationMachine

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
            low = np.tanh(np.tanh(x @ v.T) @ own[f"middle.{expert}.weight"].T)
            total = total + gates[:, expert : expert + 1] * (x0 * (low @ own[f"up.{expert}.weight"].T + own["bias"]))
        x = total
    representation = np.concatenate([x, mlp(x0, weights, "deep")], axis=1)
    output = model(embeddings)
    np.testing.assert_allclose(output.representation.detach(), representation, rtol=1e-5, atol=1e-5)
    logits = representation @ weights["output.weight"][0] + weights["output.bias"]
    np.testing.assert_allclose(output.logits.detach(), logits, rtol=1e-5, atol=1e-5)


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
    output = model(embeddings)
    np.testing.assert_allclose(output.logits.detach(), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        output.representation.detach(), np.concatenate([np.sum(pairs, axis=0), deep], axis=1), atol=1e-5
    )


def test_factorization_machine_sums_all_pairs():
    embeddings = torch.randn(3, 5, 4, dtype=torch.float64)
    pairs = sum(embeddings[:, i] * embeddings[:, j] for i in range(5) for j in range(i))
    torch.testing.assert_close(FactorizationMachine()(embeddings), pairs)


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="backbone='dcn9' is not one of dcnv2, deepfm"):
        build_backbone("dcn9", 2, 4, {})
    with pytest.raises(ValueError, match="backbone 'deepfm' has no option layers; it has hidden_sizes, dropout"):
        build_backbone("deepfm", 2, 4, {"layers": 3})
