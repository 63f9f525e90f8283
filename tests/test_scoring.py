"""Rows to logits and probabilities: in the rows' order, whatever the batches, and a budget of texts spent by logits."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score

from flip_hf import FlipCTRCollator, FlipForCTR, FlipProcessor
from flip_hf.data.fallbacks import count_fallbacks
from flip_hf.outputs import FlipForCTROutput
from flip_hf.scoring import ClickScorer, click_logits, least_sure, probabilities
from flip_hf.training.evaluation import evaluate_ctr


@pytest.fixture(scope="module")
def processor(ctr_folder):
    return FlipProcessor.from_pretrained(ctr_folder)


@pytest.fixture(scope="module")
def models(ctr_folder):
    return {mode: FlipForCTR.from_pretrained(ctr_folder, mode=mode) for mode in ("joint", "id", "text")}


@pytest.fixture(scope="module")
def table(processor, click_rows):
    return processor.select_columns(click_rows).slice(0, 61)


@torch.no_grad()
def one_by_one(model, processor, table):
    outputs = [model(**processor(table.slice(i, 1), return_tensors="pt")) for i in range(len(table))]
    names = [name for name in ("logits", "id_logits", "text_logits") if name in outputs[0]]
    return {name: torch.cat([output[name] for output in outputs]).numpy() for name in names}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("mode", ["joint", "id", "text"])
def test_logits_are_in_the_rows_order_whatever_the_batches(models, processor, table, click_rows, mode):
    model, collator = models[mode], FlipCTRCollator(processor, mode)
    expected = one_by_one(model, processor, table)
    assert len({len(ids) for ids in processor.encode(table)["input_ids"].to_pylist()}) > 3, "texts differ in length"
    labels = np.array(click_rows["label"][: len(table)], np.float32)
    for rows in (processor.encode(table), processor.encode_dataset(click_rows).select(range(len(table)))):
        for accelerator in (None, Accelerator(cpu=True)):
            for batch_size in (7, 100):
                model.train()
                found = click_logits(model, rows, collator, batch_size, accelerator)
                if "label" in rows.column_names:
                    np.testing.assert_array_equal(found.pop("labels"), labels)
                assert_close(found, expected)
                assert not model.training
    assert_close(ClickScorer(model, processor, collator)(table, 7), expected)


def test_groups_are_in_the_rows_order(models, processor, click_rows):
    encoded = processor.encode(click_rows, with_label=True, group_field="user_id")
    for rows in (encoded, processor.encode_dataset(click_rows, group_field="user_id")):
        found = click_logits(models["joint"], rows, FlipCTRCollator(processor), 9)
        assert found["groups"].tolist() == encoded["group"].to_pylist()
    users, clicks = np.array(click_rows["user_id"]), probabilities(found["logits"])
    expected = [
        (np.sum(users == user), roc_auc_score(found["labels"][users == user], clicks[users == user]))
        for user in set(users.tolist())
        if len(set(found["labels"][users == user].tolist())) == 2
    ]
    metrics = evaluate_ctr(models["joint"], rows, FlipCTRCollator(processor), 9, Accelerator(cpu=True), "")
    assert metrics["gauc"] == pytest.approx(np.average([a for _, a in expected], weights=[n for n, _ in expected]))
    assert metrics["uauc"] == pytest.approx(np.mean([a for _, a in expected]))
    assert {"id_gauc", "text_uauc"} <= set(metrics)


def test_a_scorer_with_an_accelerator_reads_the_texts_of_a_share(models, processor, table):
    expected, collator = one_by_one(models["joint"], processor, table), FlipCTRCollator(processor)
    chosen = np.argsort(np.abs(expected["id_logits"]))[: math.ceil(0.3 * len(table))]
    is_read = np.isin(np.arange(len(table)), chosen)
    for accelerator in (None, Accelerator(cpu=True)):
        scorer = ClickScorer(models["joint"], processor, collator, accelerator)
        found = scorer(table, 7, text_budget=0.3)
        assert (np.ma.getmaskarray(found["text_logits"]) == ~is_read).all()
        np.testing.assert_allclose(found["text_logits"][is_read], expected["text_logits"][is_read], atol=1e-5)
        np.testing.assert_allclose(found["id_logits"], expected["id_logits"], atol=1e-5)
        whole = np.where(is_read, expected["logits"], expected["id_logits"])
        np.testing.assert_allclose(found["logits"], whole, atol=1e-5)
        assert scorer.report.num_rows == len(table)
        assert scorer.report.counts == count_fallbacks(processor.encode(table, with_text=False), processor.fields)


def test_rows_whose_probabilities_are_all_1_are_told_apart(models, processor, table):
    """By their probabilities all of these rows look alike, and the first ones would be taken."""
    random = np.random.RandomState(0)
    made = (40 + 60 * random.rand(len(table))).astype(np.float32)
    assert set(probabilities(made).tolist()) == {1.0}
    numbers = np.stack(processor.encode(table)["feature_ids"].to_numpy())
    # Each row's logit by its ids, which batches hold in another order.
    by_ids = {tuple(ids): logit for ids, logit in zip(numbers.tolist(), made.tolist(), strict=True)}
    logits = np.array([by_ids[tuple(ids)] for ids in numbers.tolist()], np.float32)

    def forward(batch):
        ids = [by_ids[tuple(row)] for row in batch["feature_ids"].tolist()]
        if "input_ids" in batch:
            return FlipForCTROutput(logits=torch.zeros(len(ids)), text_logits=torch.zeros(len(ids)))
        return FlipForCTROutput(logits=torch.tensor(ids), id_logits=torch.tensor(ids))

    scorer = ClickScorer(models["joint"], processor, FlipCTRCollator(processor), forward=forward)
    found = scorer(table, 16, text_budget=0.25)
    wanted = np.sort(np.argsort(np.abs(logits), kind="stable")[: math.ceil(len(table) / 4)])
    assert np.flatnonzero(~np.ma.getmaskarray(found["text_logits"])).tolist() == wanted.tolist()
    assert wanted.tolist() != list(range(len(wanted)))
    assert least_sure(logits, 0.25).tolist() == wanted.tolist()


def test_least_sure_rows_are_in_the_rows_order_and_rounded_up():
    logits = np.array([3.0, -0.5, 0.1, -2.0, 0.5])
    assert [least_sure(logits, share).tolist() for share in (0.0, 0.2, 0.3, 1.0)] == [
        [],
        [2],
        [1, 2],
        [0, 1, 2, 3, 4],
    ]


@pytest.mark.filterwarnings("error")
def test_probabilities_of_any_logits():
    logits = np.array([-1e4, -50, 0, 50, 1e4, np.nan], np.float32)
    found = probabilities(logits)
    assert found.dtype == np.float64
    assert found[:5].tolist() == pytest.approx([0, math.exp(-50), 0.5, 1, 1], rel=1e-12)
    assert np.isnan(found[5])
    masked = probabilities(np.ma.masked_equal(logits, 0))
    assert masked.tolist()[1:4] == [pytest.approx(math.exp(-50)), None, 1]
    assert np.isnan(masked[5]), "what is no number is not what was not read"
    assert pa.table({"found": masked})["found"].null_count == 1
