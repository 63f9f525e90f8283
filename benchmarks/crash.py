"""Kills a pretraining run many times, and counts the cost: lost steps, repeated rows, bits that differ.

    python benchmarks/crash.py --kills 50

The run pretrains both towers on MovieLens-100K rows, with masks and dropout. Its text encoder is tiny, so that a kill
costs only seconds. Runs are forked from a process that has imported everything; otherwise most kills would hit an
import.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from shared import REPOSITORY, machine, markdown
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging as transformers_logging

from flip_hf.fetch import minilm
from flip_hf.runs.run import MEASURED
from flip_hf.standard_json import settings_json
from flip_hf.training import loop
from flip_hf.training.checkpoints import Checkpoints

ROWS, INTERVAL = 2048, 5
LONGEST_SECONDS = 300
FLAGS = {
    "data.source": "movielens-100k",
    "data.max_train_rows": ROWS,
    "data.max_validation_rows": 256,
    "training.num_train_epochs": 2,
    "training.per_device_train_batch_size": 64,
    "training.evaluations_per_epoch": 3,
    "training.patience": 100,
    "training.logging_steps": 1,
    "training.save_steps": INTERVAL,
    "training.precision": "fp32",
}


class Attempt:
    """A run in forked processes, which continues where the previous run in its folder stopped.

    Args:
        folder: folder of the run.
        encoder: folder of the text encoder.
        flags: further flags.
        processes: number of processes that train together.
    """

    def __init__(self, folder: Path, encoder: Path, flags: Sequence[str] = (), processes: int = 1) -> None:
        arguments = [part for name, value in FLAGS.items() for part in (f"--{name}", str(value))]
        arguments += ["--output_dir", str(folder), "--model.text_encoder", str(encoder), "--resume", "true", *flags]
        self.folder = folder
        self.first_step = last_checkpoint(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = [self._fork(arguments, rank, processes, port) for rank in range(processes)]
        self.codes: list[int] = []

    def _fork(self, arguments: list[str], rank: int, processes: int, port: int) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            # A new lock, because a killed process would keep the lock that it shares with later forks.
            tqdm.set_lock(threading.RLock())
            if processes > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            output = os.open(self.folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            note_rows(self.folder.with_suffix(f".rows-{rank}"), processes)
            pretrain_main()(arguments)
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds or the run ends; raises TimeoutError if the run hangs."""
        until = time.monotonic() + LONGEST_SECONDS
        while not self.has_ended() and not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"{self.folder.with_suffix('.out')}: no progress for {LONGEST_SECONDS} s")
            time.sleep(0.001)

    def let_run(self, seconds: float) -> None:
        """Waits for some seconds, or until the run ends."""
        until = time.monotonic() + seconds
        self.wait_for(lambda: time.monotonic() > until)

    def has_ended(self) -> bool:
        """Whether a process has ended. `codes` holds its exit code, or minus the signal that ended it."""
        if not self.codes:
            pid, status = os.waitpid(self.pids[0], os.WNOHANG)
            if pid:
                self.codes.append(os.waitstatus_to_exitcode(status))
        return bool(self.codes)

    def end(self, number: int | None = None) -> int:
        """Sends a signal, if given, to every process, waits for all of them, and returns the first one's exit code."""
        if number is not None:
            for pid in self.pids[len(self.codes) :]:
                os.kill(pid, number)
        self.wait_for(lambda: False)
        for pid in self.pids[len(self.codes) :]:
            self.codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return self.codes[0]

    def has_stepped(self) -> bool:
        """Whether the run has taken a step of its own, if the previous one stopped at a checkpoint."""
        return last_step(self.folder) > self.first_step


def note_rows(path: Path, processes: int) -> None:
    """Makes the training loop record the rows that it trains on."""
    real = loop._step

    def step(model: Any, optimizer: Any, window: Any, settings: Any, run: Any, number: int) -> dict[str, float]:
        assert run.accelerator.num_processes == processes
        values = real(model, optimizer, window, settings, run, number)
        rows = torch.cat([numbers for numbers, _ in window]).tolist()
        with path.open("a", encoding="utf-8") as file:
            file.write(settings_json({"step": number, "rows": rows}) + "\n")
        return values

    loop._step = step  # type: ignore[assignment]


def pretrain_main() -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location("pretrain", REPOSITORY / "examples" / "pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], None] = module.main
    return main


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON Lines file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def last_step(folder: Path) -> int:
    return max((line["step"] for line in read_lines(folder / "log.jsonl")), default=0)


def last_checkpoint(folder: Path) -> int:
    checkpoint = Checkpoints(folder / "checkpoints", 1).last()
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def outcome(folder: Path) -> str:
    """A hash of the best model's weights and of the log without times."""
    digest = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes())
    for line in read_lines(folder / "log.jsonl"):
        kept = {name: value for name, value in line.items() if name not in MEASURED}
        digest.update(settings_json(kept).encode())
    return digest.hexdigest()


def kill(scratch: Path, encoder: Path, kills: int, expected: str, seconds: float, draw: random.Random) -> list[Any]:
    """Kills with `kill -9`, every other time during a write, and restarts runs until the number of kills is reached."""
    counts: Counter[str] = Counter()
    losses, finished, same = [], 0, 0

    def is_writing() -> bool:
        return any(folder.glob("**/*.new")) or any(folder.glob("**/*.old"))

    while counts["kills"] < kills:
        folder = scratch / f"killed-{finished}"
        while True:
            attempt = Attempt(folder, encoder)
            attempt.let_run(draw.uniform(0, seconds / 2))
            if counts["kills"] % 2:
                attempt.wait_for(is_writing)
                attempt.let_run(draw.uniform(0, 0.05))
            if attempt.has_ended():
                assert attempt.end() == 0, folder.with_suffix(".out")
                break
            assert attempt.end(signal.SIGKILL) == -signal.SIGKILL
            counts["kills"] += 1
            counts["writing"] += is_writing()
            if (folder / "run.json").exists():
                break
            losses.append(last_step(folder) - last_checkpoint(folder))
        finished += 1
        same += outcome(folder) == expected
    what = f"kill -9 ({counts['writing']} of them while a folder was being written)"
    return [what, counts["kills"], finished, f"{max(losses)} (interval {INTERVAL})", f"{same} of {finished}", ""]


def terminate(scratch: Path, encoder: Path, number: int, expected: str, draw: random.Random) -> list[Any]:
    """Sends SIGTERM at random moments of training."""
    codes: Counter[int] = Counter()
    losses, waits, finished, same = [], [], 0, 0
    while codes[75] < number:
        folder = scratch / f"terminated-{finished}"
        while True:
            attempt = Attempt(folder, encoder)
            attempt.wait_for(attempt.has_stepped)
            attempt.let_run(draw.uniform(0, 1))
            if attempt.has_ended():
                assert attempt.end() == 0, folder.with_suffix(".out")
                break
            sent = time.monotonic()
            code = attempt.end(signal.SIGTERM)
            codes[code] += 1
            if code == 75:
                waits.append(time.monotonic() - sent)
                losses.append(last_step(folder) - last_checkpoint(folder))
            if (folder / "run.json").exists():
                break
        finished += 1
        same += outcome(folder) == expected
    exits = ", ".join(f"{code}: {times}" for code, times in sorted(codes.items()))
    note = f"exit codes {exits}; at most {max(waits):.2f} s from the signal to the exit"
    return ["SIGTERM", sum(codes.values()), finished, max(losses), f"{same} of {finished}", note]


def fill_disk(scratch: Path, encoder: Path, expected: str) -> list[Any]:
    """Trains on a disk with room for only half a checkpoint more; without one, limits the size of files."""
    disk = scratch / "disk"
    disk.mkdir()
    # mount is looked up in this machine's PATH, and mounts a folder of this program only.
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(disk)]
    mounted = not subprocess.run(mount).returncode  # nosec B603
    try:
        folder, ballast = disk / "run", disk / "ballast"
        attempt = Attempt(folder, encoder)
        attempt.wait_for(lambda: last_checkpoint(folder) > 0)
        checkpoint = Checkpoints(folder / "checkpoints", 1).last()
        assert checkpoint is not None
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        if mounted:
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - size // 2)
        else:
            resource.prlimit(attempt.pids[0], resource.RLIMIT_FSIZE, (size // 4, size // 4))
        code = attempt.end()
        complaint = next(
            line for line in reversed(folder.with_suffix(".out").read_text().splitlines()) if "could not be" in line
        )
        lost = last_step(folder) - last_checkpoint(folder)
        ballast.unlink(missing_ok=True)
        assert Attempt(folder, encoder).end() == 0
        note = f"exit code {code}: {complaint.replace(str(disk), '...')}"
        same = "1 of 1" if outcome(folder) == expected else "0 of 1"
        return [f"full disk ({'tmpfs' if mounted else 'RLIMIT_FSIZE'})", 1, 1, lost, same, note]
    finally:
        if mounted:
            unmount = ["umount", str(disk)]
            subprocess.run(unmount, check=True)  # nosec B603


def count_rows(scratch: Path, encoder: Path, workers: int, processes: int) -> list[Any]:
    """Stops a run twice in its first epoch and once in its second, and counts the rows of all attempts together."""
    steps_per_epoch = -(-ROWS // (FLAGS["training.per_device_train_batch_size"] * processes))  # type: ignore[operator]
    folder = scratch / f"rows-{workers}-{processes}"
    flags = ["--training.dataloader_num_workers", str(workers)]
    for stop in (steps_per_epoch // 4, steps_per_epoch // 2, steps_per_epoch * 3 // 2):
        attempt = Attempt(folder, encoder, flags, processes)
        attempt.wait_for(lambda stop=stop: last_step(folder) >= stop)  # type: ignore[misc]
        assert attempt.end(signal.SIGTERM) == 75, folder.with_suffix(".out")
    assert Attempt(folder, encoder, flags, processes).end() == 0, folder.with_suffix(".out")
    repeated = missed = 0
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for rank in range(processes):
            for line in read_lines(folder.with_suffix(f".rows-{rank}")):
                if (line["step"] - 1) // steps_per_epoch == epoch:
                    seen.update(line["rows"])
        repeated += sum(seen.values()) - len(seen)
        missed += ROWS - len(seen)
    return [workers, processes, 3, repeated, missed]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="number of kill -9")
    parser.add_argument("--terms", type=int, default=10, help="number of SIGTERM")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)  # nosec B311
    transformers_logging.set_verbosity_error()
    # Forked processes can't use the threads of their parent process.
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        scratch, encoder = Path(folder), Path(folder) / "encoder"
        # From a package that is checked by hash; any tokenizer would do.
        tokenizer = AutoTokenizer.from_pretrained(minilm())  # nosec B615
        size: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        torch.manual_seed(0)
        BertModel(BertConfig(**size, vocab_size=len(tokenizer))).save_pretrained(encoder)
        tokenizer.save_pretrained(encoder)

        started = time.monotonic()
        assert Attempt(scratch / "straight", encoder).end() == 0, (scratch / "straight.out").read_text()
        seconds, expected = time.monotonic() - started, outcome(scratch / "straight")
        rows = [
            kill(scratch, encoder, arguments.kills, expected, seconds, draw),
            terminate(scratch, encoder, arguments.terms, expected, draw),
            fill_disk(scratch, encoder, expected),
        ]
        header = ["what", "times", "runs, each resumed until it ended", "most steps lost", "bit-identical runs", ""]
        print(f"{last_step(scratch / 'straight')} steps, {seconds:.1f} s per run.\n\n{markdown(header, rows)}\n")
        counts = [count_rows(scratch, encoder, workers, processes) for workers in (0, 2) for processes in (1, 2)]
        header = ["workers", "processes", "stops", "rows repeated in two epochs", "rows missed"]
        print(f"{markdown(header, counts)}\n\n{machine()}")


if __name__ == "__main__":
    main()
