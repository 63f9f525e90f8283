"""Jobs run in processes of their own: what is done is never run again, and the log of one that failed says why."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import Job, run_jobs
from waiting import until

PROGRAM = """
import json, os, sys, time
from pathlib import Path

result, deed = Path(sys.argv[1]), sys.argv[2]
print("says", deed)
if deed == "raise":
    raise ValueError("row 7 of clicks.csv")
if deed == "wait":
    (result.parent / "pid").write_text(str(os.getpid()))
    time.sleep(3600)
if deed == "die":
    os._exit(9)
if deed == "finish":
    with (result.parent / "runs").open("a") as file:
        file.write("ran\\n")
    result.write_text(json.dumps({"threads": os.environ["OMP_NUM_THREADS"]}))
"""


@pytest.fixture
def job(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def make(name: str, deed: str) -> Job:
        result = tmp_path / name / "run.json"
        return Job(result, [str(program), str(result), deed])

    return make


def log_of(job: Job) -> str:
    return job.result.with_suffix(".log").read_text()


def test_a_job_runs_once_and_is_told_of_each_time(job):
    jobs, told = [job("a", "finish"), job("b", "finish")], []
    for _ in range(2):
        run_jobs(jobs, 2, told.append)
    assert sorted(told, key=str) == sorted([*jobs, *jobs], key=str)
    for done in jobs:
        assert (done.result.parent / "runs").read_text() == "ran\n"
        assert int(done.read()["threads"]) >= 1
        assert json.loads(done.result.read_text()) == done.read()
        assert log_of(done) == "says finish\n"


def test_the_log_of_a_job_that_failed_says_why_and_the_others_go_on(job):
    failed, silent, others = job("failed", "raise"), job("silent", "nothing"), [job(f"{i}", "finish") for i in range(2)]
    told: list[Job] = []
    with pytest.raises(RuntimeError, match=r"2 of 4 jobs failed; see .*run\.log") as raised:
        run_jobs([failed, silent, *others], 1, told.append)
    assert str(Path("failed", "run.log")) in str(raised.value)
    assert str(Path("silent", "run.log")) in str(raised.value)
    assert told == others
    assert "Traceback" in log_of(failed)
    assert log_of(failed).endswith("ValueError: row 7 of clicks.csv\n")


def test_a_job_that_was_killed_is_named(job):
    killed = job("killed", "die")
    with pytest.raises(RuntimeError, match=r"1 of 1 jobs failed; see .*killed"):
        run_jobs([killed], 1)
    assert not killed.result.exists()


def test_jobs_end_when_who_hands_them_out_is_killed(job):
    waiting = job("waiting", "wait")
    program = f"""
from pathlib import Path
from jobs import Job, run_jobs
run_jobs([Job(Path({str(waiting.result)!r}), {list(waiting.command)!r})], 1)
"""
    runner = subprocess.Popen([sys.executable, "-c", program])
    pid_file = waiting.result.parent / "pid"
    until(lambda: pid_file.exists() and pid_file.read_text())
    pid = int(pid_file.read_text())
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    until(lambda: not is_alive(pid))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Whoever ended and was not yet asked for its exit code is a zombie.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
