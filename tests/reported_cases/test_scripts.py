"""Reported cases: scripts lose nothing and say what went wrong before they compute anything."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
import pytest
from example_runs import EXAMPLES, lines, script

from flip_hf import FlipForCTR, FlipForPreTraining, FlipProcessor

SHORT = ["--training.max_steps", "2", "--training.logging_steps", "1"]


def finetune(workplace, folder, *flags):
    script("finetune")(
        ["--config", str(workplace / "config.yaml"), "--output_dir", str(folder), "--mode", "id", *flags]
    )


def without(source, target, column, **added):
    """A Parquet file less one column, with others."""
    table = pq.read_table(source).to_pydict()
    values = table.pop(column)
    pq.write_table(pa.table({**table, **{name: make(values) for name, make in added.items()}}), target)
    return str(target)


@pytest.fixture
def impressions(tmp_path, click_rows, field_names):
    rows = {"request_id": [2**53 + 1, 7, None], **{name: click_rows[name][:3] for name in field_names}}
    pq.write_table(pa.table({**rows, "label": click_rows["label"][:3]}), tmp_path / "impressions.parquet")
    return tmp_path / "impressions.parquet"


def test_predict_refuses_to_overwrite_its_input(ctr_folder, impressions, tmp_path):
    before = impressions.read_bytes()
    (tmp_path / "link.parquet").symlink_to(impressions)
    for output in (impressions, tmp_path / "link.parquet"):
        with pytest.raises(ValueError, match="would overwrite the input"):
            script("predict")(
                ["--model", str(ctr_folder), "--input", str(impressions), "--output", str(output)],
            )
        assert impressions.read_bytes() == before


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_predict_writes_what_the_name_says(ctr_folder, impressions, tmp_path, ending):
    output = tmp_path / f"scores.{ending}"
    script("predict")(["--model", str(ctr_folder), "--input", str(impressions), "--output", str(output)])
    if ending == "csv":
        rows = pv.read_csv(output).to_pylist()
    else:
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert all(0 < row["probability"] < 1 for row in rows)


def test_predict_keeps_chosen_columns(ctr_folder, impressions, tmp_path):
    output = tmp_path / "scores.parquet"
    arguments = ["--model", str(ctr_folder), "--input", str(impressions), "--output", str(output)]
    script("predict")([*arguments, "--keep", "[request_id]"])
    assert pq.read_table(output)["request_id"].to_pylist() == [2**53 + 1, 7, None]


@pytest.mark.parametrize("name", ["predict", "evaluate_model"])
def test_a_model_that_never_learned_clicks_is_refused(ctr_folder, impressions, tmp_path, name):
    model = FlipForPreTraining(FlipForCTR.from_pretrained(ctr_folder).config)
    model.save_pretrained(tmp_path / "pretrained")
    FlipProcessor.from_pretrained(ctr_folder).save_pretrained(tmp_path / "pretrained")
    source = {"predict": "--input", "evaluate_model": "--data.test_file"}[name]
    flags = [source, str(impressions), "--output", str(tmp_path / "scores.parquet")]
    with pytest.raises(ValueError, match=r"does not learn clicks.*its probabilities mean nothing"):
        script(name)(["--model", str(tmp_path / "pretrained"), *flags])
    assert not (tmp_path / "scores.parquet").exists()


def test_a_second_run_in_a_folder_ends_with_the_first_ones_host_and_process(workplace, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / "run"), "--mode", "id"]
    command = [sys.executable, str(EXAMPLES / "finetune.py"), *arguments, "--training.num_train_epochs"]
    # Lines of the log show that it trains; workers share its open files.
    flags = [
        "100000",
        "--training.patience",
        "100000",
        "--training.logging_steps",
        "1",
        "--training.dataloader_num_workers",
        "1",
    ]
    first = subprocess.Popen([*command, *flags], stderr=subprocess.DEVNULL)
    try:
        log = tmp_path / "run" / "log.jsonl"
        while first.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        second = subprocess.run([*command, "1"], capture_output=True, text=True, timeout=300)
        assert first.poll() is None
        assert second.returncode == 1
        error = second.stderr.splitlines()[-1]
        assert error.startswith("error: ")
        assert f"process {first.pid} on {socket.gethostname()}" in error
        assert lines(tmp_path / "run", "train")[0]["step"] == 1
    finally:
        first.kill()
        first.wait()
    # A killed process holds no lock.
    third = subprocess.run([*command, "1"], capture_output=True, text=True, timeout=300)
    assert third.returncode == 0, third.stderr


def refuse(name):
    raise AssertionError(f"{name} is no standard JSON")


@pytest.fixture
def one_class(workplace, tmp_path, monkeypatch):
    """A run whose validation and test rows have the label 0 alone, with known LogLosses."""
    from flip_hf.training import evaluation

    real, known = evaluation.compute_metrics, iter([0.5, 0.3, 0.4, 0.6])
    monkeypatch.setattr(evaluation, "compute_metrics", lambda *arrays: {**real(*arrays), "logloss": next(known, 0.7)})
    flags = ["--training.evaluations_per_epoch", "4", "--training.patience", "4"]
    for split in ("validation", "test"):
        target = tmp_path / f"{split}.parquet"
        without(workplace / f"{split}.parquet", target, "clicked", clicked=lambda values: [0] * len(values))
        flags += [f"--data.{split}_file", str(target)]
    finetune(workplace, tmp_path / "run", *flags)
    return tmp_path / "run"


def test_files_hold_standard_json(one_class, workplace, tmp_path):
    for text in (one_class / "log.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=refuse)
    record = json.loads((one_class / "run.json").read_text(), parse_constant=refuse)
    assert record["result"]["test"]["auc"] is None
    assert record["result"]["test_intervals"]["auc"] == [None, None]
    config = {
        **json.loads((workplace / "config.yaml").read_text())["data"],
        "test_file": str(tmp_path / "test.parquet"),
    }
    (tmp_path / "data.yaml").write_text(json.dumps({"data": config}))
    arguments = ["--config", str(tmp_path / "data.yaml"), "--model", str(one_class / "model")]
    script("evaluate_model")([*arguments, "--output", str(tmp_path / "metrics.json")])
    report = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert report["metrics"]["auc"] is None


def test_logloss_chooses_the_best_model_where_validation_has_one_class(one_class, caplog):
    assert [line["logloss"] for line in lines(one_class, "validation")] == [0.5, 0.3, 0.4, 0.6]
    record = json.loads((one_class / "run.json").read_text())
    assert record["result"]["best_step"] == lines(one_class, "validation")[1]["step"]
    assert record["result"]["validation"]["logloss"] == 0.3
    assert record["goal"] == {"metric": "logloss", "larger_is_better": False}
    warnings = [message.message for message in caplog.get_records("setup") if message.levelno == logging.WARNING]
    assert "all 120 validation rows have the label 0, so AUC is undefined; LogLoss chooses the best model" in warnings


def test_pretraining_needs_no_label_column(workplace, tmp_path):
    flags = [
        part
        for split in ("train", "validation", "test")
        for part in (
            f"--data.{split}_file",
            without(workplace / f"{split}.parquet", tmp_path / f"{split}.parquet", "clicked"),
        )
    ]
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / "run"), *SHORT, *flags]
    script("pretrain")(arguments)
    assert FlipProcessor.from_pretrained(tmp_path / "run" / "model").label is None
    # Finetuning then learns clicks from files that have them.
    finetune(workplace, tmp_path / "flip", "--pretrained", str(tmp_path / "run" / "model"), *SHORT)
    assert FlipProcessor.from_pretrained(tmp_path / "flip" / "model").label == "clicked"


def test_finetuning_may_learn_another_label_than_pretraining_saw(workplace, tmp_path):
    pretrained = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / "pretrained"), *SHORT]
    script("pretrain")(pretrained)
    flags = ["--data.label", "bought"]
    for split in ("train", "validation", "test"):
        target = tmp_path / f"{split}.parquet"
        without(workplace / f"{split}.parquet", target, "clicked", bought=lambda values: [1 - v for v in values])
        flags += [f"--data.{split}_file", str(target)]
    finetune(workplace, tmp_path / "run", "--pretrained", str(tmp_path / "pretrained" / "model"), *SHORT, *flags)
    assert FlipProcessor.from_pretrained(tmp_path / "run" / "model").label == "bought"
    clicks = pq.read_table(workplace / "test.parquet")["clicked"].to_pylist()
    assert pq.read_table(tmp_path / "run" / "test_scores.parquet")["labels"].to_pylist() == [1 - c for c in clicks]


def test_evaluate_takes_one_labelled_file(ctr_folder, impressions, tmp_path):
    output = tmp_path / "a" / "new" / "folder" / "metrics.json"
    arguments = ["--model", str(ctr_folder), "--data.test_file", str(impressions), "--output", str(output)]
    script("evaluate_model")(arguments)
    assert json.loads(output.read_text())["rows"] == 3
    script("evaluate_model")([*arguments[:2], "--data.train_file", str(impressions), "--rows", "train"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.fields", "[user_id, clicked]"], r"data\.fields names 'clicked', which is the label"),
        (["--training.per_device_eval_batch_size", "0"], r"training\.per_device_eval_batch_size=0 must be 1 or more"),
        (["--training.warmup_ratio", "1.5"], r"training\.warmup_ratio=1\.5 must be from 0 to 1"),
        (["--training.learning_rate", "-1"], r"training\.learning_rate=-1\.0 must be 0 or more"),
        (["--training.dataloader_num_workers", "-1"], r"training\.dataloader_num_workers=-1 must be 0 or more"),
        (["--pretrained", "RUN"], r"pretrained=.*run: this folder holds no model.*did you mean .*run/model\?"),
        (["--pretrained", "RUN/model", "--mode", "text"], r"mode=text: .*model was saved in mode=id and has only"),
    ],
)
def test_a_setting_that_can_not_be_is_an_error_before_anything_is_read(workplace, ctr_folder, tmp_path, flags, message):
    FlipForCTR.from_pretrained(ctr_folder, mode="id").save_pretrained(tmp_path / "run" / "model")
    FlipProcessor.from_pretrained(ctr_folder).save_pretrained(tmp_path / "run" / "model")
    flags = [flag.replace("RUN", str(tmp_path / "run")) for flag in flags]
    missing = ["--data.train_file", str(tmp_path / "missing.parquet")]
    with pytest.raises(ValueError, match=message):
        finetune(workplace, tmp_path / "new", *missing, *flags)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["predict", "evaluate_model"])
def test_a_tower_that_is_not_there_is_an_error_before_scoring(ctr_folder, impressions, tmp_path, name):
    FlipForCTR.from_pretrained(ctr_folder, mode="id").save_pretrained(tmp_path / "model")
    FlipProcessor.from_pretrained(ctr_folder).save_pretrained(tmp_path / "model")
    source = {"predict": "--input", "evaluate_model": "--data.test_file"}[name]
    flags = [source, str(impressions), "--output", str(tmp_path / "scores.parquet")]
    with pytest.raises(ValueError, match=r"^mode=text: .*model was saved in mode=id and has only that tower"):
        script(name)(["--model", str(tmp_path / "model"), "--mode", "text", *flags])


def test_a_run_that_is_no_model_is_a_one_line_error(ctr_folder, impressions, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(ctr_folder)
    command = [sys.executable, str(EXAMPLES / "predict.py"), "--model", str(tmp_path / "run")]
    flags = ["--input", str(impressions), "--output", str(tmp_path / "scores.parquet")]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    place = tmp_path / "run"
    message = (
        f"model={place}: this folder holds no model, because config.json is missing; did you mean {place / 'model'}?"
    )
    assert done.stderr == f"error: {message}\n"


# Scripts, not modules that they import.
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_during_the_imports_is_one_line(program):
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[PROGRAMS.index(program) % 3]
    # Python says on standard error what it has imported.
    command = [sys.executable, "-X", "importtime", str(EXAMPLES / program), "--help"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert any(line.split("|")[-1].strip().startswith("torch.") for line in process.stderr)
        process.send_signal(number)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.returncode, rest) == (128 + number, [f"interrupted by {number.name}\n"])
