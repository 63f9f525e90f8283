"""Runs a function in threads and returns the results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Generator[Result, None, None]:
    """Yields the function's result for each item, in the order of the items.

    At most `2 * num_threads` results are computed ahead. An error of the function or of the items is raised in place of
    its result; later items are dropped.

    Args:
        function: called by several threads at the same time.
        items: iterated over in the caller's thread.
        num_threads: number of threads.
    """
    left = iter(items)
    error: Exception | None = None
    with ThreadPoolExecutor(num_threads) as threads:
        ahead: deque[Future[Result]] = deque()
        try:
            while error is None:
                try:
                    ahead.append(threads.submit(function, next(left)))
                except StopIteration:
                    break
                except Exception as raised:
                    error = raised
                if len(ahead) > 2 * num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
    if error is not None:
        raise error
