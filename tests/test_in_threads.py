"""Work that threads share comes back in order."""

import threading

import pytest

from flip_hf.data.in_threads import in_threads


def test_results_come_in_the_order_of_the_items():
    first_may_end = threading.Event()

    def double(item):
        # The first item ends last.
        if item == 0:
            assert first_may_end.wait(30)
        if item == 3:
            first_may_end.set()
        return 2 * item

    assert list(in_threads(double, range(20), 2)) == [2 * i for i in range(20)]


def test_threads_stay_near_what_was_taken():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    results = in_threads(lambda item: item, items(), 3)
    assert next(results) == 0
    assert len(taken) <= 2 * 3 + 1
    results.close()
    assert len(taken) <= 2 * 3 + 1


def test_an_error_comes_where_its_result_would():
    def fail_at_two(item):
        if item >= 2:
            raise ValueError(f"item {item}")
        return item

    results = in_threads(fail_at_two, range(10), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)


def test_an_error_of_the_items_comes_behind_earlier_ones():
    def items():
        yield from range(4)
        raise OSError("the file ends here")

    def fail_at_three(item):
        if item == 3:
            raise ValueError("item 3")
        return item

    results = in_threads(lambda item: item, items(), 4)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="ends here"):
        next(results)
    with pytest.raises(ValueError, match="item 3"):
        list(in_threads(fail_at_three, items(), 4))
