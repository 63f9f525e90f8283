"""The files of results/ keep what was recorded, bit for bit, whenever the program that writes them is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from recorded import add_line, add_scores, load_scores, read_lines

FOLDER = Path(__file__).parents[1] / "examples" / "experiments"


def test_what_a_killed_program_left_of_a_line_is_passed_over(tmp_path):
    path = tmp_path / "records.jsonl"
    add_line(path, {"a": 1})
    path.write_text(path.read_text() + '{"b": ')
    assert read_lines(path) == [{"a": 1}]
    add_line(path, {"c": 3})
    assert read_lines(path) == [{"a": 1}, {"c": 3}]


def test_scores_are_kept_bit_for_bit(tmp_path):
    every_number = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    add_scores(tmp_path / "scores" / "one.parquet", "first", every_number)
    add_scores(tmp_path / "scores" / "one.parquet", "second", np.array([0.1, 70.03], np.float32))
    add_scores(tmp_path / "scores" / "two.parquet", "third", np.zeros(0, np.float32))
    found = load_scores(tmp_path / "scores", "first")
    assert (found.dtype, found.tobytes()) == (np.float16, every_number.tobytes())
    assert load_scores(tmp_path / "scores", "second").tolist() == [np.float16(0.1), np.float16(70.03)]
    assert load_scores(tmp_path / "scores", "third").shape == (0,)
    with pytest.raises(ValueError, match="has no scores of the run fourth"):
        load_scores(tmp_path / "scores", "fourth")


def test_scores_of_a_run_that_is_recorded_again_replace_the_old_ones(tmp_path):
    for key, value in (("first", 1.0), ("second", 2.0), ("first", 3.0)):
        add_scores(tmp_path / "one.parquet", key, np.array([value]))
    assert pq.read_table(tmp_path / "one.parquet").to_pylist() == [
        {"key": "second", "logits": [2.0]},
        {"key": "first", "logits": [3.0]},
    ]


def test_a_program_that_is_killed_while_it_writes_scores_loses_none(tmp_path):
    path = tmp_path / "one.parquet"
    add_scores(path, "first", np.array([1.0, 2.0]))
    before = path.read_bytes()
    program = f"""
import os, signal
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq
import recorded

def write_half(table, target, **options):
    Path(target).write_bytes({before!r}[:100])
    os.kill(os.getpid(), signal.SIGKILL)

pq.write_table = write_half
recorded.add_scores(Path({str(path)!r}), "second", np.array([3.0]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [FOLDER, FOLDER.parents[1]]))}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == before
    assert load_scores(tmp_path, "first").tolist() == [1.0, 2.0]
    add_scores(path, "second", np.array([3.0]))
    assert [load_scores(tmp_path, key).tolist() for key in ("first", "second")] == [[1.0, 2.0], [3.0]]
    assert list(tmp_path.iterdir()) == [path]
