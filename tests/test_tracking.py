"""Trackers get what the log gets, and the curves show it."""

import json
import logging
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flip_hf.runs import curves, tracking
from flip_hf.runs.run import Run
from flip_hf.runs.settings import FinetuneSettings
from flip_hf.runs.tracking import make_trackers, trackable
from flip_hf.training import meter
from flip_hf.training.settings import TrainingSettings

LINES = [
    ("train", {"step": 10, "epoch": 0, "loss": 2.0, "gradient_norm": 0.5, "learning_rate": 1e-3, "memory_gib": 1.0}),
    ("train", {"step": 20, "epoch": 0, "loss": 1.0, "gradient_norm": 0.4, "learning_rate": 5e-4, "memory_gib": 1.0}),
    ("validation", {"step": 20, "epoch": 0, "loss": 1.5, "auc": 0.7, "logloss": 0.5}),
    ("validation", {"step": 30, "epoch": 0, "loss": 1.2, "auc": 0.8, "logloss": 0.4}),
    ("test", {"auc": 0.6, "logloss": 0.6}),
]


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    """What accelerate keeps for the life of a process ends with each test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def finished(folder, trackers):
    started = Run(FinetuneSettings(output_dir=folder, training=TrainingSettings(precision="fp32", report_to=trackers)))
    for event, values in LINES:
        started.log(event, values)
    started.finish()


STANDING_IN = """
import json

class Run:
    def __init__(self, **settings):
        self.lines = [settings]

    def log(self, values, step=None):
        self.lines.append([step, values])

    def finish(self):
        with open({file!r}, "w") as file:
            json.dump(self.lines, file)

def init(**settings):
    return Run(**settings)
"""


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_by_name_gets_settings_and_numbers_and_no_secret(name, tmp_path, monkeypatch):
    found = tmp_path / "found.json"
    (tmp_path / f"{name}.py").write_text(STANDING_IN.format(file=str(found)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a-key-that-nobody-may-see")
    monkeypatch.setenv("HF_TOKEN", "a-key-that-nobody-may-see")
    finished(tmp_path / "runs" / "third", [name])
    settings, *logged = json.loads(found.read_text())
    assert (settings["project"], settings["name"]) == ("flip_hf", "third")
    assert settings["config"]["training"]["learning_rate"] == 1e-3
    assert [step for step, _ in logged] == [10, 20, 20, 30, 30]
    assert logged[0][1] == {f"train/{k}": v for k, v in LINES[0][1].items() if k != "step"}
    assert logged[4][1] == {"test/auc": 0.6, "test/logloss": 0.6}
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"nobody-may-see" not in path.read_bytes(), path


def test_tensorboard_is_the_default_where_it_is_installed(tmp_path, monkeypatch):
    assert [tracker.name for tracker in make_trackers(None, tmp_path, {})] == ["tensorboard"]
    assert make_trackers([], tmp_path, {}) == []
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    assert make_trackers(None, tmp_path, {}) == []
    with pytest.raises(ValueError, match="'tensorboard' is not installed; run pip install tensorboard"):
        make_trackers(["tensorboard"], tmp_path, {})
    with pytest.raises(ValueError, match="'mlflow' is not one of tensorboard, trackio, wandb"):
        make_trackers(["mlflow"], tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_run_replaces_the_log_that_lies_there(tmp_path):
    for _ in range(2):
        finished(tmp_path, None)
        AcceleratorState._reset_state(reset_partial_state=True)
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in shown.Scalars("train/loss")] == [(10, 2.0), (20, 1.0)]
    assert [point.step for point in shown.Scalars("test/auc")] == [30]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(LINES)


def test_only_numbers_are_tracked():
    line = {"step": 3, "loss": 1.5, "epoch": 0, "stopped": True, "why": "done", "best": None, "rows": [1, 2]}
    assert trackable("train", line) == {"train/loss": 1.5, "train/epoch": 0}


def test_device_memory_is_told_where_there_is_a_device(monkeypatch):
    on_cpu = meter.memory_in_use(torch.device("cpu"))
    assert set(on_cpu) == {"memory_gib"}
    assert 0.05 < on_cpu["memory_gib"] < 100
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert meter.memory_in_use(torch.device("cuda"))["device_peak_memory_gib"] == 1.5


def test_curves_leave_out_metrics_without_a_value(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"event": "validation", "step": 1, "auc": null, "logloss": 0.5}\n'
        '{"event": "validation", "step": 2, "auc": 0.75, "logloss": null}\n'
    )
    found = curves.read_curves(log)["validation"]
    assert (found["auc"], found["logloss"]) == (([2], [0.75]), ([1], [0.5]))
    assert curves.draw_curves(curves.read_curves(log), "title", tmp_path / "curves.png")


def test_curves_show_the_log(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    finished(tmp_path, [])
    panels = {
        axes.get_title(): {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in drawn[0].axes
    }
    assert panels == {
        "loss": {"loss": ([10, 20], [2.0, 1.0]), "_loss": ([20, 30], [1.5, 1.2])},
        "AUC": {"auc": ([20, 30], [0.7, 0.8])},
        "LogLoss": {"logloss": ([20, 30], [0.5, 0.4])},
        "gradient norm": {"gradient_norm": ([10, 20], [0.5, 0.4])},
        "learning rate": {"learning_rate": ([10, 20], [1e-3, 5e-4])},
        "memory (GiB)": {"memory_gib": ([10, 20], [1.0, 1.0])},
    }
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_run_ends_as_well(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        finished(tmp_path, [])
    assert "matplotlib is not installed" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "run.json"}
