"""Progress is a bar on a terminal, and lines elsewhere."""

import io
import sys

import datasets
import tqdm.auto

from flip_hf import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress.progress_bar(range(3), desc="training")
    assert type(bar) is tqdm.auto.tqdm
    assert list(bar) == [0, 1, 2]
    assert sys.stderr.getvalue().startswith("\rtraining:   0%|")


def test_lines_come_by_time_and_at_the_end(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", float("inf"))
    bar = progress.progress_bar(total=4, desc="training", unit="step", initial=1)
    with bar:
        bar.update()
        assert sys.stderr.getvalue() == ""
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        bar.set_postfix({"loss": "0.5"})
        shown = sys.stderr.getvalue()
        assert shown.startswith("training:  50% 2/4 [")
        assert shown.endswith(", loss=0.5]\n")
        assert shown.count("\n") == 1
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", float("inf"))
        bar.update(2)
        bar.write("a line of its own", file=sys.stderr)
    lines = sys.stderr.getvalue().splitlines()
    assert lines[1] == "a line of its own"
    assert lines[2].startswith("training: 100% 4/4 [")
    assert len(lines) == 3
    assert "\r" not in sys.stderr.getvalue()
    bar.close()
    assert len(sys.stderr.getvalue().splitlines()) == 3


def test_a_bar_that_is_removed_says_nothing_unless_it_lasts(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", float("inf"))
    assert list(progress.progress_bar(range(3), desc="validation", leave=False)) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""
    assert list(progress.progress_bar(range(3), desc="validation", disable=True)) == [0, 1, 2]
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.progress_bar(total=3, desc="validation", leave=False) as bar:
        bar.n = 3
    assert sys.stderr.getvalue().startswith("validation: 100% 3/3 [")


def test_bars_of_datasets_become_lines_in_a_script(monkeypatch):
    for name in ("display", "clear", "close"):
        # Restored afterwards.
        monkeypatch.setattr(datasets.utils.tqdm, name, getattr(datasets.utils.tqdm, name))
    rows = datasets.Dataset.from_dict({"a": [1, 2]})
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress.use_lines_without_terminal()
    rows.map(lambda row: row, desc="Reading")
    assert "\rReading: " in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress.use_lines_without_terminal()
    rows.map(lambda row: {"b": row["a"]}, desc="Reading")
    assert sys.stderr.getvalue().startswith("Reading: 100% 2/2 [")
    assert "\r" not in sys.stderr.getvalue()
