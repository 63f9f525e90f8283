"""Signals end a script with one line, wherever it is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_runs import EXAMPLES
from interrupting import interrupted
from waiting import PATIENCE

from flip_hf.runs.script import Interrupted, run_program

SECONDS = 120
EXPERIMENTS = Path(__file__).parents[1] / "examples" / "experiments"


@pytest.fixture
def training(workplace, tmp_path):
    return ["--config", workplace / "config.yaml", "--output_dir", tmp_path / "run"]


@pytest.fixture
def scoring(workplace, ctr_folder, click_rows, tmp_path):
    pq.write_table(pa.table(click_rows), tmp_path / "rows.parquet")
    return ["--model", ctr_folder]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        pytest.param("flip_hf.runs.data:open_click_log_file", "SIGINT", marks=pytest.mark.slow),
        pytest.param("flip_hf.data.vocabulary:FeatureVocabulary.fit", "SIGTERM", marks=pytest.mark.slow),
        ("flip_hf:FlipProcessor.encode", "SIGHUP"),
    ],
)
def test_training_scripts_before_training(training, tmp_path, place, name):
    number = signal.Signals[name]
    script = "pretrain.py" if name == "SIGTERM" else "finetune.py"
    code, said = interrupted(place, script, training, number, tmp_path / "cache")
    assert (code, said) == (128 + number, f"interrupted by {name}\n")


def test_predict(scoring, tmp_path):
    arguments = [*scoring, "--input", tmp_path / "rows.parquet", "--output", tmp_path / "scores.parquet"]
    code, said = interrupted("flip_hf:FlipForCTR.forward", "predict.py", arguments, signal.SIGTERM, tmp_path / "cache")
    assert (code, said) == (143, "interrupted by SIGTERM\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"rows.parquet", "cache"}, "nothing half written stays"


@pytest.mark.slow
def test_evaluate(scoring, tmp_path):
    data = ["--data.test_file", tmp_path / "rows.parquet"]
    place, arguments = "flip_hf:FlipForCTR.forward", [*scoring, *data]
    code, said = interrupted(place, "evaluate_model.py", arguments, signal.SIGINT, tmp_path / "cache")
    *lines, last = said.splitlines()
    assert any(line.startswith("Encoding: 100% 300/300 [") for line in lines)
    assert (code, last) == (130, "interrupted by SIGINT")


# A stage of the demo: says its process id, then what the test asks for.
CHILD = """
import os, signal, sys
from flip_hf.runs.script import run_script

def main():
    if sys.argv[2] == "ends":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    signal.pause()

run_script(main) if sys.argv[2] == "speaks" else main()
"""
PARENT = """
import sys
from flip_hf.runs.script import run_program, run_script

run_script(lambda: run_program([sys.executable, *sys.argv[1:]]))
"""


@pytest.mark.parametrize("child", ["speaks", "ends", pytest.param("dies", marks=pytest.mark.slow)])
def test_a_program_that_a_script_runs_ends_with_it(tmp_path, child):
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "-c", PARENT, str(tmp_path / "child.py"), str(tmp_path / "pid"), child]
    # As a terminal does, to all processes of the group.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        pid = wait_for_pid(tmp_path / "pid")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
    expected = "interrupted by SIGTERM\n" if child == "speaks" else "interrupted by SIGINT\n"
    assert (process.returncode, said) == (130, expected)
    assert not psutil.pid_exists(pid)


def test_a_script_ends_when_accelerate_s_launcher_is_killed(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "accelerate").write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])")
    command = [
        sys.executable,
        str(tmp_path / "accelerate"),
        str(tmp_path / "child.py"),
        str(tmp_path / "pid"),
        "speaks",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_pid(tmp_path / "pid")
        process.terminate()
        # Until the script has closed it, too.
        said = process.stderr.read()
    assert said == "interrupted by SIGTERM\n"


def test_a_script_ends_with_the_program_that_fails(capfd):
    with pytest.raises(SystemExit) as end:
        run_program([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(75)"])
    assert (end.value.code, capfd.readouterr().err) == (75, "why\n")


def test_jobs_end_when_who_hands_them_out_is_interrupted(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    program = f"""
import sys
from pathlib import Path
sys.path.append({str(EXPERIMENTS)!r})
from jobs import Job, run_jobs
from flip_hf.runs.script import run_script

folder = Path({str(tmp_path)!r})
commands = [[str(folder / "child.py"), str(folder / f"pid{{i}}"), "dies"] for i in range(4)]
jobs = [Job(folder / str(i) / "run.json", command) for i, command in enumerate(commands)]
run_script(lambda: run_jobs(jobs, 3))
"""
    command = [sys.executable, "-c", program]
    paths = [str(EXAMPLES / "experiments"), str(EXAMPLES.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        pids = [wait_for_pid(tmp_path / f"pid{i}") for i in range(3)]
        children = psutil.Process(process.pid).children(recursive=True)
        assert set(pids) <= {child.pid for child in children}
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
    assert (process.returncode, said) == (130, "interrupted by SIGINT\n")
    assert psutil.wait_procs(children, timeout=SECONDS)[1] == []


def test_an_interrupt_is_a_keyboard_interrupt():
    error = Interrupted(signal.SIGTERM)
    assert isinstance(error, KeyboardInterrupt)
    assert (error.exit_code, str(error)) == (143, "interrupted by SIGTERM")


def wait_for_pid(path):
    end = time.monotonic() + SECONDS
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"no {path.name} within {SECONDS} s"
        time.sleep(0.05)
    return int(path.read_text())


@pytest.mark.parametrize("kills_child", [False, True], ids=["reaches the script", "reaches both"])
def test_a_signal_while_a_program_starts_ends_the_program(tmp_path, kills_child):
    started = tmp_path / "started"
    program = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(600)"
    script = f"""
import os, signal, subprocess, sys
from flip_hf.runs.script import run_program, run_script

real = subprocess.Popen

def start(*given, **named):
    process = real(*given, **named)
    print(process.pid, flush=True)
    if {kills_child}:
        os.kill(process.pid, signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGINT)
    return process

subprocess.Popen = start
run_script(lambda: run_program([sys.executable, "-c", {program!r}]))
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (130, "interrupted by SIGINT\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.stdout), 0)
