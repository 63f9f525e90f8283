"""What a run computes on."""

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
    """An Accelerator for the devices there are.

    Args:
        precision: "bf16", "fp32", or "auto": bf16 where the device computes in it.
        trackers: what `init_trackers` starts.
    """
    if precision == "auto":
        precision = "bf16" if computes_bf16() else "fp32"
    atexit.register(leave_process_group)
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=_is_on_cpu(), log_with=trackers or None
    )


def join_process_group() -> PartialState:
    """Joins the other processes of this program, if there are any, as `make_accelerator` does."""
    atexit.register(leave_process_group)
    return PartialState(cpu=_is_on_cpu())


def _is_on_cpu() -> bool:
    return not torch.accelerator.is_available()


def leave_process_group() -> None:
    """Ends what `torch.distributed` began, when the program ends."""
    # Only when the program ends, not by `end_training`: where a distributed model is the last to let go of the group,
    # torch can wait for a thread that waits for the interpreter.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def processor_name() -> str:
    """The name that the processor's maker gave it, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_hardware() -> dict[str, Any]:
    """Names and sizes of the processor, the memory and the accelerators."""
    hardware: dict[str, Any] = {
        "processor": processor_name(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    if torch.cuda.is_available():
        hardware["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware
