"""The command `flip-hf`: what it offers, and that it does what the scripts do."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState, GradientState

from flip_hf import cli
from flip_hf.runs import commands, parsing


@pytest.fixture(autouse=True)
def _accelerate():
    """What accelerate keeps for the life of a process ends with each test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_help_names_every_command(capsys):
    cli.main([])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: flip-hf COMMAND ...\n")
    for name, command in cli.COMMANDS.items():
        assert f"  {name:<10}{command.summary}\n" in shown


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if command.settings is not None])
def test_help_of_a_command_shows_how_to_call_it(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert shown.startswith(f"usage: flip-hf {name} [--config FILE.yaml] [--SETTING VALUE ...]\n")
    assert f"\nflip-hf {name} {cli.COMMANDS[name].example}\n" in shown


def test_it_fetches_by_name_and_says_where_it_lies(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(commands.FETCHABLE, "minilm", lambda: tmp_path)
    cli.main(["fetch", "minilm"])
    assert capsys.readouterr().out == f"{tmp_path}\n"
    cli.main(["fetch", "--help"])
    assert capsys.readouterr().out.startswith("usage: flip-hf fetch NAME\n")
    with pytest.raises(ValueError, match="flip-hf fetch takes one name, such as flip-hf fetch minilm"):
        cli.main(["fetch"])
    with pytest.raises(ValueError, match=r"flip-hf fetch can't download 'minilmm' \(did you mean 'minilm'\?\)"):
        cli.main(["fetch", "minilmm"])


def test_an_unknown_command_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"flip-hf has no command 'predcit' \(did you mean 'predict'\?\)"):
        cli.main(["predcit"])


def test_the_command_line_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(parsing, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs jsonargparse: pip install 'flip_hf\[train\]'"):
        cli.main(["predict", "--help"])


def test_it_scores_a_file(ctr_folder, click_rows, tmp_path, capsys):
    rows = {name: values for name, values in click_rows.items() if name != "label"}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    output = tmp_path / "scores.jsonl"
    cli.main(
        ["predict", "--model", str(ctr_folder), "--input", str(tmp_path / "rows.parquet"), "--output", str(output)]
    )
    assert capsys.readouterr().out.startswith(f"scored {len(click_rows['label'])} rows of")
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["row"] for row in scored] == list(range(len(click_rows["label"])))


def test_it_runs_as_a_module_and_ends_with_one_line(tmp_path):
    command = [sys.executable, "-m", "flip_hf.cli", "evaluate", "--model", str(tmp_path / "nothing")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(sys.prefix))
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"error: model={tmp_path / 'nothing'}")
