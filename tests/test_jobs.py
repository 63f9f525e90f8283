"""Jobs run in processes of their own: what is done is never run again, and the log of one that failed says why."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import Job, run_jobs
from waiting import PATIENCE, until

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from flip_hf.runs.script import run_script

def main():
    result, deed = Path(sys.argv[1]), sys.argv[2]
    print("says", deed)
    if deed == "raise":
        {}["row 7 of clicks.csv"]
    if deed == "wait":
        (result.parent / "pid").write_text(str(os.getpid()))
        time.sleep(3600)
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "finish":
        with (result.parent / "runs").open("a") as file:
            file.write("ran\\n")
        facts = {"threads": os.environ["OMP_NUM_THREADS"], "leads": os.getsid(0) == os.getpid()}
        result.write_text(json.dumps(facts))

run_script(main)
"""
FOLDER = Path(__file__).parents[1] / "examples" / "experiments"


@pytest.fixture
def job(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def make(name: str, deed: str) -> Job:
        result = tmp_path / name / "run.json"
        return Job(result, [str(program), str(result), deed])

    return make


def started_jobs(job: Job) -> subprocess.Popen:
    """A process that runs the job, once the job's program waits."""
    program = f"""
from pathlib import Path
from jobs import Job, run_jobs
run_jobs([Job(Path({str(job.result)!r}), {list(job.command)!r})], 1)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [FOLDER, FOLDER.parents[1]]))}
    runner = subprocess.Popen([sys.executable, "-c", program], env=environment)
    until(lambda: pid_file(job).exists() and pid_file(job).read_text())
    return runner


def pid_file(job: Job) -> Path:
    return job.result.parent / "pid"


def test_a_job_runs_once_and_is_told_of_each_time(job):
    jobs, told = [job("a", "finish"), job("b", "finish")], []
    for _ in range(2):
        run_jobs(jobs, 2, told.append)
    assert sorted(told, key=str) == sorted([*jobs, *jobs], key=str)
    for done in jobs:
        assert (done.result.parent / "runs").read_text() == "ran\n"
        facts = done.load_result()
        assert int(facts["threads"]) == max(1, len(os.sched_getaffinity(0)) // 2)
        assert facts["leads"], "a Ctrl-C in the terminal is for the process that runs jobs"
        assert json.loads(done.result.read_text()) == facts
        assert done.log.read_text() == "says finish\n"


def test_the_log_of_a_job_that_failed_says_why_and_the_others_go_on(job, capfd):
    failed, silent, others = job("failed", "raise"), job("silent", "nothing"), [job(f"{i}", "finish") for i in range(2)]
    told: list[Job] = []
    with pytest.raises(RuntimeError, match=r"2 of 4 jobs failed; see .*run\.log") as raised:
        run_jobs([failed, silent, *others], 1, told.append)
    assert str(Path("failed", "run.log")) in str(raised.value)
    assert str(Path("silent", "run.log")) in str(raised.value)
    assert told == others
    said = failed.log.read_text()
    assert said.startswith("says raise\nTraceback")
    assert said.endswith("KeyError: 'row 7 of clicks.csv'\n")
    assert silent.log.read_text() == "says nothing\n"
    assert "silent: " in (shown := capfd.readouterr().out)
    assert "s, failed: it ended without run.json\n" in shown
    assert "s, failed: exit code 1\n" in shown


def test_a_job_that_was_killed_is_named(job):
    killed = job("killed", "die")
    with pytest.raises(RuntimeError, match=r"1 of 1 jobs failed; see .*killed"):
        run_jobs([killed], 1)
    assert not killed.result.exists()


def test_jobs_end_when_who_hands_them_out_is_killed(job):
    waiting = job("waiting", "wait")
    runner = started_jobs(waiting)
    pid = int(pid_file(waiting).read_text())
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    until(lambda: not is_alive(pid))
    assert waiting.log.read_text() == "says wait\ninterrupted by SIGTERM\n"


def test_a_program_whose_launcher_died_while_it_started_ends(job):
    waiting = job("waiting", "wait")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = {**os.environ, "FLIP_HF_LAUNCHER": str(gone.pid)}
    waiting.result.parent.mkdir()
    ended = subprocess.run(
        [sys.executable, *waiting.command], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, ended.stderr) == (143, "interrupted by SIGTERM\n")


def test_programs_of_a_job_do_not_take_the_job_for_their_launcher(tmp_path):
    script = "import os; from flip_hf.runs.script import run_script; run_script(lambda: print(dict(os.environ)))"
    environment = {**os.environ, "FLIP_HF_LAUNCHER": str(os.getpid())}
    shown = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "FLIP_HF_LAUNCHER" not in shown.stdout


def test_an_error_of_when_done_ends_the_others(job):
    done, waiting, never = (
        job("done", "finish"),
        [job(name, "wait") for name in ("first", "second")],
        job("never", "nothing"),
    )

    def refuse(_):
        until(lambda: all(pid_file(each).exists() and pid_file(each).read_text() for each in waiting))
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run_jobs([waiting[0], done, waiting[1], never], 2, refuse)
    assert not any(is_alive(int(pid_file(each).read_text())) for each in waiting)
    assert not never.log.exists()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Whoever ended and was not yet asked for its exit code is a zombie.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
