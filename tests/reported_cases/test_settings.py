"""Reported cases: settings, help, progress, the load report, and interrupts."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from example_runs import EXAMPLES, script
from interrupting import interrupted

from flip_hf import FlipConfig, FlipForCTR

ROOT = EXAMPLES.parent


def test_a_misspelt_setting_of_finetuning_is_refused_before_anything_is_read(tmp_path, capsys):
    files = ["--data.train_file", "/no/such/file", "--data.validation_file", "/no/such/file", "--data.fields", "[a]"]
    arguments = ["--output_dir", str(tmp_path / "run"), *files, "--model.options.backbon", "deepfm"]
    with pytest.raises(ValueError, match=r"'backbon' .did you mean 'backbone'"):
        script("finetune")(arguments)
    assert not (tmp_path / "run").exists()


def test_a_configuration_refuses_a_misspelt_setting():
    for settings, nearest in (({"backbon": "deepfm"}, "backbone"), ({"temperature": 0.5}, "contrastive_temperature")):
        with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
            FlipConfig(**settings)


def test_a_misspelt_objective_is_refused():
    with pytest.raises(ValueError, match=r"did you mean 'objectives\.icl'"):
        FlipConfig(objectives={"icll": 1})


def test_loading_refuses_a_misspelt_setting(ctr_folder):
    for cls in (FlipConfig, FlipForCTR):
        with pytest.raises(ValueError, match=r"'backbon' .did you mean 'backbone'"):
            cls.from_pretrained(ctr_folder, backbon="deepfm")


def test_a_saved_setting_of_a_newer_version_is_a_warning(ctr_folder, tmp_path, caplog):
    FlipForCTR.from_pretrained(ctr_folder).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"tower_norm": "layer"}))
    with caplog.at_level(logging.WARNING):
        assert FlipForCTR.from_pretrained(tmp_path).config.backbone == "dcnv2"
    assert "'tower_norm'" in caplog.text


@pytest.mark.parametrize("name", ["pretrain", "finetune", "evaluate_model", "predict"])
def test_help_describes_every_setting(name):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    first = shown.splitlines()[:40]
    assert first[0] == f"usage: {name}.py [--config FILE.yaml] [--SETTING VALUE ...]"
    assert any(line.startswith(f"python examples/{name}.py --") for line in first[:8])
    # A setting without a description shows its type alone.
    settings = [part.split() for part in shown.split("\n  --")[1:]]
    assert [words for words in settings if any(word.startswith("(type:") for word in words[1:3])] == []
    assert "docstring-parser" in Path(ROOT / "setup.cfg").read_text()


@pytest.mark.parametrize("mode", ["joint", "id"])
def test_weights_that_are_dropped_on_purpose_are_not_reported(ctr_folder, tmp_path, mode):
    load = "import sys; from flip_hf import FlipModel; FlipModel.from_pretrained(sys.argv[1], mode=sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", load, str(ctr_folder), mode]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "LOAD REPORT" not in shown.stdout + shown.stderr
    assert "UNEXPECTED" not in shown.stdout + shown.stderr


def test_a_pretrained_model_that_is_loaded_for_clicks_is_one_line(ctr_folder, tmp_path):
    from flip_hf import FlipForPreTraining

    FlipForPreTraining(FlipConfig.from_pretrained(ctr_folder)).save_pretrained(tmp_path)
    load = "import sys; from flip_hf import FlipForCTR; FlipForCTR.from_pretrained(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", load, str(tmp_path)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    assert "MISSING" not in shown
    assert [line for line in shown.splitlines() if "finetune it before you use its logits" in line]


def test_an_interrupt_while_a_script_reads_is_one_line(workplace, tmp_path):
    arguments = ["--config", workplace / "config.yaml", "--output_dir", tmp_path / "run"]
    place = "flip_hf.runs.data:open_click_log_file"
    code, said = interrupted(place, "finetune.py", arguments, signal.SIGTERM, tmp_path / "cache")
    assert (code, said) == (143, "interrupted by SIGTERM\n")


def test_an_interrupt_of_the_demo_is_one_line(tmp_path):
    command = [sys.executable, "-u", str(EXAMPLES / "demo.py"), "--smoke", "--output-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        for line in process.stdout:
            if line.startswith("python "):
                # As a terminal does, to the demo and to the script that it has just started.
                os.killpg(process.pid, signal.SIGINT)
                break
        _, said = process.communicate(timeout=120)
    # A script that is starting already says itself how the demo ended it.
    assert process.returncode == 130
    assert said in ("interrupted by SIGINT\n", "interrupted by SIGTERM\n")


def test_progress_without_a_terminal_is_lines(workplace, tmp_path):
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / "run"), "--mode", "id"]
    command = [sys.executable, str(EXAMPLES / "finetune.py"), *arguments]
    # Rows that another test has encoded would not be encoded again.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    shown = subprocess.run(command, env=environment, check=True, **pipes).stdout
    assert b"\r" not in shown
    assert b"training: 100% 13/13 [" in shown
    assert b"Encoding: 100% 400/400 [" in shown
    assert len(shown.splitlines()) < 20
