"""Each setting of a run and of a model changes what it says it does; others are tested beside what they change."""

import numpy as np
import pytest
import torch
from example_runs import script

from flip_hf import (
    FieldConfig,
    FlipConfig,
    FlipCTRCollator,
    FlipForCTR,
    FlipForPreTraining,
    FlipPretrainingCollator,
    FlipProcessor,
)
from flip_hf.fields import IGNORED_LABEL
from flip_hf.runs import commands
from flip_hf.training.checkpoints import Checkpoints


@pytest.fixture
def collated(monkeypatch):
    """What the collators that a script makes have made, in order: the collator, the rows' numbers and the batch."""
    found = []

    def noting(cls):
        class Noting(cls):
            def __call__(self, rows):
                batch = super().__call__(rows)
                found.append((self, rows["row"].to_pylist(), rows["token_field_ids"].to_pylist(), dict(batch)))
                return batch

            @property
            def columns(self):
                return sorted({*super().columns, "token_field_ids"})

        return Noting

    for cls in (FlipPretrainingCollator, FlipCTRCollator):
        monkeypatch.setattr(commands, cls.__name__, noting(cls))
    return found


@pytest.fixture
def run(workplace, tmp_path):
    def run(name, *flags, folder="run"):
        """Rows are validated that are trained on, so that the two can be compared."""
        same = ["--data.train_file", str(workplace / "validation.parquet")]
        arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / folder)]
        script(name)([*arguments, *same, "--training.report_to", "[]", *flags])
        return tmp_path / folder

    return run


def masks_of(batches):
    """For each row which features and which tokens were masked, by its number."""
    return {
        number: (tuple((mtm != IGNORED_LABEL).tolist()), tuple((mlm != IGNORED_LABEL).nonzero()[:, 0].tolist()))
        for _, numbers, _, batch in batches
        for number, mtm, mlm in zip(numbers, batch["mtm_labels"], batch["mlm_labels"], strict=True)
    }


def test_validation_masks_what_training_does_not_and_always_the_same(run, collated):
    run("pretrain", "--training.num_train_epochs", "2", "--training.patience", "9")
    passes = {True: [[]], False: [[]]}
    for entry in collated:
        of_one = passes[entry[0] is collated[0][0]]
        of_one[-1].append(entry)
        if sum(len(numbers) for _, numbers, _, _ in of_one[-1]) == 120:
            of_one.append([])
    (first, second), epochs = (
        [masks_of(batches) for batches in of_one[:-1]] for of_one in (passes[False], passes[True])
    )
    assert len(first) == 120
    assert first == second
    assert len(epochs) == 2
    for training in epochs:
        assert set(training) == set(first)
        # One of three fields is masked in either view: a ninth of the rows agree by chance, all of them by one seed.
        assert np.mean([training[row] == first[row] for row in first]) < 0.25


def fields_of(token_fields, labels, field=None):
    """For each row the fields of which a token is masked; of one field, whether its tokens are."""
    masked = (labels != IGNORED_LABEL).tolist()
    pairs = [list(zip(row, mask, strict=False)) for row, mask in zip(token_fields, masked, strict=True)]
    if field is None:
        return [{place for place, is_masked in row if is_masked} for row in pairs]
    return [{is_masked for place, is_masked in row if place == field} for row in pairs]


@pytest.mark.parametrize(("view", "of_table", "of_text"), [("tabular", {3}, {1}), ("text", {1}, {3})])
def test_ratios_of_masks_reach_training_and_validation(run, collated, view, of_table, of_text):
    run("pretrain", "--training.max_steps", "1", f"--masking.{view}_mask_ratio", "1.0")
    assert len({id(collator) for collator, *_ in collated}) == 2
    for _, _, token_fields, batch in collated:
        assert set((batch["mtm_labels"] != IGNORED_LABEL).sum(dim=1).tolist()) == of_table
        assert {len(found) for found in fields_of(token_fields, batch["mlm_labels"])} == of_text


def test_single_tokens_are_masked_where_they_are_asked_for(run, collated):
    token = ["--masking.text_mask_unit", "token", "--masking.text_mask_ratio", "0.5"]
    run("pretrain", "--training.max_steps", "1", *token)
    for _, _, token_fields, batch in collated:
        of_titles = fields_of(token_fields, batch["mlm_labels"], field=1)
        assert np.mean([found == {True, False} for found in of_titles]) > 0.5, "of most titles some tokens are masked"


def test_features_are_dropped_in_training_alone_and_by_the_seed(run, collated):
    flags = ["--training.oov_dropout", "0.5", "--training.seed", "3", "--training.num_train_epochs", "1"]
    folder = run("finetune", "--mode", "id", *flags)
    trained, others = [], {}
    for collator, numbers, _, batch in collated:
        if collator is collated[0][0]:
            trained += zip(numbers, batch["feature_ids"], strict=True)
        else:
            # Validation rows come first; test rows have the same numbers.
            for number, ids in zip(numbers, batch["feature_ids"], strict=True):
                others.setdefault(number, ids)
    assert sorted(number for number, _ in trained) == list(range(120))
    processor = FlipProcessor.from_pretrained(folder / "model")
    by_hand = FlipCTRCollator(processor, "id", oov_dropout=0.5, seed=3)
    rows = [{"row": number, "feature_ids": others[number].numpy()} for number, _ in trained]
    assert torch.equal(torch.stack([ids for _, ids in trained]), by_hand(rows)["feature_ids"])
    differs = torch.stack([ids != others[number] for number, ids in trained])
    assert 0.3 < differs.float().mean() < 0.6


def test_evaluation_has_batches_of_its_own_size(run, collated):
    run("finetune", "--mode", "id", "--training.max_steps", "1", "--training.per_device_eval_batch_size", "50")
    first = collated[0][0]
    assert [len(numbers) for collator, numbers, _, _ in collated if collator is first] == [30]
    sizes = [len(numbers) for collator, numbers, _, _ in collated if collator is not first]
    # Validation rows, then as many test rows.
    assert sizes == [50, 50, 20] * 2


def test_as_many_checkpoints_are_kept_as_asked_for_and_trackers_started(run, monkeypatch):
    monkeypatch.setattr(Checkpoints, "clear", lambda self: None)
    flags = ["--training.save_steps", "1", "--training.save_total_limit", "3"]
    folder = run("finetune", "--mode", "id", "--training.num_train_epochs", "1", *flags)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-3", "step-4"]
    assert not (folder / "tensorboard").exists(), "the fixture asks for no tracker"


FIELDS = [FieldConfig("user", num_features=400), FieldConfig("item", num_features=600)]
TEXT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 90,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def build(cls=FlipForCTR, **settings):
    torch.manual_seed(0)
    return cls(FlipConfig(text_config=dict(TEXT), fields=FIELDS, backbone_options={"dropout": 0.0}, **settings))


BATCH = {
    "feature_ids": torch.tensor([[5, 500], [6, 501]]),
    "input_ids": torch.tensor([[2, 7, 8, 9], [2, 10, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


def test_head_dropout_drops_before_the_heads():
    still, dropping = build(head_dropout=0.0).train(), build(head_dropout=0.5).train()
    assert torch.equal(still(**BATCH).text_logits, still(**BATCH).text_logits)
    expected = still(**BATCH).text_logits
    drawn = torch.stack([dropping(**BATCH).text_logits for _ in range(200)]).detach()
    assert len(drawn.unique(dim=0)) > 100
    assert torch.equal(dropping.eval()(**BATCH).text_logits, still.eval()(**BATCH).text_logits)
    # The mean is kept: half of the vector, doubled.
    error = drawn.std(dim=0) / 200**0.5
    assert ((drawn.mean(dim=0) - expected).abs() < 4 * error).all()


@torch.no_grad()
def test_text_pooling_is_of_the_first_or_of_all_tokens():
    for pooling in ("cls", "mean"):
        output = build(text_pooling=pooling).eval().flip(**BATCH)
        states = output.token_states
        expected = states[:, 0] if pooling == "cls" else torch.stack([states[0].mean(dim=0), states[1, :2].mean(dim=0)])
        torch.testing.assert_close(output.text_representation, expected)


@pytest.mark.parametrize("deviation", [0.02, 0.3])
def test_the_feature_table_starts_with_the_deviation_that_is_set(deviation):
    table = build(feature_initializer_range=deviation, mode="id").flip.feature_embeddings.weight
    assert table.shape == (2 + 1000, 32)
    assert table[2:].std().item() == pytest.approx(deviation, rel=0.05)


def test_sizes_are_those_that_are_set():
    model = build(FlipForPreTraining, embedding_dim=6, projection_dim=10, text_layers=2)
    assert model.flip.feature_embeddings.weight.shape == (1002, 6)
    assert len(model.flip.text_model.encoder.layer) == 2
    icl = model.objectives["icl"]
    tabular, text = icl.project(
        torch.randn(4, icl.tabular_projection.in_features), torch.randn(4, icl.text_projection.in_features)
    )
    assert tabular.shape == text.shape == (4, 10)
