"""Two runs never write to one folder."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from example_runs import EXAMPLES

from flip_hf.runs.locks import FolderInUseError, FolderLock

HOLDER = """
    import sys
    from pathlib import Path
    from flip_hf.runs.locks import FolderLock

    lock = FolderLock(Path(sys.argv[1]))
    lock.acquire()
    print("locked", flush=True)
    sys.stdin.read()
    lock.release()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path / "run"` until its input ends."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_locked_folder_is_refused_with_its_owner(tmp_path, holder):
    owner = json.loads((tmp_path / "run" / ".lock.json").read_text())
    assert (owner["process"], owner["host"]) == (holder.pid, socket.gethostname())
    message = rf"run is in use by another run: process {holder.pid} on \S+, since {owner['since'][:10]}T.*output_dir"
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(FolderInUseError, match=message):
        lock.acquire()
    holder.communicate("")
    assert not (tmp_path / "run").exists(), "nothing but the lock was in it"
    lock.acquire()
    lock.release()


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    assert json.loads((tmp_path / "run" / ".lock.json").read_text())["process"] == os.getpid()
    (tmp_path / "run" / "log.jsonl").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_one_process_may_lock_again_but_not_in_another_thread(tmp_path):
    first, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    first.acquire()
    second.acquire()
    found = []

    def in_thread():
        with pytest.raises(FolderInUseError):
            FolderLock(tmp_path / "run").acquire()
        found.append(True)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert found == [True]
    second.release()
    assert (tmp_path / "run" / ".lock").exists()
    first.release()
    assert not (tmp_path / "run").exists()


def test_a_forked_process_does_not_unlock_its_parents_folder(tmp_path):
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "run")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert f"in use by another run: process {os.getpid()}" in done.stderr
    lock.release()


@pytest.mark.parametrize(("number", "is_fatal"), [(errno.ENOSYS, False), (errno.ENOLCK, False), (errno.EIO, True)])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, number, is_fatal):
    import fcntl

    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(tmp_path / "run")
    if is_fatal:
        with pytest.raises(OSError, match=os.strerror(number)):
            lock.acquire()
        return
    lock.acquire()
    assert "on a file system without locks: make sure that no other run uses this folder" in caplog.text
    lock.release()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_second_run_in_a_folder_ends_at_once(workplace, tmp_path, holder, processes):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    (tmp_path / "run" / "log.jsonl").write_text("the first run's\n")
    arguments = ["--config", str(workplace / "config.yaml"), "--output_dir", str(tmp_path / "run")]
    command = [*launch, str(EXAMPLES / "finetune.py"), *arguments, "--mode", "id"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"run is in use by another run: process {holder.pid} on {socket.gethostname()}" in errors[0]
    assert (tmp_path / "run" / "log.jsonl").read_text() == "the first run's\n"
    if processes == 1:
        assert done.stderr.splitlines() == errors
    assert Path(tmp_path / "run" / ".lock").exists()
