"""Waiting for what another process does. On a busy machine that takes long; the wait ends as soon as it is done."""

import time
from collections.abc import Callable

PATIENCE = 900.0
"""Seconds after which something hangs. No test is faster or slower for it unless it fails."""


def until(condition: Callable[[], object]) -> None:
    """Waits until the condition holds; fails after `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s"
        time.sleep(0.05)
