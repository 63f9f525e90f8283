"""The devices and processes of a run."""

import atexit
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker

from flip_hf.nn.precision import computes_bf16


def make_accelerator(precision: str, trackers: Sequence[GeneralTracker] = ()) -> Accelerator:
    """Creates an Accelerator for the available devices.

    Args:
        precision: "bf16", "fp32", or "auto", which chooses bf16 if the device supports it.
        trackers: the trackers that `init_trackers` will start.
    """
    if precision == "auto":
        precision = "bf16" if computes_bf16() else "fp32"
    atexit.register(leave_process_group)
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=_is_on_cpu(), log_with=trackers or None
    )


def join_process_group() -> PartialState:
    """Connects to the other processes of a distributed run, if there are any, as `make_accelerator` does."""
    atexit.register(leave_process_group)
    return PartialState(cpu=_is_on_cpu())


def _is_on_cpu() -> bool:
    return not torch.accelerator.is_available()


def leave_process_group() -> None:
    """Destroys the process group of `torch.distributed`; registered to run at the end of the program."""
    # `end_training` would destroy the group earlier. If a distributed model then holds the last reference to the group,
    # torch can deadlock with a thread that waits for the interpreter.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def processor_name() -> str:
    """Returns the model name of the CPU if the system reports it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_hardware() -> dict[str, Any]:
    """Returns the names and sizes of the CPU, the memory and the accelerators."""
    hardware: dict[str, Any] = {
        "processor": processor_name(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    if torch.cuda.is_available():
        hardware["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware
