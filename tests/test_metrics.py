"""Metrics against scikit-learn, and through the evaluate library."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import log_loss, roc_auc_score

from flip_hf.data.groups import NO_GROUP
from flip_hf.metrics import METRICS, compute_metrics, load
from flip_hf.metrics.auc import auc, midranks
from flip_hf.metrics.ece import calibration_bins, ece
from flip_hf.metrics.gauc import gauc, group_aucs
from flip_hf.metrics.intervals import bootstrap_intervals
from flip_hf.metrics.logloss import logloss
from flip_hf.metrics.relaimpr import relaimpr
from flip_hf.metrics.uauc import uauc
from flip_hf.scoring import probabilities
from flip_hf.training.evaluation import ctr_metrics, evidence, slice_metrics
from flip_hf.training.loop import Goal

PLAIN = ("auc", "logloss", "ece")


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2, max_size=80))
def test_metrics_equal_those_of_scikit_learn(rows):
    labels = np.array([y for y, _ in rows]).astype(int)
    probabilities = np.array([p for _, p in rows]) / 20
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    assert logloss(labels, probabilities) == pytest.approx(log_loss(labels, clipped, labels=[0, 1]), abs=1e-9)
    if len(set(labels)) == 2:
        assert auc(labels, probabilities) == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)
    else:
        assert np.isnan(auc(labels, probabilities))


@given(values=st.lists(st.integers(-5, 5), max_size=40))
def test_midranks_equal_those_of_scipy(values):
    assert np.array_equal(midranks(np.array(values, float)), rankdata(values))


def aucs_by_group(labels, probabilities, groups):
    """A loop over groups, with scikit-learn's AUC; each group's rows and AUC."""
    found = []
    for group in set(groups.tolist()):
        rows = groups == group
        if len(set(labels[rows].tolist())) == 2:
            found.append((rows.sum(), roc_auc_score(labels[rows], probabilities[rows])))
    return found


def gauc_by_group(labels, probabilities, groups):
    found = aucs_by_group(labels, probabilities, groups)
    weight = sum(rows for rows, _ in found)
    return sum(rows * area for rows, area in found) / weight if weight else float("nan")


def uauc_by_group(labels, probabilities, groups):
    found = aucs_by_group(labels, probabilities, groups)
    return sum(area for _, area in found) / len(found) if found else float("nan")


GROUPED = st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.integers(-3, 3)), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None)
@given(rows=GROUPED, seed=st.integers(0, 99))
def test_gauc_equals_a_loop_over_groups(rows, seed):
    labels, scores, groups = (np.array(column) for column in zip(*rows, strict=True))
    labels = labels.astype(int)
    found = gauc(labels, scores / 8, groups)
    assert found == pytest.approx(gauc_by_group(labels, scores / 8, groups), abs=1e-12, nan_ok=True)
    expected = uauc_by_group(labels, scores / 8, groups)
    assert uauc(labels, scores / 8, groups) == pytest.approx(expected, abs=1e-12, nan_ok=True)

    order = np.random.RandomState(seed).permutation(len(rows))
    assert gauc(labels[order], scores[order] / 8, groups[order]) == pytest.approx(found, abs=1e-12, nan_ok=True)
    named = np.array([f"user {7 * group % 11}" for group in groups])
    assert gauc(labels, scores / 8, named) == pytest.approx(found, abs=1e-12, nan_ok=True), "names and their order"
    # What is added to all of a user's scores does not change how they are ordered, nor does a scale of the user's own.
    stretched = np.exp(scores / 8) * (groups + 4.0) - 10 * groups
    assert gauc(labels, stretched, groups) == pytest.approx(found, abs=1e-12, nan_ok=True)
    assert gauc(labels, -scores / 8, groups) == pytest.approx(1 - found, abs=1e-12, nan_ok=True)

    one_group = gauc(labels, scores / 8, np.zeros(len(rows), int))
    assert one_group == pytest.approx(auc(labels, scores / 8), abs=1e-12, nan_ok=True)


def test_gauc_weighs_groups_by_their_rows():
    labels = np.array([1, 0, 1, 0, 0, 1, 1, 0])
    scores = np.array([0.2, 0.1, 0.5, 0.5, 0.4, 0.9, 0.8, 0.3])
    groups = np.array(["a", "a", "b", "b", "b", "clicks", "clicks", "others"])
    # AUC 1 over two rows and 3 / 4 over three; the groups of one label count nowhere.
    assert gauc(labels, scores, groups) == pytest.approx((2 * 1 + 3 * 0.75) / 5)
    assert uauc(labels, scores, groups) == pytest.approx((1 + 0.75) / 2)
    areas, rows = group_aucs(labels, scores, groups)
    assert areas.tolist() == [1, 0.75]
    assert rows.tolist() == [2, 3]
    assert np.isnan(gauc(labels[5:], scores[5:], groups[5:]))
    assert np.isnan(gauc(labels[:0], scores[:0], groups[:0]))
    assert np.isnan(uauc(labels[5:], scores[5:], groups[5:]))
    for metric in (gauc, uauc):
        with pytest.raises(ValueError, match="1 groups are given for 8 rows"):
            metric(labels, scores, groups[:1])


@pytest.mark.parametrize("missing", [None, float("nan"), np.ma.masked])
def test_rows_without_a_group_are_left_out(missing):
    random = np.random.RandomState(3)
    labels, scores, groups = random.randint(0, 2, 60), random.rand(60), random.randint(0, 5, 60)
    left = groups > 0
    given = np.ma.masked_equal(groups, 0) if missing is np.ma.masked else [group or missing for group in groups]
    for metric in (gauc, uauc):
        found = metric(labels, scores, given)
        assert found == metric(labels[left], scores[left], groups[left])
        assert abs(found - metric(labels, scores, groups)) > 1e-4, "as one group they would count"
        assert np.isnan(metric(labels[~left], scores[~left], np.ma.masked_all((~left).sum(), int)))
        assert np.isnan(metric(labels, scores, [None] * 60))


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=60))
def test_relative_improvement_is_that_of_the_distance_from_a_random_order(rows):
    labels, scores, others = (np.array(column).astype(int) for column in zip(*rows, strict=True))
    found = relaimpr(labels, scores / 9, others / 9)
    if len(set(labels.tolist())) < 2 or roc_auc_score(labels, others) == 0.5:
        assert np.isnan(found)
    else:
        expected = (roc_auc_score(labels, scores) - 0.5) / (roc_auc_score(labels, others) - 0.5) - 1
        assert found == pytest.approx(expected, abs=1e-9)


def test_relative_improvement_of_known_areas():
    labels = np.array([0, 0, 1, 1])
    better, base = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.1, 0.3, 0.2, 0.4])
    # AUC 1 instead of 3 / 4: twice as far from 1 / 2.
    assert relaimpr(labels, better, base) == pytest.approx(1)
    assert relaimpr(labels, base, better) == pytest.approx(-0.5)
    assert relaimpr(labels, base, base) == 0


def made_scores(random, names):
    scores = {name: random.randn(60).astype(np.float32) for name in names}
    return scores | {"labels": random.randint(0, 2, 60).astype(np.float32)}


def test_groups_add_gauc_of_every_tower():
    random = np.random.RandomState(2)
    scores, users = made_scores(random, ("logits", "id_logits", "text_logits")), random.randint(0, 9, 60)
    plain, found = ctr_metrics(scores), ctr_metrics(scores | {"groups": users})
    assert set(plain) == {f"{tower}{name}" for tower in ("", "id_", "text_") for name in PLAIN}
    grouped = {f"{tower}{name}" for tower in ("", "id_", "text_") for name in ("gauc", "uauc")}
    assert set(found) - set(plain) == grouped
    assert {name: found[name] for name in plain} == plain
    for tower in ("", "id_", "text_"):
        logits = scores[f"{tower}logits"]
        expected = gauc_by_group(scores["labels"].astype(int), probabilities(logits), users)
        assert found[f"{tower}gauc"] == pytest.approx(expected, abs=1e-12)
        expected = uauc_by_group(scores["labels"].astype(int), probabilities(logits), users)
        assert found[f"{tower}uauc"] == pytest.approx(expected, abs=1e-12)
    assert len({found[name] for name in grouped}) == 6

    alone = {name: scores[name] for name in ("logits", "labels", "id_logits")}
    assert set(ctr_metrics(alone | {"groups": users})) == {*PLAIN, "gauc", "uauc"}


def test_rows_whose_group_is_missing_count_in_the_plain_metrics_alone():
    random = np.random.RandomState(8)
    scores, users = made_scores(random, ("logits",)), random.randint(NO_GROUP, 5, 60)
    found, left = ctr_metrics(scores | {"groups": users}), users != NO_GROUP
    assert 0 < left.sum() < 60
    assert {name: found[name] for name in PLAIN} == ctr_metrics(scores)
    labels, clicks = scores["labels"].astype(int)[left], probabilities(scores["logits"])[left]
    assert found["gauc"] == pytest.approx(gauc_by_group(labels, clicks, users[left]), abs=1e-12)
    assert found["uauc"] == pytest.approx(uauc_by_group(labels, clicks, users[left]), abs=1e-12)


def test_slices_have_metrics_within_their_own_groups():
    random = np.random.RandomState(9)
    scores, users = made_scores(random, ("logits",)), random.randint(0, 5, 60)
    mask = random.rand(60) < 0.6
    found = slice_metrics(scores | {"groups": users}, {"some": mask})["some"]
    labels, clicks = scores["labels"].astype(int)[mask], probabilities(scores["logits"])[mask]
    assert found["gauc"] == pytest.approx(gauc_by_group(labels, clicks, users[mask]), abs=1e-12)


def test_evidence_holds_gauc_where_groups_are_given():
    random = np.random.RandomState(4)
    scores, users = made_scores(random, ("logits",)), random.randint(0, 9, 60)
    grouped = scores | {"groups": users}
    plain, found = evidence(scores), evidence(grouped)
    assert found["test"] == ctr_metrics(grouped)
    assert found["test"].keys() - plain["test"].keys() == {"gauc", "uauc"}
    assert {name: found[name] for name in plain if name != "test"} == {
        name: plain[name] for name in plain if name != "test"
    }


@pytest.mark.parametrize("groups", ["numbers", "strings"])
@pytest.mark.parametrize("name", METRICS)
def test_evaluate_metrics_give_the_same(name, groups, tmp_path):
    random = np.random.RandomState(0)
    labels, clicks, others, users = random.randint(0, 2, 50), random.rand(50), random.rand(50), random.randint(0, 6, 50)
    users = users if groups == "numbers" else np.array([f"user {user}" for user in users])
    third = {"groups": ("groups", users), "base_probabilities": ("base_predictions", others)}
    more = dict([third[METRICS[name].needs]]) if METRICS[name].needs else {}
    expected = METRICS[name].function(labels, clicks, *more.values())
    metric = load(name, cache_dir=str(tmp_path))
    assert metric.compute(predictions=clicks, references=labels, **more) == {name: expected}
    # A batch at a time, as where the rows do not fit into memory.
    for part in (slice(0, 20), slice(20, 50)):
        metric.add_batch(
            predictions=clicks[part], references=labels[part], **{key: values[part] for key, values in more.items()}
        )
    assert metric.compute() == {name: expected}
    if more:
        with pytest.raises(ValueError, match="inputs are missing"):
            metric.compute(predictions=clicks, references=labels)


def test_evaluate_metrics_refuse_a_name_and_a_group_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="'gaug' is not one of the metrics auc, logloss, ece, gauc, uauc, relaimpr"):
        load("gaug")
    for groups in (["a", None], [1, None]):
        with pytest.raises(ValueError, match="groups: row 1 has no value; leave out rows without one"):
            load("gauc", cache_dir=str(tmp_path)).compute(predictions=[0.1, 0.2], references=[0, 1], groups=groups)


def test_importing_the_package_imports_no_evaluate():
    code = "import sys, flip_hf, flip_hf.metrics, flip_hf.training.trainer; sys.exit('evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_all_metrics_are_those_that_the_inputs_suffice_for():
    random = np.random.RandomState(5)
    labels, clicks, users = random.randint(0, 2, 50), random.rand(50), random.randint(0, 6, 50)
    assert compute_metrics(labels, clicks) == {name: METRICS[name].function(labels, clicks) for name in PLAIN}
    found = compute_metrics(labels, clicks, users)
    assert list(found) == [*PLAIN, "gauc", "uauc"]
    assert (found["gauc"], found["uauc"]) == (gauc(labels, clicks, users), uauc(labels, clicks, users))


def test_ece_and_the_bins_it_is_made_of():
    labels = np.array([0, 0, 0, 1] * 15)
    probabilities = np.repeat(np.linspace(0.1, 0.8, 15), 4)
    bins = calibration_bins(labels, probabilities)
    assert [b.rows for b in bins] == [4] * 15
    assert [b.click_rate for b in bins] == [0.25] * 15
    assert ece(labels, probabilities) == pytest.approx(np.abs(np.linspace(0.1, 0.8, 15) - 0.25).mean())
    assert ece(labels[:3], probabilities[:3]) == pytest.approx(0.1), "fewer rows than bins"


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=80))
def test_bins_hold_every_row_once(rows):
    labels, probabilities = np.array([y for y, _ in rows]).astype(int), np.array([p for _, p in rows])
    bins = calibration_bins(labels, probabilities)
    assert sum(b.rows for b in bins) == len(rows)
    assert sum(b.rows * b.click_rate for b in bins) == pytest.approx(labels.sum())
    assert sum(b.rows * b.probability for b in bins) == pytest.approx(probabilities.sum())
    assert 0 <= ece(labels, probabilities) <= 1


def by_theory(interval, mean, error):
    assert interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_intervals_are_percentiles_of_the_resamples(level):
    random = np.random.RandomState(6)
    clicks = random.rand(40)
    labels = (random.rand(40) < clicks).astype(int)
    found = bootstrap_intervals(labels, clicks, level=level, resamples=60, seed=7)
    draw = np.random.Generator(np.random.PCG64(7))
    resamples = [draw.integers(40, size=40) for _ in range(60)]
    expected = {
        "auc": [roc_auc_score(labels[rows], clicks[rows]) for rows in resamples],
        "logloss": [log_loss(labels[rows], clicks[rows]) for rows in resamples],
        "ece": [ece(labels[rows], clicks[rows]) for rows in resamples],
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        assert found[name] == pytest.approx((low, high), abs=1e-12), name


def test_intervals_hold_what_theory_says():
    random = np.random.RandomState(1)
    probabilities = random.rand(2000)
    labels = (random.rand(2000) < probabilities).astype(int)
    found = bootstrap_intervals(labels, probabilities)
    assert found == bootstrap_intervals(labels, probabilities), "the same seed, the same intervals"

    losses = -np.where(labels, np.log(probabilities), np.log1p(-probabilities))
    error = losses.std() / np.sqrt(len(losses))
    assert found["logloss"] == pytest.approx(
        (losses.mean() - 1.96 * error, losses.mean() + 1.96 * error), abs=0.2 * error
    )
    # DeLong, DeLong and Clarke-Pearson 1988.
    above = (probabilities[labels == 1][:, None] > probabilities[labels == 0]).astype(float)
    error = np.sqrt(above.mean(1).var(ddof=1) / len(above) + above.mean(0).var(ddof=1) / above.shape[1])
    by_theory(found["auc"], above.mean(), error)

    assert np.isnan(bootstrap_intervals(np.ones(5, int), np.full(5, 0.5), resamples=3)["auc"]).all()


def test_the_best_is_never_nothing():
    goal = Goal("auc", larger_is_better=True)
    nan = float("nan")
    assert goal.better(nan, None), "the first model is kept whatever it is worth"
    assert goal.better(0.4, nan)
    assert not goal.better(nan, 0.4)
    assert goal.better(0.5, 0.4)
    assert not goal.better(0.4, 0.4)
    assert Goal("loss", larger_is_better=False).better(0.3, 0.4)
