"""Each loss against a reference written from its equation in NumPy, in double precision."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax
from torch.nn.functional import cross_entropy

from flip_hf import FieldConfig, FlipConfig, FlipForCTR, FlipForPreTraining
from flip_hf.backbones import BACKBONES
from flip_hf.configuration_flip import PRETRAINING_OBJECTIVES
from flip_hf.objectives import OBJECTIVES, PretrainingBatch
from flip_hf.objectives.base import mean_over_items

SIZES = [30, 5, 60]
FIELDS = [FieldConfig(f"field{i}", num_features=n) for i, n in enumerate(SIZES)]
BOUNDS = np.cumsum([2, *SIZES])
NUM_ROWS, NUM_TOKENS = 9, 14


def build(cls=FlipForPreTraining, **settings):
    torch.manual_seed(0)
    text = {
        "model_type": "bert",
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 70,
        "max_position_embeddings": 32,
    }
    config = FlipConfig(
        **{
            "text_config": text,
            "fields": FIELDS,
            "embedding_dim": 8,
            "projection_dim": 12,
            "mtm_num_negatives": 7,
            **settings,
        }
    )
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(seed=0, duplicate=True):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(int(a), int(b), (NUM_ROWS,), generator=generator) for a, b in pairwise(BOUNDS)]
    feature_ids = torch.stack(columns, dim=1)
    if duplicate:
        feature_ids[4] = feature_ids[1]
    lengths = torch.randint(6, NUM_TOKENS + 1, (NUM_ROWS,), generator=generator)
    attention_mask = (torch.arange(NUM_TOKENS) < lengths[:, None]).long()
    input_ids = torch.randint(5, 70, (NUM_ROWS, NUM_TOKENS), generator=generator) * attention_mask
    in_table = torch.rand(feature_ids.shape, generator=generator) < 0.5
    in_text = (torch.rand(input_ids.shape, generator=generator) < 0.3) & attention_mask.bool()
    return {
        "feature_ids": feature_ids,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "masked_feature_ids": feature_ids.masked_fill(in_table, 1),
        "mtm_labels": feature_ids.masked_fill(~in_table, -100),
        "masked_input_ids": input_ids.masked_fill(in_text, 4),
        "mlm_labels": input_ids.masked_fill(~in_text, -100),
    }


def arrays(module):
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x, weights, name):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x):
    return x * stats.norm.cdf(x)


def softplus(x):
    return np.logaddexp(0, x)


@torch.no_grad()
def views(model, batch):
    """The encoders' outputs, which are not what is under test here, in double precision."""
    flip = model.flip
    text = flip.encode_text(batch["input_ids"], batch["attention_mask"])
    masked_text = flip.encode_text(batch["masked_input_ids"], batch["attention_mask"])
    found = {
        "tabular": flip.encode_tabular(batch["feature_ids"]).tabular_representation,
        "masked_tabular": flip.encode_tabular(batch["masked_feature_ids"]).tabular_representation,
        "text": text.text_representation,
        "states": text.token_states,
        "masked_states": masked_text.token_states,
    }
    return {name: value.double().numpy() for name, value in found.items()}


def mlm_reference(model, batch, candidates, name="mlm"):
    """Mean loss and accuracy over the candidates, ascending ids of tokens."""
    seen, weights = views(model, batch), arrays(model.objectives[name])
    words = model.get_input_embeddings().weight.detach().double().numpy()[candidates]
    losses, correct = [], []
    for row, position in zip(*np.nonzero(batch["mlm_labels"].numpy() != -100), strict=True):
        state = [seen["masked_states"][row, position]] + ([seen["tabular"][row]] if name == "mlm" else [])
        hidden = layer_norm(gelu(linear(np.concatenate(state), weights, "dense")), weights, "norm")
        scores = log_softmax(words @ hidden)
        place = candidates.index(batch["mlm_labels"][row, position].item())
        losses.append(-scores[place])
        correct.append(scores.argmax() == place)
    return np.mean(losses), np.mean(correct)


MLM = ["mlm", "text_mlm"]


@pytest.mark.parametrize("name", MLM)
def test_mlm_is_the_cross_entropy_of_masked_tokens(name):
    model, batch = build(objectives={name: 1.0}), make_batch()
    output = model(**batch)
    everything = list(range(model.get_input_embeddings().num_embeddings))
    loss, accuracy = mlm_reference(model, batch, everything, name)
    assert output[f"{name}_loss"].item() == pytest.approx(loss, abs=1e-5)
    assert output.loss.item() == pytest.approx(loss, abs=1e-5)
    assert output.metrics[f"{name}_accuracy"].item() == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("name", MLM)
def test_mlm_over_some_tokens_is_the_cross_entropy_over_them_and_those_of_the_batch(name):
    model, batch = build(objectives={name: 1.0}), make_batch()
    masked = batch["mlm_labels"][batch["mlm_labels"] != -100]
    # Of the tokens that the batch masks, one is not among those that were set.
    known = torch.cat([masked, torch.tensor([0, 3, 7])]).unique()
    model.set_mlm_tokens(known[known != masked[0]])
    output = model(**batch)
    loss, accuracy = mlm_reference(model, batch, known.tolist(), name)
    assert output[f"{name}_loss"].item() == pytest.approx(loss, abs=1e-5)
    assert output.metrics[f"{name}_accuracy"].item() == pytest.approx(accuracy, abs=1e-6)

    whole = build(objectives={name: 1.0})
    whole.set_mlm_tokens(torch.arange(whole.get_input_embeddings().num_embeddings))
    assert whole(**batch).loss.item() == pytest.approx(build(objectives={name: 1.0})(**batch).loss.item())


def test_mlm_of_the_text_alone_learns_nothing_of_the_table():
    model, batch = build(objectives={"text_mlm": 1.0}), make_batch()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    of_text = {name for name in gradients if name.startswith(("flip.text_model.", "objectives."))}
    for name, gradient in gradients.items():
        assert gradient is not None, f"distributed training waits for {name}"
        # A shift of all keys shifts all of a softmax's scores alike.
        if not name.endswith("key.bias"):
            assert bool(gradient.any()) == (name in of_text), name
    other = {**batch, "feature_ids": batch["feature_ids"].flip(0)}
    assert torch.equal(model(**other).text_mlm_loss, output.text_mlm_loss)
    assert set(build().objectives) == {"mlm", "mtm", "icl"}, "it is no part of FLIP"


def mtm_reference(model, batch, counts, loss, negatives, draws):
    """Mean loss and accuracy; `draws` are the uniform numbers (masked, k) from which negatives are made."""
    seen, weights = views(model, batch), arrays(model.objectives["mtm"])
    table = model.flip.feature_embeddings.weight.detach().double().numpy()
    counts = np.where(np.arange(len(counts)) < 2, 0, np.maximum(counts, 1))
    k = draws.shape[1]
    losses, correct = [], []
    for place, (row, field) in enumerate(zip(*np.nonzero(batch["mtm_labels"].numpy() != -100), strict=True)):
        tabular = seen["masked_tabular"][row]
        states = seen["states"][row][batch["attention_mask"][row].numpy() == 1]
        query, keys = linear(tabular, weights, "summary.query"), linear(states, weights, "summary.key")
        attention = np.exp(log_softmax(keys @ query / np.sqrt(len(query))))
        summary = attention @ linear(states, weights, "summary.value")
        hidden = layer_norm(gelu(linear(np.concatenate([tabular, summary]), weights, "transform")), weights, "norm")
        predicted = linear(hidden, weights, "field_projection").reshape(len(SIZES), -1)[field]
        scores = table @ predicted + weights["bias"]

        low, high = (BOUNDS[field], BOUNDS[field + 1]) if negatives == "field" else (2, BOUNDS[-1])
        q = counts[low:high] / counts[low:high].sum()
        target = batch["mtm_labels"][row, field].item()
        if loss == "full_softmax" or high - low <= k:
            exact = log_softmax(scores[low:high] + np.log(q))
            losses.append(-exact[target - low])
            correct.append(exact.argmax() == target - low)
            continue
        cumulative = np.cumsum(counts[low:high])
        sampled = [low + int(np.argmax(cumulative > int(u * cumulative[-1]))) for u in draws[place]]
        if loss == "nce":
            losses.append(softplus(np.log(k) - scores[target]) + sum(softplus(scores[n] - np.log(k)) for n in sampled))
        else:
            others = [scores[n] for n in sampled if n != target]
            losses.append(-log_softmax([scores[target], *others])[0])
        correct.append(all(scores[target] >= scores[n] for n in sampled if n != target))
    return np.mean(losses), np.mean(correct)


@pytest.mark.parametrize("negatives", ["field", "global"])
@pytest.mark.parametrize("loss", ["nce", "sampled_softmax", "full_softmax"])
def test_mtm_is_its_equation(loss, negatives):
    model = build(objectives={"mtm": 1.0}, mtm_loss=loss, mtm_negatives=negatives)
    counts = np.random.RandomState(0).zipf(1.5, BOUNDS[-1]).clip(max=200) - 1
    assert (counts == 0).any(), "a feature never seen counts as seen once"
    model.set_feature_counts(torch.from_numpy(counts))
    for seed in range(3):
        batch = make_batch(seed)
        num_masked = int((batch["mtm_labels"] != -100).sum())
        torch.manual_seed(seed)
        draws = torch.rand(num_masked, 7, dtype=torch.float64).numpy()
        torch.manual_seed(seed)
        output = model(**batch)
        expected, accuracy = mtm_reference(model, batch, counts, loss, negatives, draws)
        assert output.mtm_loss.item() == pytest.approx(expected, abs=1e-5)
        assert output.metrics["mtm_accuracy"].item() == pytest.approx(accuracy, abs=1e-6)


def test_negatives_follow_the_unigram_distribution_of_the_field(monkeypatch):
    model = build(objectives={"mtm": 1.0}, mtm_loss="sampled_softmax", mtm_num_negatives=20)
    counts = torch.arange(int(BOUNDS[-1])) % 13 + 1
    model.set_feature_counts(counts)
    head = model.objectives["mtm"]
    seen = []
    real = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *a, **k: seen.append(real(*a, **k) - 1) or seen[-1] + 1)
    fields = torch.full((3000,), 2)
    targets = torch.full((3000,), int(BOUNDS[2]))
    head._sampled(torch.zeros(3000, 8), targets, fields, model.flip.feature_embeddings.embed)
    drawn = np.bincount(seen[0].ravel().numpy(), minlength=BOUNDS[-1])
    own = slice(BOUNDS[2], BOUNDS[3])
    assert drawn[own].sum() == drawn.sum() == 60_000, "negatives stay inside the field"
    q = counts[own].numpy() / counts[own].sum().item()
    assert stats.chisquare(drawn[own], q * 60_000).pvalue > 1e-4


@pytest.mark.parametrize(("duplicate", "temperature"), [(True, 0.1), (False, 0.1), (True, 0.7)])
def test_icl_is_symmetric_infonce_over_cosines(duplicate, temperature):
    model = build(objectives={"icl": 1.0}, contrastive_temperature=temperature)
    batch = make_batch(duplicate=duplicate)
    output = model(**batch)
    seen, weights = views(model, batch), arrays(model.objectives["icl"])
    tabular = linear(seen["tabular"], weights, "tabular_projection")
    text = linear(seen["text"], weights, "text_projection")
    tabular, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (tabular, text))
    similarity = tabular @ text.T / temperature
    ids = batch["feature_ids"].numpy()
    losses, to_text, to_tabular = [], [], []
    for i in range(NUM_ROWS):
        others = [j for j in range(NUM_ROWS) if j == i or not (ids[i] == ids[j]).all()]
        place = others.index(i)
        forward, backward = similarity[i, others], similarity[others, i]
        losses.append(-0.5 * (log_softmax(forward)[place] + log_softmax(backward)[place]))
        to_text.append(forward.argmax() == place)
        to_tabular.append(backward.argmax() == place)
    assert output.icl_loss.item() == pytest.approx(np.mean(losses), abs=1e-5)
    assert output.metrics["icl_tabular_to_text_accuracy"].item() == pytest.approx(np.mean(to_text), abs=1e-6)
    assert output.metrics["icl_text_to_tabular_accuracy"].item() == pytest.approx(np.mean(to_tabular), abs=1e-6)


def projected(icl, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = icl.tabular_projection.in_features, icl.text_projection.in_features
    return [torch.randn(rows, size, generator=generator).requires_grad_() for size in sizes]


def absent_but(**given):
    names = ["mtm_labels", "mlm_labels", "tabular", "masked_tabular", "text", "token_states", "masked_token_states"]
    empty = torch.empty(0)
    unread = {**dict.fromkeys(names), "attention_mask": empty, "token_embeddings": empty, "embed_features": None}
    return PretrainingBatch(**{**unread, **given})


def test_shares_of_a_larger_contrastive_batch_add_up_to_it():
    """Three parts of one batch: the losses add up, and gradients are those of contrasting all rows at once."""
    icl = build(objectives={"icl": 1.0}, contrastive_temperature=0.5).objectives["icl"]
    sizes = [4, 1, 3]
    ids = torch.randint(2, 5, (8, 3), generator=torch.Generator().manual_seed(1))
    ids[6] = ids[0]  # in another part, and yet no negative
    views = projected(icl, 8, seed=2)
    whole = icl(absent_but(feature_ids=ids, tabular=views[0], text=views[1]))
    parameters = list(icl.parameters())
    expected = torch.autograd.grad(whole.loss_sum, [*views, *parameters])
    assert whole.num_items.item() == 8

    parts = [[part.detach() for part in view.split(sizes)] for view in views]
    with torch.no_grad():
        seen = [icl.project(tabular, text) for tabular, text in zip(*parts, strict=True)]
    shares = icl.shares(seen, ids.split(sizes))
    assert len(shares) == 3
    torch.testing.assert_close(sum(share.loss_sum for share in shares), whole.loss_sum.detach())
    found = [torch.zeros_like(g) for g in expected]
    for i, (part_ids, share) in enumerate(zip(ids.split(sizes), shares, strict=True)):
        tabular, text = (part[i].requires_grad_() for part in parts)
        with icl.contrasted_as(share):
            output = icl(absent_but(feature_ids=part_ids, tabular=tabular, text=text))
        torch.testing.assert_close(output.loss_sum.detach(), whole.loss_sum.detach() * sizes[i] / 8)
        assert output.num_items.item() == sizes[i]
        assert output.metrics.keys() == whole.metrics.keys()
        for name, value in output.metrics.items():
            assert value.item() == whole.metrics[name].item(), "of the larger batch"
        gradients = torch.autograd.grad(output.loss_sum, [tabular, text, *parameters])
        rows = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
        found[0][rows], found[1][rows] = gradients[:2]
        for total, gradient in zip(found[2:], gradients[2:], strict=True):
            total += gradient
        assert not share.loss_sum.requires_grad
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-6)
    alone = icl(absent_but(feature_ids=ids, tabular=views[0], text=views[1]))
    assert torch.equal(alone.loss_sum, whole.loss_sum), "a share counts only in its context"


@pytest.mark.parametrize(("values", "mean"), [([], 0.0), ([2.0], 2.0), ([True, False, False, True], 0.5)], ids=str)
def test_a_metric_is_a_mean_over_items_without_a_gradient(values, mean):
    values = torch.tensor(values)
    found = mean_over_items(values.requires_grad_() if values.is_floating_point() else values)
    assert found.item() == mean
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projected_views_are_unit_vectors_in_single_precision(dtype):
    icl = build(objectives={"icl": 1.0}).objectives["icl"].to(dtype)
    for view in icl.project(*(view.to(dtype) for view in projected(icl, 5, seed=0))):
        assert view.dtype == torch.float32
        torch.testing.assert_close(view.norm(dim=1), torch.ones(5))


def test_similarities_are_computed_in_single_precision_under_autocast():
    icl = build(objectives={"icl": 1.0}, contrastive_temperature=0.01).objectives["icl"]
    ids = torch.arange(2, 26).reshape(8, 3)
    views = icl.project(*projected(icl, 8, seed=3))
    expected = icl.contrast(*views, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = icl.contrast(*views, ids)
    assert torch.equal(found.loss_sum, expected.loss_sum)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_says_what_its_loss_is_summed_over(name):
    """The loss of the model is the sum divided by it, and `num_items` knows it before any encoding."""
    model, batch = build(objectives={name: 1.0}), make_batch()
    outputs = []
    objective = model.objectives[name]
    objective.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    loss = model(**batch).loss
    labels = {"mlm": "mlm_labels", "text_mlm": "mlm_labels", "mtm": "mtm_labels", "icl": None}[name]
    expected = NUM_ROWS if labels is None else (batch[labels] != -100).sum().item()
    (output,) = outputs
    assert output.num_items.item() == expected
    assert not output.num_items.is_floating_point()
    assert loss.item() == pytest.approx(output.loss_sum.item() / expected)
    assert all(not value.requires_grad and value.ndim == 0 for value in output.metrics.values())
    number = type(objective).num_items(batch["feature_ids"], None if labels is None else batch[labels])
    assert number.item() == expected


@pytest.mark.parametrize("loss", ["nce", "sampled_softmax", "full_softmax"])
@pytest.mark.parametrize("negatives", ["field", "global"])
def test_a_table_that_grew_scores_as_one_that_was_built_so(loss, negatives):
    """New features stand behind all others in the table, but beside those of their field in the distribution."""
    settings = {"objectives": {"mtm": 1.0}, "mtm_loss": loss, "mtm_negatives": negatives}
    larger = [replace(field, added_features=(n,)) for field, n in zip(FIELDS, (4, 0, 3), strict=True)]
    model, built = build(**settings), build(**settings, fields=larger)
    counts = torch.arange(int(BOUNDS[-1]) + 7) % 11
    built.set_feature_counts(counts)
    model.set_feature_counts(counts[:-7])
    mtm = model.objectives["mtm"]
    with torch.no_grad():
        mtm.bias.copy_(torch.randn(len(mtm.bias), generator=torch.Generator().manual_seed(4)))
    before = mtm.bias.detach().clone()
    mtm.grow(built.config, counts)
    assert isinstance(mtm.bias, torch.nn.Parameter)
    assert torch.equal(mtm.bias.detach(), torch.cat([before, torch.zeros(7)]))
    reference = built.objectives["mtm"]
    reference.load_state_dict(mtm.state_dict())
    for name, value in reference.named_buffers():
        assert torch.equal(mtm.get_buffer(name), value), name
    assert mtm.field_slots == reference.field_slots == [(2, 36), (36, 41), (41, 104)]
    # The slots of the first field hold its 30 old features, then its 4 new ones at the table's end.
    assert mtm.slot_features[2:36].tolist() == [*range(2, 32), *range(97, 101)]
    assert torch.equal(mtm.slot_features[mtm.feature_slots], torch.arange(104))
    table = torch.randn(104, 8, generator=torch.Generator().manual_seed(5))
    predicted = torch.randn(6, 8, generator=torch.Generator().manual_seed(6))
    fields, targets = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([3, 99, 33, 38, 96, 103])
    score = mtm._full if loss == "full_softmax" else mtm._sampled
    torch.manual_seed(0)
    losses, correct = score(predicted, targets, fields, lambda ids: table[ids])
    torch.manual_seed(0)
    expected, right = (reference._full if loss == "full_softmax" else reference._sampled)(
        predicted, targets, fields, lambda ids: table[ids]
    )
    assert torch.equal(losses, expected)
    assert torch.equal(correct, right)
    if loss == "full_softmax":
        scores = predicted @ table.T + mtm.bias
        owned = [[*range(2, 32), *range(97, 101)], list(range(32, 37)), [*range(37, 97), *range(101, 104)]]
        for i, (field, target) in enumerate(zip(fields.tolist(), targets.tolist(), strict=True)):
            candidates = owned[field] if negatives == "field" else list(range(2, 104))
            q = counts[candidates].clamp(min=1).double()
            logits = scores[i, candidates].double() + (q / q.sum()).log()
            place = torch.tensor(candidates.index(target))
            assert losses[i].item() == pytest.approx(cross_entropy(logits, place).item(), abs=1e-4)
            assert correct[i].item() == (logits.argmax() == place).item()


def test_a_new_model_counts_every_feature_once():
    mtm = FlipForPreTraining(build(objectives={"mtm": 1.0}).config).objectives["mtm"]
    assert mtm.cumulative_counts.tolist() == [0, 0, 0, *range(1, int(BOUNDS[-1]) - 1)]
    assert not mtm.bias.any()
    assert {name for name in mtm.state_dict() if "." not in name} == {"bias", "cumulative_counts"}
    counts = torch.zeros(int(BOUNDS[-1]), dtype=torch.int32)
    counts[:2], counts[5] = 50, 9
    mtm.set_feature_counts(counts)
    frequency = mtm.cumulative_counts.diff()
    assert frequency.dtype == torch.int64
    assert frequency[:2].tolist() == [0, 0], "padding and mask are drawn by nobody"
    assert frequency[5] == 9
    assert frequency.sum() == 9 + int(BOUNDS[-1]) - 3


def test_a_summary_does_not_read_padding():
    mtm = build(objectives={"mtm": 1.0}).objectives["mtm"]
    generator = torch.Generator().manual_seed(0)
    tabular = torch.randn(3, mtm.summary.query.in_features, generator=generator)
    states = torch.randn(3, 5, 24, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    found = mtm.summary(tabular, states, mask)
    assert found.shape == (3, 12)
    other = torch.where(mask.bool().unsqueeze(2), states, torch.full_like(states, 9.0))
    torch.testing.assert_close(mtm.summary(tabular, other, mask), found)
    # One token is all there is to read.
    torch.testing.assert_close(found[2], mtm.summary.value(states[2, 0]))


@pytest.mark.parametrize("loss", ["nce", "full_softmax"])
def test_features_are_scored_in_single_precision_under_autocast(loss, monkeypatch):
    model, batch = build(objectives={"mtm": 1.0}, mtm_loss=loss), make_batch()
    mtm, seen = model.objectives["mtm"], []
    name = "_full" if loss == "full_softmax" else "_sampled"
    real = getattr(mtm, name)

    def noting(predicted, *rest):
        seen.append((predicted.dtype, torch.is_autocast_enabled("cpu")))
        return real(predicted, *rest)

    monkeypatch.setattr(mtm, name, noting)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert seen == [(torch.float32, False)]


@pytest.mark.parametrize("num_negatives", [5, 7])
@pytest.mark.parametrize("loss", ["nce", "sampled_softmax"])
def test_a_small_field_at_the_end_of_the_table_is_scored_exactly(loss, num_negatives):
    fields = [FieldConfig("large", num_features=20), FieldConfig("small", num_features=5)]
    settings = {"objectives": {"mtm": 1.0}, "mtm_loss": loss, "mtm_num_negatives": num_negatives}
    mtm = build(fields=fields, **settings).objectives["mtm"]
    mtm.set_feature_counts(torch.arange(27))
    table, predicted = torch.randn(27, 8), torch.randn(5, 8)
    targets, places = torch.arange(22, 27), torch.ones(5, dtype=torch.int64)
    found, expected = (score(predicted, targets, places, lambda ids: table[ids]) for score in (mtm._sampled, mtm._full))
    torch.testing.assert_close(found, expected)
    assert found[0].shape == found[1].shape == (5,)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("loss", ["nce", "full_softmax"])
def test_tensors_are_made_on_the_device_of_the_batch(name, loss):
    """What is made without saying where is made on a device that holds no values."""
    model, batch = build(objectives={name: 1.0}, mtm_loss=loss), make_batch()
    model.set_mlm_tokens(torch.arange(5, 20))
    objective, given = model.objectives[name], []
    objective.register_forward_pre_hook(lambda module, arguments: given.extend(arguments))
    torch.manual_seed(0)
    expected = model(**batch)
    torch.manual_seed(0)
    with torch.device("meta"):
        found = objective(*given)
        number = objective.num_items(batch["feature_ids"], None)
    assert found.loss_sum.device.type == number.device.type == "cpu"
    assert found.loss_sum.item() / found.num_items.item() == pytest.approx(expected.loss.item())


def count_warnings(caplog, model):
    caplog.clear()
    for _ in range(2):
        model(**make_batch())
    return len([record for record in caplog.records if "without feature counts" in record.message])


@pytest.mark.parametrize("loss", ["nce", "full_softmax"])
def test_training_without_feature_counts_is_warned_of_once(loss, caplog, tmp_path):
    model = build(mtm_loss=loss)
    assert count_warnings(caplog, model) == 0, "nothing is trained"
    assert count_warnings(caplog, model.train()) == 1
    assert count_warnings(caplog, model) == 0
    model.save_pretrained(tmp_path / "without")
    assert count_warnings(caplog, FlipForPreTraining.from_pretrained(tmp_path / "without").train()) == 1


def test_training_with_feature_counts_is_not_warned_of(caplog, tmp_path):
    counts = torch.arange(int(BOUNDS[-1]))
    model = build().train()
    model.set_feature_counts(counts)
    assert count_warnings(caplog, model) == 0
    model.save_pretrained(tmp_path / "with")
    assert count_warnings(caplog, FlipForPreTraining.from_pretrained(tmp_path / "with").train()) == 0
    model = build().train()
    model.set_feature_counts(torch.ones_like(counts))
    assert count_warnings(caplog, model) == 0, "each feature was seen once"
    assert count_warnings(caplog, build(objectives={"mlm": 1.0, "icl": 1.0}).train()) == 0, "nothing is sampled"


def test_what_is_set_goes_where_the_model_is():
    model = build().to("meta")
    model.set_mlm_tokens(torch.arange(3))
    assert model.objectives["mlm"].tokens.device.type == "meta"
    model.set_feature_counts(torch.ones(int(BOUNDS[-1]), dtype=torch.int64))
    assert model.objectives["mtm"].cumulative_counts.device.type == "meta"


def test_the_total_is_the_weighted_sum():
    model, batch = build(objectives={"mlm": 0.5, "mtm": 2.0, "icl": 3.0}, mtm_loss="full_softmax"), make_batch()
    output = model(**batch)
    expected = 0.5 * output.mlm_loss + 2 * output.mtm_loss + 3 * output.icl_loss
    torch.testing.assert_close(output.loss, expected)
    rows = model.flip.feature_embeddings(batch["feature_ids"])
    torch.testing.assert_close(output.feature_penalty, rows.square().sum() / NUM_ROWS)


def test_the_penalty_reaches_the_rows_that_a_batch_reads_and_no_others():
    model, batch = build(FlipForCTR, mode="id"), make_batch()
    output = model(feature_ids=batch["feature_ids"])
    output.feature_penalty.backward()
    table = model.flip.feature_embeddings.weight
    read = torch.bincount(batch["feature_ids"].flatten(), minlength=len(table)).unsqueeze(1)
    torch.testing.assert_close(table.grad, 2 * table.detach() * read / NUM_ROWS)


def test_items_weigh_the_same_however_they_are_batched():
    model, batch = build(objectives={"mlm": 1.0, "mtm": 1.0}, mtm_loss="full_softmax"), make_batch()
    whole = model(**batch)
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    totals = model.num_items(batch)
    assert totals["mlm"] == (batch["mlm_labels"] != -100).sum()
    assert totals["mtm"] == (batch["mtm_labels"] != -100).sum()
    losses = []
    for part in (slice(0, 2), slice(2, NUM_ROWS)):
        output = model(**{name: value[part] for name, value in batch.items()}, num_items_in_batch=totals)
        output.loss.backward()
        losses.append(output.loss.item())
    assert sum(losses) == pytest.approx(whole.loss.item(), abs=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_nothing_masked_is_no_loss():
    model, batch = build(), make_batch()
    batch["mlm_labels"], batch["mtm_labels"] = (torch.full_like(batch[n], -100) for n in ("mlm_labels", "mtm_labels"))
    output = model(**batch)
    output.loss.backward()
    assert output.mlm_loss.item() == output.mtm_loss.item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("loss", ["nce", "sampled_softmax", "full_softmax"])
def test_every_parameter_has_a_gradient(backbone, loss):
    model = build(backbone=backbone, mtm_loss=loss)
    model(**make_batch()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_declared_views_are_encoded(name, monkeypatch):
    model, batch = build(objectives={name: 1.0}), make_batch()
    encoded = []
    for tower, known in (
        ("encode_text", {"input_ids": "text", "masked_input_ids": "masked_text"}),
        ("encode_tabular", {"feature_ids": "tabular", "masked_feature_ids": "masked_tabular"}),
    ):
        real = getattr(model.flip, tower)

        def spy(ids, *args, real=real, known=known):
            encoded.extend(view for key, view in known.items() if ids is batch[key])
            return real(ids, *args)

        monkeypatch.setattr(model.flip, tower, spy)
    model(**batch)
    assert sorted(encoded) == sorted(OBJECTIVES[name].views | {"tabular"})
    needed = OBJECTIVES[name].labels
    if needed:
        with pytest.raises(ValueError, match=f"{needed}.*FlipPretrainingCollator makes them"):
            model(**{key: value for key, value in batch.items() if key != needed})


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match=r"FlipConfig has no setting 'objectives.mtn' \(did you mean 'objectives.mtm'"):
        build(objectives={"mtn": 1.0})


def test_a_configuration_knows_the_names_of_the_objectives():
    assert tuple(OBJECTIVES) == PRETRAINING_OBJECTIVES


def test_counts_of_another_table_are_refused():
    with pytest.raises(ValueError, match=r"shape \(97,\), got \(5,\)"):
        build().set_feature_counts(torch.ones(5, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_finetuning_loss_is_three_cross_entropies(dtype):
    model = build(FlipForCTR)
    with torch.no_grad():
        model.fusion.id_weight.fill_(0.7)
    batch = {name: make_batch()[name] for name in ("feature_ids", "input_ids", "attention_mask")}
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1])
    output = model(**batch, labels=labels.to(dtype))
    id_logits, text_logits = (output[name].detach().double().numpy() for name in ("id_logits", "text_logits"))
    head = arrays(model.text_head)
    pooled = model.flip.encode_text(batch["input_ids"], batch["attention_mask"]).text_representation
    np.testing.assert_allclose(linear(pooled.detach().double().numpy(), head, "1")[:, 0], text_logits, atol=1e-5)
    logits = 0.7 * id_logits + 0.3 * text_logits
    np.testing.assert_allclose(output.logits.detach().numpy(), logits, atol=1e-5)

    def click_entropy(z):
        y = labels.numpy()
        return np.mean(y * softplus(-z) + (1 - y) * softplus(z))

    parts = [click_entropy(z) for z in (logits, id_logits, text_logits)]
    assert output.loss.item() == pytest.approx(sum(parts), abs=1e-5)
    assert output.id_loss.item() == pytest.approx(parts[1], abs=1e-5)
    assert output.text_loss.item() == pytest.approx(parts[2], abs=1e-5)
    halved = model(**batch, labels=labels.to(dtype), num_items_in_batch={"ctr": torch.tensor(18.0)})
    assert halved.loss.item() == pytest.approx(sum(parts) / 2, abs=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_every_parameter_learns_from_clicks(mode, backbone):
    model = build(FlipForCTR, mode=mode, backbone=backbone)
    batch = {name: make_batch()[name] for name in ("feature_ids", "input_ids", "attention_mask")}
    output = model(**batch, labels=torch.ones(NUM_ROWS))
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, torch.ones(NUM_ROWS))
    if mode != "joint":
        torch.testing.assert_close(output.loss, expected)
