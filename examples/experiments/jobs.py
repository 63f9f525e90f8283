"""Runs jobs, several at a time, each in a process of its own. A job whose result exists is not run again."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip_hf.runs.script import environment_of_child
from flip_hf.standard_json import settings_json


@dataclass(frozen=True)
class Job:
    """A Python program that writes a JSON file when it is done.

    Attributes:
        result: the JSON file. The job is done if it exists.
        command: the program and its arguments. If it uses `run_script`, it ends when the process that runs jobs dies.
    """

    result: Path
    command: Sequence[str]

    @property
    def log(self) -> Path:
        """The file that holds the program's standard output and standard error."""
        return self.result.with_suffix(".log")

    def load_result(self) -> dict[str, Any]:
        """The content of the JSON file of a finished job."""
        content: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return content


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as command-line flags."""
    return [part for name, value in settings.items() for part in (f"--{name}", _flag(value))]


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else settings_json(value)


def run_jobs(jobs: Iterable[Job], processes: int, when_done: Callable[[Job], object] = lambda job: None) -> None:
    """Runs the jobs that are not done, `processes` at a time. Each gets an equal share of the cores.

    If this process is interrupted, it sends SIGTERM to the running programs and waits for them. It does the same if
    `when_done` raises an error.

    Args:
        jobs: the jobs; they start in this order.
        processes: how many run at a time.
        when_done: is called in this thread with each job as soon as it is done. Jobs that were done before come first.

    Raises:
        RuntimeError: jobs failed; the message names their logs. The other jobs were run.
    """
    waiting = []
    for job in jobs:
        if job.result.exists():
            when_done(job)
        else:
            waiting.append(job)
    programs = _Programs(max(1, len(os.sched_getaffinity(0)) // processes))
    failed = []
    with ThreadPoolExecutor(processes) as pool:
        try:
            job_of = {pool.submit(programs.run, job): job for job in waiting}
            for end in as_completed(job_of):
                job = job_of[end]
                if end.result():
                    when_done(job)
                else:
                    failed.append(job)
        except BaseException:
            programs.end()
            raise
    if failed:
        logs = ", ".join(str(job.log) for job in failed)
        raise RuntimeError(f"{len(failed)} of {len(waiting)} jobs failed; see {logs}")


class _Programs:
    """Starts the jobs' programs from several threads. After `end` none starts.

    Args:
        threads: how many threads a program may use.
    """

    def __init__(self, threads: int) -> None:
        self._environment = {
            **environment_of_child(),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            # Torch asks for large pages: a CPU spends less time on laying out memory anew (benchmarks/allocators.py).
            "THP_MEM_ALLOC_ENABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
        }
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen[bytes]] = []
        self._is_ending = False

    def run(self, job: Job) -> bool:
        """Runs a job's program to its end, and prints how long it took. Returns whether the job is done."""
        started = time.monotonic()
        # `end` must find every program that was started.
        with self._lock:
            if self._is_ending:
                return False
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("wb") as log:
                # The program is one of this repository. In a session of its own it gets no Ctrl-C from the terminal.
                process = subprocess.Popen(  # nosec B603
                    [sys.executable, *job.command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
            self._started.append(process)
        code = process.wait()
        failure = ""
        if code:
            failure = f", failed: exit code {code}"
        elif not job.result.exists():
            failure = f", failed: it ended without {job.result.name}"
        print(f"{job.result.parent.name}: {time.monotonic() - started:.0f} s{failure}", flush=True)
        return not failure

    def end(self) -> None:
        """Sends SIGTERM to the programs that run."""
        with self._lock:
            self._is_ending = True
            for process in self._started:
                process.terminate()
