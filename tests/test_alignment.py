"""`alignment.py`: how alike the views of fields are."""

import numpy as np
import pytest
import torch
from alignment import field_alignment, linear_cka
from test_models import make_config

from flip_hf import FlipConfig, FlipForPreTraining


def hsic(first, second):
    """By its definition over the rows' kernels."""
    n = len(first)
    centring = np.eye(n) - 1 / n
    return np.trace(first @ first.T @ centring @ second @ second.T @ centring)


def test_cka_is_that_of_its_kernels():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(40, 5)), random.normal(size=(40, 7)) + 3
    second[:, :2] += first[:, :2]
    expected = hsic(first, second) / np.sqrt(hsic(first, first) * hsic(second, second))
    assert linear_cka(first, second) == pytest.approx(expected)
    assert linear_cka(second, first) == pytest.approx(expected)


def test_cka_sees_neither_directions_nor_scales():
    random = np.random.default_rng(1)
    values = random.normal(size=(60, 4))
    turned = 7 * values @ np.linalg.qr(random.normal(size=(4, 4)))[0] - 2
    assert linear_cka(values, turned) == pytest.approx(1)
    assert linear_cka(random.normal(size=(5000, 4)), random.normal(size=(5000, 4))) < 0.01
    assert np.isnan(linear_cka(values, np.ones((60, 3))))


def test_fields_whose_tokens_follow_their_features_are_aligned(processor, click_rows):
    encoded = processor.encode({name: values * 3 for name, values in click_rows.items()}, with_label=True)
    torch.manual_seed(0)
    config = FlipConfig(text_config=make_config().text_config, fields=processor.fields)
    config.text_config.vocab_size = len(processor.tokenizer)
    config.text_config.max_position_embeddings = 512
    model = FlipForPreTraining(config)
    found = field_alignment(model, processor, encoded)
    num_fields = len(processor.fields)
    assert found.shape == (num_fields, num_fields)
    known = found[np.isfinite(found)]
    assert ((known >= 0) & (known <= 1 + 1e-9)).all()
    # Batches are put together in the rows' order.
    longer = processor.encode({name: values * 100 for name, values in click_rows.items()}, with_label=True)
    np.testing.assert_allclose(field_alignment(model, processor, longer), found, atol=1e-4)
