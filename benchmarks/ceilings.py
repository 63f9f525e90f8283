"""Measures the best speeds that the machine can reach, in the same run as the benchmark."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Sizes of square matrices large enough that caches, thread starts and kernel launches don't matter.
_CPU_SIZE, _ACCELERATOR_SIZE = 2048, 8192
_COPY_BYTES = 1 << 28
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ceilings:
    """Peak speeds of all torch threads together, or of the accelerator.

    Attributes:
        bf16_gflops: GFLOP/s in products of bfloat16 matrices.
        fp32_gflops: GFLOP/s in products of single-precision matrices.
        memory_gbps: GB/s, read plus written, in copying.
        threads: number of torch threads; None for an accelerator.
    """

    bf16_gflops: float
    fp32_gflops: float
    memory_gbps: float
    threads: int | None

    def __str__(self) -> str:
        where = "" if self.threads is None else f", {self.threads} threads"
        return (
            f"ceilings: {self.bf16_gflops:.0f} GFLOP/s in bf16 and {self.fp32_gflops:.0f} in fp32 matrix products, "
            f"{self.memory_gbps:.1f} GB/s of memory{where}"
        )


def device() -> torch.device:
    """The accelerator, or the CPU if there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or CPU


def wait_for_device() -> None:
    """Waits until the accelerator has finished its work; needed before reading a clock."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def measure_ceilings(on: torch.device, before: Ceilings | None = None) -> Ceilings:
    """Measures for a few seconds. Returns the better of this and `before`, in case other work disturbed one."""
    size = _CPU_SIZE if on == CPU else _ACCELERATOR_SIZE
    bf16, fp32, memory = _gemm(on, size, torch.bfloat16), _gemm(on, size, torch.float32), _copy(on)
    if before is not None:
        bf16, fp32 = max(bf16, before.bf16_gflops), max(fp32, before.fp32_gflops)
        memory = max(memory, before.memory_gbps)
    return Ceilings(bf16, fp32, memory, torch.get_num_threads() if on == CPU else None)


def seconds(call: Callable[[], object], least_seconds: float = 1.0, warm_up: int = 2) -> float:
    """Median time of one call, over at least `least_seconds` and 5 calls."""
    for _ in range(warm_up):
        call()
    wait_for_device()
    times: list[float] = []
    while sum(times) < least_seconds or len(times) < 5:
        started = time.perf_counter()
        call()
        wait_for_device()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _gemm(on: torch.device, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=on).to(dtype) for _ in range(2))
    # The best of several, because a ceiling is a maximum.
    return max(2 * size**3 / seconds(lambda: a @ b, 0.5) / 1e9 for _ in range(3))


def _copy(on: torch.device) -> float:
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=on)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / seconds(lambda: target.copy_(source), 0.5) / 1e9
