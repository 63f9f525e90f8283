"""Locks that allow only one run at a time in a folder."""

import errno
import json
import logging
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from flip_hf.standard_json import settings_json

_LOCK, _OWNER = ".lock", ".lock.json"
# Error numbers of file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


class FolderInUseError(OSError):
    """Another run is using the folder."""


class FolderLock:
    """A lock on a run's folder, held from `acquire` until `release` or until the process ends in any way.

    It is an operating-system lock on the file `.lock`; `.lock.json` describes the owner. One process may acquire it
    several times.

    Args:
        folder: folder to lock; `acquire` creates it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = os.getpid()
        self._lock = FileLock(folder / _LOCK, timeout=0, is_singleton=True, fallback_to_soft=False)

    def acquire(self) -> None:
        """Locks the folder, or warns that its file system has no locks.

        Raises:
            FolderInUseError: another process holds the lock; names its host, its process id and its start time.
            OSError: the folder is not writable.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise FolderInUseError(
                f"{self.folder} is in use by another run{self._owner()}. Wait until it ends, stop it, or choose "
                "another output_dir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s is on a file system without locks: make sure that no other run uses this folder", self.folder
            )
            return
        owner = {
            "host": socket.gethostname(),
            "process": self._process,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (self.folder / _OWNER).write_text(settings_json(owner) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Unlocks the folder, deletes the lock's files, and deletes the folder if it is then empty."""
        # A forked process shares the open file, so unlocking in the child would also unlock the parent.
        if not self._lock.is_locked or os.getpid() != self._process:
            return
        if self._lock.lock_counter == 1:
            for name in (_OWNER, _LOCK):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        self._lock.release()

    def _owner(self) -> str:
        try:
            owner = json.loads((self.folder / _OWNER).read_text(encoding="utf-8"))
            return f": process {owner['process']} on {owner['host']}, since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            # The owner has locked the folder but has not written this file yet.
            return ""


def lock_in_main_process(lock: FolderLock, state: PartialState) -> None:
    """Acquires a lock in the main process; the other processes wait for it, and exit if it fails.

    Every process must call this.

    Args:
        lock: the lock.
        state: the state of this process, which knows whether it is the main process.

    Raises:
        OSError: in the main process, as in `FolderLock.acquire`.
        SystemExit: in the other processes, if the main process could not lock the folder.
    """
    failed: list[Exception | None] = [None]
    if state.is_main_process:
        try:
            lock.acquire()
        except OSError as error:
            failed = [error]
    is_locked = broadcast_object_list([failed[0] is None])[0]
    if failed[0] is not None:
        raise failed[0]
    if not is_locked:
        raise SystemExit(1)
