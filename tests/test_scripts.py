"""The example scripts, run as a user runs them, on a small log of the user's own and a tiny text encoder."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
import pytest
import torch
from example_runs import EXAMPLES, lines, script
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, pipeline

from flip_hf import FieldConfig, FlipForCTR, FlipProcessor
from flip_hf.data.schema import InputError
from flip_hf.hub.card import render_card
from flip_hf.metrics.auc import auc
from flip_hf.runs.data import open_click_log_file
from flip_hf.training.checkpoints import replace_folder


@pytest.fixture(scope="module")
def pretrained(workplace):
    output = workplace / "pretrained"
    script("pretrain")(["--config", str(workplace / "config.yaml"), "--output_dir", str(output)])
    return output


@pytest.fixture(scope="module")
def finetuned(workplace, pretrained):
    output = workplace / "flip"
    arguments = [
        "--config",
        str(workplace / "config.yaml"),
        "--output_dir",
        str(output),
        "--training.num_train_epochs",
        "3",
    ]
    script("finetune")([*arguments, "--pretrained", str(pretrained / "model")])
    return output


def test_pretraining_leaves_a_model_a_log_and_a_record(pretrained):
    logged = lines(pretrained, "train")
    assert [line["step"] for line in logged] == [5, 10, 13]
    shown = {"mlm_loss", "mtm_loss", "icl_loss", "icl_tabular_to_text_accuracy", "icl_text_to_tabular_accuracy"}
    assert shown | {"mlm_accuracy", "mtm_accuracy", "rows_per_second", "gradient_norm"} <= set(logged[0])
    # Over 8 seeds it falls by 0.71 on average, with a standard deviation of 0.20; at least by 0.52.
    assert logged[-1]["loss"] < logged[0]["loss"]
    record = json.loads((pretrained / "run.json").read_text())
    assert record["data"]["rows"] == {"train": 400, "validation": 120, "test": 120}
    assert record["result"]["steps"] == 13
    assert record["result"]["validation"]["loss"] == pytest.approx(lines(pretrained, "validation")[-1]["loss"])
    assert FlipProcessor.from_pretrained(pretrained / "model").label == "clicked"


def test_tensorboard_shows_what_the_log_holds(pretrained):
    shown = EventAccumulator(str(pretrained / "tensorboard")).Reload()
    for event in ("train", "validation"):
        logged = lines(pretrained, event)
        for name in set(logged[0]) - {"event", "seconds", "step"}:
            found = [(point.step, point.value) for point in shown.Scalars(f"{event}/{name}")]
            expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in logged]
            assert found == expected, name
    first, last = lines(pretrained, "train")[0], lines(pretrained, "train")[-1]
    assert first["learning_rate"] == pytest.approx(100 * first["text_learning_rate"])
    assert last["learning_rate"] < first["learning_rate"]
    assert first["memory_gib"] > 0.05
    assert (pretrained / "curves.png").stat().st_size > 10_000


def test_an_unknown_tracker_is_refused_before_anything_is_read(workplace, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="'mlflow' is not one of tensorboard, trackio, wandb"):
        script("pretrain")([*arguments, "--training.report_to", "[mlflow]"])
    assert not (tmp_path / "run").exists()


def test_finetuning_keeps_the_best_model_and_reads_test_once(workplace, finetuned):
    record = json.loads((finetuned / "run.json").read_text())
    history = lines(finetuned, "validation")
    assert record["result"]["validation"]["auc"] == max(line["auc"] for line in history)
    # Over 8 seeds 0.871 on average, with a standard deviation of 0.038; at least 0.799.
    assert record["result"]["validation"]["auc"] > 0.7
    assert len(lines(finetuned, "test")) == 1
    assert {"auc", "logloss", "ece", "id_auc", "text_auc"} <= set(record["result"]["test"])
    assert record["result"]["test_rows_per_second"] > 0
    for name, (low, high) in record["result"]["test_intervals"].items():
        assert low < high
        assert name == "ece" or low <= record["result"]["test"][name] <= high
    assert sum(b["rows"] for b in record["result"]["test_calibration"]) == record["result"]["test_rows"] == 120
    assert (finetuned / "calibration.png").stat().st_size > 5_000
    scores = pq.read_table(finetuned / "test_scores.parquet").to_pydict()
    assert set(scores) == {"logits", "id_logits", "text_logits", "labels"}
    assert auc(np.array(scores["labels"]), np.array(scores["logits"])) == pytest.approx(
        record["result"]["test"]["auc"], abs=1e-6
    )
    assert (
        record["pretraining"]["result"]
        == json.loads((finetuned.parent / "pretrained" / "run.json").read_text())["result"]
    )
    assert record["model"]["text_base_model"] == "encoder"

    output = workplace / "metrics.json"
    arguments = ["--config", str(workplace / "data.yaml"), "--model", str(finetuned / "model"), "--output", str(output)]
    config = json.loads((workplace / "config.yaml").read_text())
    (workplace / "data.yaml").write_text(json.dumps({"data": config["data"]}))
    script("evaluate_model")(arguments)
    report = json.loads(output.read_text())
    assert report["metrics"]["auc"] == pytest.approx(record["result"]["test"]["auc"], abs=1e-6)
    assert report["fallbacks"]["kind"]["missing"] > 0


def areas_by_group(groups, labels, logits):
    """Rows and AUC of each group with both labels."""
    found = []
    for group in sorted({group for group in groups if group is not None}):
        of_group = np.array([other == group for other in groups])
        if len(set(labels[of_group])) == 2:
            found.append((of_group.sum(), roc_auc_score(labels[of_group], logits[of_group])))
    return zip(*found, strict=True)


def test_a_column_that_is_no_field_groups_the_rows(workplace, finetuned, pretrained, tmp_path):
    draw = random.Random(3)
    flags, sessions = ["--data.group_field", "session"], {}
    for split in ("train", "validation", "test"):
        table = pq.read_table(workplace / f"{split}.parquet")
        sessions[split] = [draw.choice(["a", "b", "c", "d", "once", None]) for _ in range(len(table))]
        pq.write_table(table.append_column("session", pa.array(sessions[split])), tmp_path / f"{split}.parquet")
        flags += [f"--data.{split}_file", str(tmp_path / f"{split}.parquet")]
    common = ["--config", str(workplace / "config.yaml"), *flags]
    folder = tmp_path / "grouped"
    start = ["--pretrained", str(pretrained / "model"), "--training.num_train_epochs", "3"]
    script("finetune")([*common, "--output_dir", str(folder), *start])

    record = json.loads((folder / "run.json").read_text())
    plain = json.loads((finetuned / "run.json").read_text())
    grouped = {f"{tower}{name}" for tower in ("", "id_", "text_") for name in ("gauc", "uauc")}
    for split in ("validation", "test"):
        found, other = record["result"][split], plain["result"][split]
        assert found.keys() - other.keys() == grouped
        # The same run otherwise: the column is no field.
        assert {name: found[name] for name in other} == other
    assert lines(folder, "test")[0]["text_uauc"] == record["result"]["test"]["text_uauc"]
    assert all(grouped <= set(line) for line in lines(folder, "validation"))
    scores = pq.read_table(folder / "test_scores.parquet").to_pydict()
    labels = np.array(scores["labels"])
    for tower in ("", "id_", "text_"):
        rows, areas = areas_by_group(sessions["test"], labels, np.array(scores[f"{tower}logits"]))
        assert record["result"]["test"][f"{tower}gauc"] == pytest.approx(np.average(areas, weights=rows), abs=1e-6)
        assert record["result"]["test"][f"{tower}uauc"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert [group == -1 for group in scores["groups"]] == [session is None for session in sessions["test"]]
    card = render_card(record, "org/name", {})
    assert f"| UAUC | {record['result']['test']['uauc']:.4f} |" in card
    assert "AUCs within groups of rows with the same session: " in card

    config = json.loads((workplace / "config.yaml").read_text())["data"]
    (tmp_path / "data.yaml").write_text(json.dumps({"data": config}))
    arguments = ["--config", str(tmp_path / "data.yaml"), "--model", str(folder / "model"), *flags]
    script("evaluate_model")([*arguments, "--output", str(tmp_path / "metrics.json"), "--slices", "[kind]"])
    report = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("gauc", "id_uauc"):
        assert report["metrics"][name] == pytest.approx(record["result"]["test"][name], abs=1e-6)
    assert {"gauc", "uauc"} <= set(report["slices"]["seen"])

    # Pretraining has no clicks to group, and reads files without the column.
    reused = ["--config", str(workplace / "config.yaml"), "--data.group_field", "session"]
    script("pretrain")([*reused, "--output_dir", str(tmp_path / "pretrained"), "--training.max_steps", "1"])
    with pytest.raises(InputError, match=r"train.parquet.*field 'session'.*the column is missing.* 'user_id', 'title'"):
        script("finetune")([*reused, "--output_dir", str(tmp_path / "none")])
    with pytest.raises(ValueError, match=r"data\.group_field: 'clicked' is the label; name a column such as user_id"):
        script("finetune")([*common, "--data.group_field", "clicked", "--output_dir", str(tmp_path / "label")])


def test_the_fusion_may_be_of_validation_rows(workplace, pretrained, tmp_path):
    common = ["--config", str(workplace / "config.yaml"), "--pretrained", str(pretrained / "model")]
    runs = {}
    for rows in ("training", "validation"):
        script("finetune")([*common, "--output_dir", str(tmp_path / rows), "--fusion_rows", rows])
        record = json.loads((tmp_path / rows / "run.json").read_text())
        runs[rows] = record["result"], load_file(tmp_path / rows / "model" / "model.safetensors")
    (plain, weights), (fitted, own) = runs.values()
    assert {name for name in weights if not torch.equal(weights[name], own[name])} == {"fusion.id_weight"}
    # The fitted weight has the smallest LogLoss on these rows. It need not be much smaller: over 8 seeds, the
    # difference is between 0.000007 and 0.084.
    assert fitted["validation"]["logloss"] < plain["validation"]["logloss"] + 1e-5
    for name in ("id_auc", "text_auc"):
        assert fitted["validation"][name] == pytest.approx(plain["validation"][name], abs=1e-6)
    logits = pq.read_table(tmp_path / "validation" / "test_scores.parquet").to_pydict()
    weight = own["fusion.id_weight"].item()
    expected = weight * np.array(logits["id_logits"]) + (1 - weight) * np.array(logits["text_logits"])
    np.testing.assert_allclose(logits["logits"], expected, atol=1e-2)
    assert lines(tmp_path / "validation", "fusion")[0]["auc"] == fitted["validation"]["auc"]
    arguments = [*common, "--output_dir", str(tmp_path / "id"), "--fusion_rows", "validation", "--mode", "id"]
    with pytest.raises(ValueError, match="fusion_rows='validation' needs mode='joint', not mode='id'"):
        script("finetune")(arguments)


def test_a_card_is_of_the_run(finetuned, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(
        sys, "argv", ["card.py", "--run", str(finetuned), "--repo", "org/name", "--output", str(tmp_path)]
    )
    importlib.import_module("card").main()
    card = (tmp_path / "README.md").read_text()
    assert "The user's own files: train.parquet, validation.parquet, test.parquet." in card
    assert "Settings of pretraining" in card
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "run.json", "curves.png", "calibration.png"}


@pytest.mark.parametrize("mode", ["id", "text"])
def test_one_tower_is_finetuned_alone(workplace, pretrained, mode, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / mode), "--mode", mode]
    script("finetune")(
        [*arguments, "--pretrained", str(pretrained / "model"), "--training.gradient_accumulation_steps", "2"]
    )
    model = FlipForCTR.from_pretrained(tmp_path / mode / "model")
    assert model.config.mode == mode
    assert json.loads((tmp_path / mode / "run.json").read_text())["result"]["steps"] == 7


def test_the_text_encoder_may_start_afresh(workplace, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--mode", "text", "--training.max_steps", "1"]
    still = ["--training.learning_rate", "1e-12", "--training.text_learning_rate", "1e-12"]
    tables = []
    for pretrained in ("true", "false"):
        folder = tmp_path / pretrained
        script("finetune")([*arguments, *still, "--model.text_pretrained", pretrained, "--output_dir", str(folder)])
        loaded = FlipForCTR.from_pretrained(folder / "model")
        tables.append(loaded.flip.text_model.embeddings.word_embeddings.weight)
    encoder = AutoModel.from_pretrained(workplace / "encoder").embeddings.word_embeddings.weight
    assert torch.allclose(tables[0], encoder, atol=1e-6)
    assert not torch.allclose(tables[1], encoder, atol=1e-2)


def test_finetuning_needs_no_pretraining(workplace, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path), "--mode", "id"]
    script("finetune")([*arguments, "--training.max_steps", "3"])
    assert json.loads((tmp_path / "run.json").read_text())["result"]["steps"] == 3


def test_the_configuration_for_ml1m_months_learns_from_files_of_its_columns(workplace, tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_HF_CACHE", str(tmp_path / "cache"))
    rows = {
        "user_id": [1, 2, 3, 4] * 10,
        "movie_id": [1, 2, 3, 4, 5] * 8,
        "title": ["Toy Story (1995)", "Heat (1995)", "Fargo (1996)", "Alien (1979)", "Brazil (1985)"] * 8,
        "timestamp": range(40),
        "label": [0, 1] * 20,
        "is_warm": [True] * 40,
        "liked_movie_ids": [[], [1], [5, 2], [1, 2, 3, 4] * 40] * 10,
        "liked_titles": [[], ["Heat (1995)"], ["Brazil (1985)", "Alien (1979)"], ["Heat (1995)"] * 160] * 10,
    }
    files = [str(tmp_path / f"{part}.parquet") for part in ("train", "validation", "test")]
    for file in files:
        pq.write_table(pa.table(rows), file)
    config = ["--config", str(EXAMPLES / "configs" / "ml1m-months" / "dcnv2.yaml"), "--output_dir", str(tmp_path / "r")]
    names = ("--data.train_file", "--data.validation_file", "--data.test_file")
    given = [part for pair in zip(names, files, strict=True) for part in pair]
    encoder = str(workplace / "encoder")
    vectors = json.dumps([{"field": "title", "encoder": encoder, "fields": ["title"]}])
    script("finetune")([*config, *given, "--model.text_encoder", encoder, "--data.text_features", vectors])
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["data"]["name"] == "ml1m-months"
    assert {"auc", "uauc"} <= set(record["result"]["test"])
    liked = FlipProcessor.from_pretrained(tmp_path / "r" / "model").fields[3]
    assert (liked.share_embedding, liked.target, liked.max_values) == ("title", "title", 150)


def unseen_rows():
    """Rows that were not part of the data: new users, new titles, a missing kind; 50 of them."""
    return {
        "user_id": [str(i) for i in range(50)],
        "title": [f"a new film, number {i}" for i in range(50)],
        "kind": ["drama", ""] * 25,
        "price": ["1"] * 50,
    }


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predict_scores_a_file_in_a_stream(finetuned, tmp_path, capsys, suffix):
    table = pa.table(unseen_rows())
    (pv.write_csv if suffix == "csv" else pq.write_table)(table, tmp_path / f"rows.{suffix}")
    output = tmp_path / "scores.parquet"
    arguments = ["--model", str(finetuned / "model"), "--input", str(tmp_path / f"rows.{suffix}")]
    script("predict")(
        [*arguments, "--output", str(output), "--chunk_rows", "16", "--batch_size", "8", "--precision", "fp32"]
    )
    scores = pq.read_table(output).to_pydict()
    assert scores["row"] == list(range(50))

    processor = FlipProcessor.from_pretrained(finetuned / "model")
    model = FlipForCTR.from_pretrained(finetuned / "model").eval()
    with torch.no_grad():
        expected = model(**processor(unseen_rows(), return_tensors="pt"))
    np.testing.assert_allclose(scores["probability"], expected.logits.sigmoid(), atol=1e-6)
    np.testing.assert_allclose(scores["id_probability"], expected.id_logits.sigmoid(), atol=1e-6)
    np.testing.assert_allclose(scores["text_probability"], expected.text_logits.sigmoid(), atol=1e-6)
    printed = capsys.readouterr().out
    assert "scored 50 rows" in printed
    assert "user_id: 20 oov" in printed
    assert "title: 50 oov" in printed
    assert "kind: 25 missing" in printed


def test_predict_with_a_text_budget_is_the_pipelines(workplace, finetuned, tmp_path):
    model, output = str(finetuned / "model"), tmp_path / "scores.parquet"
    arguments = ["--model", model, "--input", str(workplace / "test.parquet"), "--output", str(output)]
    script("predict")([*arguments, "--text_budget", "0.3", "--chunk_rows", "50", "--precision", "fp32"])
    scores = pq.read_table(output).to_pylist()
    rows = pq.read_table(workplace / "test.parquet")
    clicks = pipeline("ctr-prediction", model=model, text_budget=0.3, towers=True)
    expected = [result for start in range(0, len(rows), 50) for result in clicks(rows.slice(start, 50))]
    assert sum(score["text_probability"] is not None for score in scores) == 15 + 15 + 6
    for score, result in zip(scores, expected, strict=True):
        assert {name: score[name] for name in result} == pytest.approx(result, abs=1e-6)
    with pytest.raises(ValueError, match=r"text_budget=0.3 needs a model with both towers; this one is in mode='id'"):
        script("predict")([*arguments, "--text_budget", "0.3", "--mode", "id"])


def test_predict_of_no_rows_is_an_empty_file(finetuned, tmp_path):
    (tmp_path / "rows.csv").write_text("user_id,title,kind\n")
    output = tmp_path / "scores.parquet"
    model = ["--model", str(finetuned / "model"), "--mode", "id"]
    script("predict")([*model, "--input", str(tmp_path / "rows.csv"), "--output", str(output)])
    assert pq.read_table(output).to_pydict() == {"row": [], "probability": []}


def test_predict_numbers_rows_through_files_and_names_the_file_of_a_bad_one(finetuned, tmp_path):
    header, folder = "user_id\ttitle\tkind\tprice\n", tmp_path / "rows"
    folder.mkdir()
    (folder / "a.tsv").write_text(header + '1\t"Heat\tdrama\t1\n' * 3)
    (folder / "b.tsv").write_text(header + "1\tHeat\tdrama\t1\n" * 2)
    output = tmp_path / "scores.parquet"
    arguments = ["--model", str(finetuned / "model"), "--input", str(folder), "--output", str(output)]
    script("predict")([*arguments, "--csv.quote", "false"])
    assert pq.read_table(output)["row"].to_pylist() == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match=rf"^{folder}/a.tsv, field 'title', row 0, .*csv\.quote"):
        script("predict")(arguments)
    for name, users in (("a", [1.0, 2.0]), ("b", [3.0, 2.0**53])):
        (folder / f"{name}.tsv").unlink()
        columns = {"user_id": users, "title": ["a", "b"], "kind": ["c", "d"], "price": ["1", "1"]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    with pytest.raises(InputError, match=rf"^{folder}/b.parquet, field 'user_id', row 1, value 9007199254740992"):
        script("predict")(arguments)


def test_predict_leaves_nothing_behind_a_bad_row(finetuned, tmp_path):
    (tmp_path / "rows.csv").write_text("user_id,title,kind\n" + "1,a,drama\n" * 30 + "1,a\n")
    output = tmp_path / "scores.parquet"
    arguments = ["--model", str(finetuned / "model"), "--input", str(tmp_path / "rows.csv"), "--output", str(output)]
    with pytest.raises(ValueError, match=r"rows\.csv.*row 30"):
        script("predict")([*arguments, "--chunk_rows", "8"])
    assert {p.name for p in tmp_path.iterdir()} == {"rows.csv"}


def test_a_run_that_can_not_start_leaves_what_an_earlier_one_left(workplace, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path), "--mode", "id"]
    script("finetune")([*arguments, "--training.max_steps", "2"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"run.json", "log.jsonl", "test_scores.parquet"} < {path.name for path in before}
    with pytest.raises(ValueError, match=r"misspelt\.csv: there is no such file"):
        script("finetune")([*arguments, "--data.train_file", str(tmp_path / "misspelt.csv")])
    assert {path: path.read_bytes() for path in before} == before
    script("finetune")([*arguments, "--training.max_steps", "3"])
    assert json.loads((tmp_path / "run.json").read_text())["result"]["steps"] == 3
    assert [line["step"] for line in lines(tmp_path, "train")] == [3]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in shown.Scalars("train/loss")] == [3]


def test_labels_are_checked_before_training(workplace, tmp_path):
    table = pq.read_table(workplace / "train.parquet").to_pydict()
    table["clicked"][17] = 2
    pq.write_table(pa.table(table), tmp_path / "bad.parquet")
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / "run"), "--mode", "id"]
    with pytest.raises(ValueError, match=r"bad\.parquet, field 'clicked', row 17, value 2"):
        script("finetune")([*arguments, "--data.train_file", str(tmp_path / "bad.parquet")])
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_what_is_not_finite_stops_the_run(workplace, tmp_path, monkeypatch, what):
    real = FlipForCTR.forward
    steps = []

    def forward(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        if self.training:
            steps.append(1)
            if len(steps) == 10:
                # A square root has no finite gradient at zero.
                extra = (0.0 * output.loss).sqrt() if what != "loss" else float("nan")
                output.loss = output.loss + extra
        return output

    monkeypatch.setattr(FlipForCTR, "forward", forward)
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path), "--mode", "id"]
    with pytest.raises(FloatingPointError, match=rf"the {what} is nan at step 10: loss=.*rows \[\d+, "):
        script("finetune")([*arguments, "--training.evaluations_per_epoch", "4"])
    FlipForCTR.from_pretrained(tmp_path / "model")


def test_pretraining_contrasts_a_window_of_batches(workplace, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path)]
    window = [
        "--training.contrastive_batches",
        "window",
        "--training.gradient_accumulation_steps",
        "4",
        "--training.logging_steps",
        "1",
    ]
    script("pretrain")([*arguments, *window, "--model.options.contrastive_temperature", "100"])
    # So warm that no row is told from another: the logarithm of the rows of 4 batches out of 13, then of the last one.
    found = [line["icl_loss"] for line in lines(tmp_path, "train")]
    assert found == pytest.approx([math.log(400 / 13 * 4)] * 3 + [math.log(400 / 13)], abs=0.1)


def test_pretraining_tells_masked_tokens_from_those_seen(workplace, tmp_path):
    arguments = [
        "--config",
        str(workplace / "config.yaml"),
        "--training.max_steps",
        "2",
        "--training.logging_steps",
        "1",
    ]
    found = {}
    for vocabulary in ("all", "seen"):
        folder = tmp_path / vocabulary
        script("pretrain")([*arguments, "--output_dir", str(folder), "--masking.mlm_vocabulary", vocabulary])
        found[vocabulary] = lines(folder, "train")[0]
    # The first step starts from the same weights and masks the same: over fewer tokens each is likelier. Over 8 seeds
    # the losses are 3.4 and 5.4, each give or take 0.03.
    assert found["seen"]["mlm_loss"] < found["all"]["mlm_loss"]
    assert found["seen"]["mtm_loss"] == pytest.approx(found["all"]["mtm_loss"])


def test_a_text_encoder_pretrained_on_its_own_text_is_finetuned_alone(workplace, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--training.evaluations_per_epoch", "2"]
    flags = ["--model.options.objectives", '{"text_mlm": 1.0}', "--masking.mlm_vocabulary", "seen"]
    script("pretrain")([*arguments, "--output_dir", str(tmp_path / "pretrained"), *flags])
    validation = lines(tmp_path / "pretrained", "validation")
    assert validation[-1]["text_mlm_loss"] == pytest.approx(validation[-1]["loss"])
    # Both validations mask alike: over 8 seeds the loss falls by 0.025 on average, with a standard deviation of 0.004.
    assert validation[-1]["text_mlm_loss"] < validation[0]["text_mlm_loss"]
    assert set(lines(tmp_path / "pretrained", "train")[0]) >= {"text_mlm_loss", "text_mlm_accuracy"}

    model = tmp_path / "pretrained" / "model"
    text = FlipForCTR.from_pretrained(model, mode="text").flip.text_model.state_dict()
    assert all(
        torch.equal(text[k.removeprefix("flip.text_model.")], v)
        for k, v in load_file(model / "model.safetensors").items()
        if k.startswith("flip.text_model.")
    )
    script("finetune")(
        [*arguments, "--output_dir", str(tmp_path / "ptab"), "--mode", "text", "--pretrained", str(model)]
    )
    assert FlipForCTR.from_pretrained(tmp_path / "ptab" / "model").config.mode == "text"
    assert set(lines(tmp_path / "ptab", "validation")[-1]) >= {"auc", "logloss"}


def test_updates_of_rows_leave_those_that_no_batch_reads(workplace, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--mode", "id", "--training.max_steps", "1"]
    tables = {}
    for updates in ("dense", "rows"):
        folder = tmp_path / updates
        flags = ["--training.feature_updates", updates, "--training.per_device_train_batch_size", "2"]
        script("finetune")([*arguments, "--output_dir", str(folder), *flags, "--training.warmup_ratio", "0"])
        tables[updates] = FlipForCTR.from_pretrained(folder / "model").flip.feature_embeddings.weight.detach()
    # Adam's first step is the same for both: moments of rows that were not read are nothing yet.
    assert torch.allclose(tables["dense"], tables["rows"], atol=1e-6)


def test_a_compiled_text_encoder_reads_alike(workplace, tmp_path, caplog):
    arguments = ["--config", str(workplace / "config.yaml"), "--mode", "text", "--training.max_steps", "2"]
    # In training, compiled dropout draws other numbers; the model that is validated is still that of the start.
    arguments += ["--training.learning_rate", "1e-12", "--training.text_learning_rate", "1e-12"]
    found = {}
    for how in ("false", "true"):
        folder = tmp_path / how
        script("finetune")([*arguments, "--output_dir", str(folder), "--training.torch_compile", how])
        weights = load_file(folder / "model" / "model.safetensors")
        found[how] = set(weights), lines(folder, "validation")[-1]["logloss"]
    assert "can't compile" not in caplog.text
    assert found["true"][0] == found["false"][0]
    assert found["true"][1] == pytest.approx(found["false"][1], rel=1e-3)


def test_where_torch_can_not_compile_training_goes_on(workplace, tmp_path, caplog, monkeypatch):
    def fail(function):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    arguments = ["--config", str(workplace / "config.yaml"), "--training.max_steps", "1", "--mode", "text"]
    script("finetune")([*arguments, "--output_dir", str(tmp_path), "--training.torch_compile", "true"])
    assert "torch can't compile on this machine (no C++ compiler), so the text encoder runs uncompiled" in caplog.text
    assert len(lines(tmp_path, "train")) == 1


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_is_opened_from_disk_and_known_by_what_it_holds(tmp_path, suffix):
    fields = [FieldConfig("user_id"), FieldConfig("device")]
    users, places = [f"{i:03}" for i in range(7)], []
    for name, label in (("a", 1), ("b", 1), ("c", 0)):
        path = tmp_path / f"{name}{suffix}"
        table = pa.table({"user_id": users, "device": pa.array(["x"] * 7).dictionary_encode(), "label": [label] * 7})
        if suffix == ".csv":
            pv.write_csv(table, path)
        else:
            pq.write_table(table, path)
        rows = open_click_log_file(path, fields, "label")
        assert rows["user_id"][:] == users
        assert [Path(file["filename"]).suffix for file in rows.cache_files] == [".arrow"]
        again = open_click_log_file(path, fields, "label")
        assert (again._fingerprint, again.cache_files) == (rows._fingerprint, rows.cache_files)
        places.append(rows._fingerprint)
    assert places[0] == places[1] != places[2]


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "log.csv"
    for users in (["1", "2"], ["3", "4", "5"]):
        path.write_text("user_id,label\n" + "".join(f"{user},0\n" for user in users))
        assert open_click_log_file(path, [FieldConfig("user_id")], "label")["user_id"][:] == users


def test_a_run_on_several_places_records_them_without_credentials(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = pq.read_table(workplace / "train.parquet")
    memory = fsspec.filesystem("memory")
    with memory.open("/key:secret@bucket/train/part-0.parquet", "wb") as file:
        pq.write_table(rows.slice(0, 100), file)
    pq.write_table(rows.slice(100), tmp_path / "rest.parquet")
    places = ["memory://key:secret@bucket/train", str(tmp_path / "rest.parquet")]
    fingerprints = []
    for name, files in (("one", str(workplace / "train.parquet")), ("several", json.dumps(places))):
        arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / name), "--mode", "id"]
        script("finetune")([*arguments, "--training.max_steps", "1", "--data.train_file", files])
        record = json.loads((tmp_path / name / "run.json").read_text())
        fingerprints.append(record["data"]["fingerprints"]["train"])
    assert fingerprints[0] == fingerprints[1]
    assert record["settings"]["data"]["train_file"] == ["memory://bucket/train", places[1]]
    assert record["data"]["files"] == ["train", "rest.parquet", "validation.parquet", "test.parquet"]
    assert "secret" not in json.dumps(record)
    card = render_card(record, "org/name", {})
    assert "rest.parquet" in card
    assert "secret" not in card


@pytest.mark.parametrize("name", ["finetune", "pretrain"])
def test_a_model_that_contrasts_nothing_has_no_larger_contrastive_batches(workplace, tmp_path, name):
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path)]
    if name == "pretrain":
        arguments += ["--model.options.objectives", '{"mlm": 1.0}']
    with pytest.raises(ValueError, match="contrastive_batches is 'window'"):
        script(name)([*arguments, "--training.contrastive_batches", "window"])
    assert lines(tmp_path, "train") == []


def test_the_same_seed_gives_the_same_run(workplace, tmp_path):
    def losses(name, seed):
        arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / name)]
        script("pretrain")(
            [*arguments, "--training.max_steps", "5", "--training.logging_steps", "1", "--training.seed", seed]
        )
        return [line["loss"] for line in lines(tmp_path / name, "train")]

    first = losses("first", "1")
    assert losses("second", "1") == first
    assert losses("third", "2") != first


def test_an_unknown_setting_is_refused(workplace, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script("pretrain")(["--config", str(workplace / "config.yaml"), "--training.no_such", "1"])
    assert "no_such" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["python", "accelerate"])
def test_scripts_start_from_the_command_line(workplace, tmp_path, launcher):
    start = {
        "python": [sys.executable],
        "accelerate": [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            "1",
            "--num_machines",
            "1",
        ],
    }[launcher]
    start += ["--mixed_precision", "no", "--dynamo_backend", "no"] if launcher == "accelerate" else []
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path), "--training.max_steps", "2"]
    subprocess.run([*start, str(EXAMPLES / "pretrain.py"), *arguments], check=True, capture_output=True)
    assert json.loads((tmp_path / "run.json").read_text())["result"]["steps"] == 2


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_two_processes_train_together(workplace, tmp_path, sharded):
    arguments = [
        "--config",
        str(workplace / "config.yaml"),
        "--training.num_train_epochs",
        "2",
        "--training.precision",
        "fp32",
    ]
    # Of a table that is shared out, processes can also update the rows that were read alone.
    updates = "rows" if sharded == "true" else "dense"
    arguments += ["--training.shard_features", sharded, "--training.feature_updates", updates]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pretrained = tmp_path / "pretrained"
    subprocess.run([*launch, str(EXAMPLES / "pretrain.py"), *arguments, "--output_dir", str(pretrained)], check=True)
    record = json.loads((pretrained / "run.json").read_text())
    assert record["device"]["processes"] == 2
    assert record["result"]["steps"] == 14
    assert len(list((pretrained / "tensorboard").iterdir())) == 1, "one process tells"
    assert lines(pretrained, "train")[-1]["loss"] < lines(pretrained, "train")[0]["loss"]

    flip = [*arguments, "--output_dir", str(tmp_path / "flip"), "--pretrained", str(pretrained / "model")]
    subprocess.run([*launch, str(EXAMPLES / "finetune.py"), *flip], check=True)
    record = json.loads((tmp_path / "flip" / "run.json").read_text())
    assert record["device"]["processes"] == 2
    # Every test row is counted once, also where two processes do not divide them: one process finds the same.
    output = tmp_path / "metrics.json"
    config = json.loads((workplace / "config.yaml").read_text())
    (tmp_path / "data.yaml").write_text(json.dumps({"data": config["data"]}))
    evaluate = [
        "--config",
        str(tmp_path / "data.yaml"),
        "--model",
        str(tmp_path / "flip" / "model"),
        "--precision",
        "fp32",
    ]
    script("evaluate_model")([*evaluate, "--output", str(output)])
    assert json.loads(output.read_text())["metrics"]["auc"] == pytest.approx(record["result"]["test"]["auc"], abs=1e-9)


def test_an_interrupted_save_leaves_the_old_folder_whole(tmp_path):
    target = tmp_path / "model"
    replace_folder(target, lambda folder: (folder / "weights").write_text("first"))

    def die(folder):
        (folder / "weights").write_text("sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_folder(target, die)
    assert (target / "weights").read_text() == "first"
    replace_folder(target, lambda folder: (folder / "weights").write_text("third"))
    assert (target / "weights").read_text() == "third"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_demo_table_reads_records(tmp_path):
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    metrics = {"auc": 0.8, "logloss": 0.4}
    record = {"result": {"validation": metrics, "test": metrics}, "peak_memory_gib": 1.5, "wall_seconds": 65.0}
    (tmp_path / "run.json").write_text(json.dumps(record))
    shown = demo.table([("FLIP", tmp_path)])
    assert "| FLIP | 0.8000 | 0.4000 | 0.8000 | 0.4000 | 1 min 05 s | 1.5 GiB |" in shown
    record["result"]["validation"] = {"auc": None, "logloss": 0.4}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert "| FLIP |  | 0.4000 | 0.8000 |" in demo.table([("FLIP", tmp_path)])
