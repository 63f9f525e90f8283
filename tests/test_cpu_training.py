"""What training on a CPU computes otherwise than torch: dropout and attention."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from flip_hf.nn.attention import CPU_ATTENTION, cpu_attention
from flip_hf.nn.dropout import ByteDropout
from flip_hf.training.compiling import compile_text_encoder
from flip_hf.training.cpu import fast_cpu_training


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)
    y = ByteDropout(p)(x)
    share = round(256 * p) / 256
    assert abs((y == 0).double().mean().item() - share) < 4 * (share * (1 - share) / x.numel()) ** 0.5
    kept = y[y != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - share)))


def test_dropout_drops_elements_independently():
    torch.manual_seed(0)
    dropped = (ByteDropout(0.5)(torch.ones(4000, 64)) == 0).double()
    correlations = torch.corrcoef(dropped.T) - torch.eye(64)
    assert correlations.abs().max() < 6 / 4000**0.5


def test_dropout_sends_gradients_to_what_it_kept():
    x = torch.randn(33, 7, requires_grad=True)
    y = ByteDropout(0.3)(x)
    y.sum().backward()
    assert torch.allclose(x.grad * x.detach(), y.detach())


def test_dropout_is_reproducible_and_absent_in_evaluation():
    layer, x = ByteDropout(0.2), torch.randn(50, 3)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p):
    x = torch.randn(5, 3)
    assert torch.equal(ByteDropout(p)(x), x * (1 - p))


def small_bert(dropout: float) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_sdpas_where_next_to_nothing_is_dropped(padded):
    """A probability below 1/512 takes the path of training, and drops nothing."""
    model = small_bert(1e-3).train()
    tokens, mask = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    if padded:
        mask[1, 5:] = 0
    found = []
    for implementation in ("sdpa", CPU_ATTENTION):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        if implementation == "sdpa":
            # torch would drop some.
            for layer in model.encoder.layer:
                layer.attention.self.dropout.p = 0.0
        else:
            for layer in model.encoder.layer:
                layer.attention.self.dropout.p = 1e-9
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state[mask.bool()]
        states.square().sum().backward()
        found.append((states.detach(), [p.grad.clone() for p in model.parameters()]))
    (states, gradients), (own_states, own_gradients) = found
    assert torch.allclose(own_states, states, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(own_gradients, gradients, strict=True))


def test_attention_drops_its_share():
    torch.manual_seed(0)
    layer = nn.Module().train()
    layer.is_causal = False
    query, key = torch.zeros(2, 3, 64, 8), torch.zeros(2, 3, 64, 8)
    value = torch.eye(64).expand(2, 3, 64, 64)
    weights = cpu_attention(layer, query, key, value, None, dropout=0.25)[0]
    assert abs((weights == 0).double().mean().item() - 0.25) < 0.01
    assert weights[weights != 0].unique().tolist() == pytest.approx([1 / 64 / 0.75])


def test_a_causal_layer_without_a_mask_is_sdpas():
    layer = nn.Module().train()
    layer.is_causal = True
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    torch.manual_seed(1)
    found = cpu_attention(layer, query, key, value, None, dropout=0.5)[0]
    torch.manual_seed(1)
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=0.5)
    assert torch.equal(found, wanted.transpose(1, 2))


def with_towers(text_model: BertModel | None) -> SimpleNamespace:
    return SimpleNamespace(base_model=SimpleNamespace(text_model=text_model))


def dropout_types(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, nn.Dropout)}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_training_on_a_cpu_takes_back_what_it_changes(error):
    model = small_bert(0.1).eval()
    before = list(model.modules())
    with contextlib.suppress(KeyboardInterrupt), fast_cpu_training(with_towers(model), torch.device("cpu")):
        assert model.config._attn_implementation == CPU_ATTENTION
        assert dropout_types(model) == {ByteDropout}
        assert {module.p for module in model.modules() if isinstance(module, ByteDropout)} == {0.0, 0.1}
        model.train()
        if error is not None:
            raise error
    assert model.config._attn_implementation == "sdpa"
    assert dropout_types(model) == {nn.Dropout}
    assert all(module is old and module.training for module, old in zip(model.modules(), before, strict=True))


def test_training_elsewhere_or_without_a_text_encoder_changes_nothing():
    model = small_bert(0.1)
    with fast_cpu_training(with_towers(model), torch.device("meta")):
        assert model.config._attn_implementation == "sdpa"
        assert dropout_types(model) == {nn.Dropout}
    with fast_cpu_training(with_towers(None), torch.device("cpu")):
        pass


def test_a_model_saved_while_it_trains_does_not_name_the_attention(tmp_path):
    model = small_bert(0.1)
    with fast_cpu_training(with_towers(model), torch.device("cpu")):
        model.save_pretrained(tmp_path)
    assert "flip_cpu" not in (tmp_path / "config.json").read_text()
    assert BertModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_another_implementation_stays():
    model = small_bert(0.1)
    model.set_attn_implementation("eager")
    with fast_cpu_training(with_towers(model), torch.device("cpu")):
        assert model.config._attn_implementation == "eager"
        assert dropout_types(model) == {ByteDropout}
    assert model.config._attn_implementation == "eager"


def test_a_compiled_text_encoder_has_the_same_gradients():
    torch.manual_seed(0)
    plain = small_bert(0.0).train()
    compiled = copy.deepcopy(plain)
    assert compile_text_encoder(with_towers(compiled), torch.device("cpu"))
    for length in (5, 9):
        tokens = torch.randint(1, 20, (3, length))
        mask = torch.ones_like(tokens)
        mask[0, 3:] = 0
        for encoder in (plain, compiled):
            encoder(tokens, attention_mask=mask).last_hidden_state.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-6), name
