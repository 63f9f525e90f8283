"""Helpers of the benchmarks: runs of the example scripts, and tables."""

import platform
import statistics
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY / "examples" / "experiments"))

from jobs import Job, flags, run_jobs  # noqa: E402
from markdown_tables import markdown  # noqa: E402

__all__ = [
    "REPOSITORY",
    "Job",
    "PeakMemory",
    "example",
    "flags",
    "machine",
    "markdown",
    "mean_and_deviation",
    "run_jobs",
]


def example(script: str, folder: Path, *flags: str) -> Job:
    """A job that runs `pretrain.py` or `finetune.py` with MovieLens-100K's configuration; it resumes a stopped run.

    A finished run is recognised by its folder, so other settings need another folder.
    """
    from flip_hf.fetch import minilm

    # The text encoder of the configuration.
    minilm()
    examples = REPOSITORY / "examples"
    config = examples / "configs" / "ml-100k" / f"{script}.yaml"
    always = ["--config", str(config), "--output_dir", str(folder), "--resume", "true"]
    return Job(folder / "run.json", [str(examples / f"{script}.py"), *always, *flags])


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, with four decimals."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def machine() -> str:
    """One line that describes the machine, to print below a table."""
    import torch

    from flip_hf.runs.device import describe_hardware

    facts = describe_hardware()
    where = ", ".join([*facts.get("accelerators", []), facts["processor"], f"{facts['cores']} cores"])
    return f"{where}, torch {torch.__version__}, Python {platform.python_version()}"


class PeakMemory:
    """Records the peak of the process's own memory.

    Mapped pages of files, such as the log's and the cache's, are not counted, because the system can reclaim them.
    """

    def __init__(self) -> None:
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            self._most = max(self._most, next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")))

    def stop(self) -> int:
        """The peak, in KiB."""
        self._ended.set()
        self._thread.join()
        return self._most
