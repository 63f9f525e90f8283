"""Programs that run in several real processes, started through torchrun over gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture
def torchrun(tmp_path):
    """Runs one of `programs/` in so many processes and returns what its process 0 reported.

    Each program makes sure that there are as many processes as it was told.
    """

    def run(name, processes, **arguments):
        report = tmp_path / f"{name}-{processes}.json"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [
            str(PROGRAMS / f"{name}.py"),
            json.dumps({"processes": processes, "report": str(report)} | arguments),
        ]
        # Processes that wait for each other wait for ever.
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr[-9000:]
        return json.loads(report.read_text())

    return run


@pytest.fixture(scope="session")
def click_log(tmp_path_factory, wordpiece, click_rows, field_names):
    """A folder with a fitted processor and 300 encoded rows."""
    from flip_hf import FlipProcessor

    folder = tmp_path_factory.mktemp("click_log")
    processor = FlipProcessor.fit(click_rows, field_names, wordpiece, label="label")
    processor.save_pretrained(folder)
    (folder / "rows.json").write_text(json.dumps(click_rows))
    return folder
