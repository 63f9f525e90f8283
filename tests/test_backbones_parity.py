"""ID-based models against deepctr-torch's: with its weights copied into ours, both give the same logits."""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn

from flip_hf.backbones import BACKBONES, build_backbone

# Imported, deepctr-torch starts a thread that asks a package index for its newest version. Tests use no network, and
# without the thread nothing is asked: a patched `requests.get` would print, and could be restored before it is called.
with mock.patch("threading.Thread.start"):
    from deepctr_torch import models as deepctr
    from deepctr_torch.inputs import SparseFeat

VOCABULARY_SIZES, DIM, ROWS = (3, 11, 5, 7, 4), 6, 16
HIDDEN = (8, 5)
DEEP = {"hidden_sizes": HIDDEN}
FIELDS = [SparseFeat(f"field{i}", size, embedding_dim=DIM) for i, size in enumerate(VOCABULARY_SIZES)]


def copy_each(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        mine.load_state_dict(other.state_dict())


def copy_mlp(ours, theirs):
    copy_each([layer for layer in ours if isinstance(layer, nn.Linear)], theirs.linears)
    copy_each([layer for layer in ours if isinstance(layer, nn.BatchNorm1d)], theirs.bn if theirs.use_bn else [])


def copy_output(ours, theirs, *weights):
    ours.output.weight.copy_(torch.cat(weights, dim=1))
    ours.output.bias.copy_(theirs.out.bias)


def copy_first_order(ours, theirs):
    ours.first_order.bias.copy_(theirs.out.bias[0])


def copy_deep(ours, theirs):
    copy_mlp(ours.deep, theirs.dnn)
    copy_output(ours, theirs, theirs.dnn_linear.weight)


def copy_dcn(ours, theirs):
    copy_deep(ours, theirs)
    cross = theirs.crossnet
    for layer, kernel, bias in zip(ours.cross, cross.kernels, cross.bias, strict=True):
        layer.weight.weight.copy_(kernel.T)
        layer.bias.copy_(bias[:, 0])


def copy_dcn_matrix(ours, theirs):
    copy_deep(ours, theirs)
    cross = theirs.crossnet
    for layer, kernel, bias in zip(ours.cross, cross.kernels, cross.bias, strict=True):
        layer.linear.weight.copy_(kernel)
        layer.linear.bias.copy_(bias[:, 0])


def copy_dcn_mixture(ours, theirs):
    copy_deep(ours, theirs)
    cross = theirs.crossnet
    for layer, u, v, c, bias in zip(ours.cross, cross.U_list, cross.V_list, cross.C_list, cross.bias, strict=True):
        layer.down.weight.copy_(v.transpose(1, 2).flatten(0, 1))
        layer.middle.copy_(c)
        layer.up.copy_(u)
        layer.bias.copy_(bias[:, 0])
        # deepctr's gates have no bias and are shared by all layers; equation 3 of the paper leaves both open.
        layer.gate.weight.copy_(torch.cat([gate.weight for gate in cross.gating]))
        layer.gate.bias.zero_()


def copy_xdeepfm(ours, theirs):
    copy_mlp(ours.deep, theirs.dnn)
    for layer, convolution in zip(ours.interaction.layers, theirs.cin.conv1ds, strict=True):
        # Equation 6 of the paper has no bias.
        convolution.bias.zero_()
        layer.weight.copy_(convolution.weight[..., 0])
    copy_output(ours, theirs, theirs.cin_linear.weight, theirs.dnn_linear.weight)


def copy_afm(ours, theirs):
    copy_first_order(ours, theirs)
    ours.attention.weight.copy_(theirs.fm.attention_W.T)
    ours.attention.bias.copy_(theirs.fm.attention_b)
    ours.attention_score.weight.copy_(theirs.fm.projection_h.T)
    ours.output.weight.copy_(theirs.fm.projection_p.T)


def copy_afn(ours, theirs):
    copy_each([ours.logarithmic.input_norm, ours.logarithmic.output_norm], theirs.ltl.bn)
    ours.logarithmic.powers.weight.copy_(theirs.ltl.ltl_weights.T)
    ours.logarithmic.powers.bias.copy_(theirs.ltl.ltl_biases[0, 0])
    copy_mlp(ours.deep, theirs.afn_dnn)
    copy_output(ours, theirs, theirs.afn_dnn_linear.weight)
    # The one of deepctr's models whose last layer has a bias beside the one of `out`.
    ours.output.bias.add_(theirs.afn_dnn_linear.bias)


def copy_autoint(ours, theirs):
    for layer, other in zip(ours.attention, theirs.int_layers, strict=True):
        layer.query.weight.copy_(other.W_Query.T)
        layer.key.weight.copy_(other.W_key.T)
        layer.value.weight.copy_(other.W_Value.T)
        layer.residual.weight.copy_(other.W_Res.T)
    if theirs.use_dnn:
        copy_mlp(ours.deep, theirs.dnn)
    copy_output(ours, theirs, theirs.dnn_linear.weight)


def copy_fibinet(ours, theirs):
    copy_deep(ours, theirs)
    ours.weighing.excitation.load_state_dict(theirs.SE.excitation.state_dict())
    ours.interaction.weight.copy_(torch.stack([weight.T for weight in theirs.Bilinear.parameters()]))


class Pair(NamedTuple):
    theirs: Callable[[], nn.Module]
    our_options: dict[str, Any]
    copy: Callable[[nn.Module, nn.Module], None]


def their(model, **options):
    # `task="regression"` leaves out the sigmoid.
    return lambda: model(FIELDS, FIELDS, task="regression", **options)


def fibinet(kind):
    # A reduction of 2: with one neuron, the excitation of many rows would be all zero.
    theirs = their(deepctr.FiBiNET, dnn_hidden_units=HIDDEN, bilinear_type=kind, reduction_ratio=2)
    return Pair(theirs, {**DEEP, "bilinear": kind, "reduction": 2}, copy_fibinet)


# By the name of our model and, behind a dash, the variant.
PAIRS = {
    "lr": Pair(their(deepctr.WDL, dnn_hidden_units=()), {}, copy_first_order),
    "fm": Pair(their(deepctr.DeepFM, dnn_hidden_units=()), {}, copy_first_order),
    "fnn": Pair(their(deepctr.WDL, dnn_hidden_units=HIDDEN), DEEP, copy_deep),
    "wide_deep": Pair(their(deepctr.WDL, dnn_hidden_units=HIDDEN), DEEP, copy_deep),
    "deepfm": Pair(their(deepctr.DeepFM, dnn_hidden_units=HIDDEN), DEEP, copy_deep),
    "pnn": Pair(lambda: deepctr.PNN(FIELDS, dnn_hidden_units=HIDDEN, task="regression"), DEEP, copy_deep),
    "dcn": Pair(their(deepctr.DCN, dnn_hidden_units=HIDDEN, cross_num=3), {**DEEP, "cross_layers": 3}, copy_dcn),
    "dcnv2-matrix": Pair(
        their(deepctr.DCN, dnn_hidden_units=HIDDEN, cross_num=3, cross_parameterization="matrix"),
        {**DEEP, "cross_layers": 3, "cross": "matrix"},
        copy_dcn_matrix,
    ),
    "dcnv2-mixture": Pair(
        their(deepctr.DCNMix, dnn_hidden_units=HIDDEN, cross_num=3, low_rank=4, num_experts=3),
        {**DEEP, "cross_layers": 3, "cross": "mixture", "low_rank": 4, "num_experts": 3},
        copy_dcn_mixture,
    ),
    "xdeepfm": Pair(
        their(
            deepctr.xDeepFM,
            dnn_hidden_units=HIDDEN,
            cin_layer_size=(4, 3),
            cin_split_half=False,
            cin_activation="linear",
        ),
        {**DEEP, "map_sizes": (4, 3)},
        copy_xdeepfm,
    ),
    "afm": Pair(their(deepctr.AFM, attention_factor=4), {"attention_size": 4}, copy_afm),
    "afn": Pair(
        their(deepctr.AFN, ltl_hidden_size=4, afn_dnn_hidden_units=HIDDEN), {**DEEP, "num_neurons": 4}, copy_afn
    ),
    "autoint": Pair(
        their(deepctr.AutoInt, dnn_hidden_units=HIDDEN, att_layer_num=2, att_head_num=3),
        {**DEEP, "attention_layers": 2, "num_heads": 3},
        copy_autoint,
    ),
    "autoint-without_deep": Pair(
        their(deepctr.AutoInt, dnn_hidden_units=(), att_layer_num=2, att_head_num=3),
        {"hidden_sizes": (), "attention_layers": 2, "num_heads": 3},
        copy_autoint,
    ),
    "fibinet-all": fibinet("all"),
    "fibinet-each": fibinet("each"),
    "fibinet-interaction": fibinet("interaction"),
}


def randomise(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    # Products of embeddings of that size would be too small to tell, for one, an attention to them from their mean.
    for table in model.embedding_dict.values():
        nn.init.normal_(table.weight)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_logits_are_those_of_deepctr(pair, seed):
    make_theirs, our_options, copy = PAIRS[pair]
    theirs = make_theirs().eval()
    ours = build_backbone(pair.partition("-")[0], len(FIELDS), DIM, our_options).eval()
    # Not before: deepctr's constructors set the seed.
    torch.manual_seed(seed)
    randomise(theirs)
    first_order = theirs.linear_model.embedding_dict
    if not ours.extra_dim:
        # deepctr adds first-order weights to models whose papers, and so ours, have none.
        for table in first_order.values():
            nn.init.zeros_(table.weight)
    # A weight that is then not copied shows.
    for parameter in ours.parameters():
        nn.init.constant_(parameter, torch.nan)
    copy(ours, theirs)

    ids = torch.stack([torch.randint(size, (ROWS,)) for size in VOCABULARY_SIZES], dim=1)
    tables = [theirs.embedding_dict, first_order] if ours.extra_dim else [theirs.embedding_dict]
    columns = [torch.stack([t(i) for t, i in zip(table.values(), ids.T, strict=True)], dim=1) for table in tables]
    logits = ours(torch.cat(columns, dim=-1)).logits
    torch.testing.assert_close(logits, theirs(ids.float()).squeeze(-1), rtol=1e-5, atol=1e-5)


def test_only_models_that_deepctr_lacks_are_left_out():
    assert set(BACKBONES) - {pair.partition("-")[0] for pair in PAIRS} == {"finalmlp", "masknet", "gdcn"}
