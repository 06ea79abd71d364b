"""What is read before a run begins: how much of it, by which process, and how much at a time."""

import threading

import pytest
from helpers import on_processes, refused

from w2s.engine.decoding import CHUNK, check_readable_rows, in_threads
from w2s.engine.errors import InputError


@pytest.mark.parametrize(("limit", "expected"), [(0, []), (3, [10, 13, 16]), (-1, list(range(10, 19))), (99, None)])
def test_so_many_rows_are_read_spread_over_all_of_them(limit, expected):
    read = []
    check_readable_rows(read.append, list(range(10, 19)), limit)
    assert sorted(read) == (list(range(10, 19)) if expected is None else expected)


@pytest.mark.parametrize("limit", [2, 3, 7, 18])
def test_neighbours_are_equally_far_apart(limit):
    read = []
    check_readable_rows(read.append, list(range(18)), limit)
    gaps = {later - row for row, later in zip(sorted(read), [*sorted(read)[1:], 18], strict=True)}
    assert min(read) == 0 and max(gaps) - min(gaps) <= 1


def test_results_come_in_order_and_few_rows_are_read_ahead():
    count, lock = 0, threading.Lock()

    def read(row: int) -> int:
        nonlocal count
        with lock:
            count += 1
        return row

    for taken, row in enumerate(in_threads(read, range(4 * CHUNK))):
        assert row == taken and count <= taken + CHUNK
    assert count == 4 * CHUNK


def share_of_one(accelerator) -> list[int]:
    read = []
    check_readable_rows(read.append, list(range(7)), -1)
    return sorted(read)


def test_each_process_reads_its_share():
    assert on_processes(2, share_of_one) == [[0, 2, 4, 6], [1, 3, 5]]


def refuse_row_three(accelerator) -> None:
    def read(row: int) -> None:
        if row == 3:
            raise InputError("corrupt image 3.png")

    check_readable_rows(read, list(range(7)), -1)


def test_what_one_process_cannot_read_all_refuse():
    assert [(type(e), str(e)) for e in on_processes(2, refuse_row_three)] == [(InputError, "corrupt image 3.png")] * 2
    with refused("3.png"):
        refuse_row_three(None)
