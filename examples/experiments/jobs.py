"""Training runs, several at a time: what is finished is never run again; and tables of what they found."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip_hf.standard_json import settings_json


@dataclass(frozen=True)
class Job:
    """A command and the JSON file that it leaves when it is done.

    Attributes:
        result: the file; a job whose file is there is done.
        command: the Python program and its arguments.
    """

    result: Path
    command: Sequence[str]

    def read(self) -> dict[str, Any]:
        """What the finished job left."""
        record: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return record


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as command-line flags."""
    return [part for name, value in settings.items() for part in (f"--{name}", _flag(value))]


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else settings_json(value)


def run_jobs(jobs: Iterable[Job], processes: int, when_done: Callable[[Job], object] | None = None) -> None:
    """Runs what is not done yet, `processes` at a time, each with its share of the cores; output goes to `.log` files.

    `when_done` is called with each job as soon as it is done, in this process; with those that were done before, first.
    Environment variables that say how many threads a run has stay set: one number of `processes` a program. Should this
    process die or be interrupted, the jobs are told to end, too.

    Raises:
        RuntimeError: a job failed; names its log. The others go on first, but where one was killed from outside: that
            ends all that have not ended.
    """
    when_done = when_done or (lambda job: None)
    waiting = []
    for job in jobs:
        if job.result.exists():
            when_done(job)
        else:
            waiting.append(job)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    # Read when the server of new processes starts; it imports once what every run would import.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    # Torch asks for large pages: a CPU spends less time on laying out memory anew (benchmarks/allocators.py).
    os.environ |= {"THP_MEM_ALLOC_ENABLE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flip_hf.modeling_flip", "flip_hf.training.loop", "flip_hf.runs.data"])
    with (
        ProcessPoolExecutor(processes, context, _end_with_parent, max_tasks_per_child=1) as pool,
        _ending_when_interrupted(pool),
    ):
        ends = {pool.submit(_run, job): job for job in waiting}
        failed = []
        for end in as_completed(ends):
            if (log := _log_of_failed(ends[end], end)) is None:
                when_done(ends[end])
            else:
                failed.append(log)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(waiting)} jobs failed; see {', '.join(map(str, failed))}")


@contextlib.contextmanager
def _ending_when_interrupted(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Tells the pool's processes to end (SIGTERM) if this one is interrupted, and waits until they have."""
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        told: set[int | None] = set()
        # One more may start for a job that the pool has already handed out.
        while children := multiprocessing.active_children():
            for child in children:
                if child.pid not in told:
                    told.add(child.pid)
                    child.terminate()
            multiprocessing.connection.wait([child.sentinel for child in children])
        raise


def _end_with_parent() -> None:
    """Has this process told to end (SIGTERM) when the one that hands out jobs has died.

    It would train on, and whoever starts the jobs again would have two processes write one folder.
    """
    # The terminal's Ctrl-C is for the program that hands out jobs, which passes it on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _log_of_failed(job: Job, end: Future[Path | None]) -> Path | None:
    try:
        return end.result()
    except BrokenProcessPool:
        return job.result.with_suffix(".log")


def _run(job: Job) -> Path | None:
    """Runs the job's program in this process; the log of a job that failed."""
    job.result.parent.mkdir(parents=True, exist_ok=True)
    log, started, error = job.result.with_suffix(".log"), time.monotonic(), ""
    shown = os.dup(1)
    with log.open("w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.argv = list(job.command)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                runpy.run_path(job.command[0], run_name="__main__")
        except SystemExit as ended:
            error = f", failed: exit code {ended.code}" if ended.code else ""
        except BaseException as raised:
            traceback.print_exc(file=output)
            error = f", failed: {type(raised).__name__}: {raised}"[:200]
    if not error and not job.result.exists():
        error = f", failed: it ended without {job.result.name}"
    os.write(shown, f"{job.result.parent.name}: {time.monotonic() - started:.0f} s{error}\n".encode())
    return log if error else None


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
