"""Fusion that is fitted to rows of its own."""

import datasets
import numpy as np
import pytest
import torch

from flip_hf import FlipForCTR, FlipProcessor
from flip_hf.metrics.logloss import logloss
from flip_hf.scoring import probabilities
from flip_hf.training import fusion
from flip_hf.training.fusion import fit_fusion


def model_rows_and_scores(ctr_folder, click_rows, kind):
    """A model, rows of which every other one has a new user, and scores whose ID-based model then knows nothing."""
    processor = FlipProcessor.from_pretrained(ctr_folder)
    model = FlipForCTR.from_pretrained(ctr_folder, fusion=kind)
    number = len(click_rows["label"])
    is_new = np.arange(number) % 2 == 0
    rows = {**click_rows, "user_id": [10_000 if new else 7 for new in is_new]}
    encoded = datasets.Dataset(processor.encode(rows, with_label=True))
    random = np.random.default_rng(0)
    truth = random.normal(size=number) * 2
    scores = {
        "labels": (random.random(number) < probabilities(truth)).astype(np.float32),
        "id_logits": np.where(is_new, random.normal(size=number) * 2, truth).astype(np.float32),
        "text_logits": (truth + random.normal(size=number)).astype(np.float32),
    }
    return model, encoded, scores


def test_the_weight_is_the_most_probable_one(ctr_folder, click_rows):
    model, rows, scores = model_rows_and_scores(ctr_folder, click_rows, "learned_weight")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = fit_fusion(model, scores, rows)
    weights = np.linspace(-1, 2, 3001)
    losses = []
    for weight in weights:
        clicks = probabilities(weight * scores["id_logits"] + (1 - weight) * scores["text_logits"])
        losses.append(len(clicks) * logloss(scores["labels"], clicks) + 0.5 * (weight - 0.5) ** 2)
    best = weights[np.argmin(losses)]
    assert 0.05 < best < 0.95
    assert model.fusion.id_weight.item() == pytest.approx(best, abs=2e-3)
    expected = best * scores["id_logits"] + (1 - best) * scores["text_logits"]
    np.testing.assert_allclose(fitted["logits"], expected, atol=0.02)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fusion.id_weight"}


def test_rows_are_read_in_parts(ctr_folder, click_rows, monkeypatch):
    model, rows, scores = model_rows_and_scores(ctr_folder, click_rows, "gated")
    at_once = fit_fusion(model, scores, rows)["logits"]
    monkeypatch.setattr(fusion, "_ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(fit_fusion(model, scores, rows)["logits"], at_once)
    served = model.fusion(
        *(torch.from_numpy(scores[name]) for name in ("id_logits", "text_logits")),
        model.base_model.oov_fractions(torch.tensor(rows["feature_ids"][:])),
    )
    np.testing.assert_allclose(served.detach(), at_once, atol=1e-5)


def test_a_gate_hands_rows_of_new_users_to_the_text(ctr_folder, click_rows):
    weighed, rows, scores = model_rows_and_scores(ctr_folder, click_rows, "learned_weight")
    gated, *_ = model_rows_and_scores(ctr_folder, click_rows, "gated")
    fused = [fit_fusion(model, scores, rows)["logits"] for model in (weighed, gated)]
    losses = [logloss(scores["labels"], probabilities(logits)) for logits in fused]
    assert losses[1] < losses[0] - 0.01
    shares = gated.base_model.oov_fractions(torch.tensor(rows["feature_ids"][:2]))
    gate = torch.sigmoid(shares @ gated.fusion.oov_weights + gated.fusion.bias)
    assert gate[0] < 0.4 < 0.6 < gate[1]


@pytest.mark.parametrize("fusion", ["learned_weight", "gated"])
def test_fitting_again_changes_nothing(ctr_folder, click_rows, fusion):
    model, rows, scores = model_rows_and_scores(ctr_folder, click_rows, fusion)
    first = fit_fusion(model, scores, rows)["logits"]
    np.testing.assert_array_equal(fit_fusion(model, scores, rows)["logits"], first)


def test_a_fusion_needs_two_towers_and_labels(ctr_folder, click_rows):
    model, rows, scores = model_rows_and_scores(ctr_folder, click_rows, "gated")
    for name in ("text_logits", "labels"):
        with pytest.raises(ValueError, match=f"the scores have no {name}: fitting a fusion needs both"):
            fit_fusion(model, {k: v for k, v in scores.items() if k != name}, rows)
