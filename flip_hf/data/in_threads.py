"""Work that threads share, its results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Generator[Result, None, None]:
    """The function's result for each item, in the items' order.

    Threads stay at most twice their number ahead of what was taken. An error, of the function or of the items, is
    raised where its result would come; later items are then given up.

    Args:
        function: threads call it at the same time.
        items: taken by the caller's thread.
        num_threads: how many there are.
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
