"""Reading many images before a run begins: in threads, few at a time, and shared out among the processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from accelerate import PartialState

from w2s.engine.errors import InputError
from w2s.engine.launch import refuse_together
from w2s.engine.randomness import evenly_spread

CHUNK = 256  # images that are in memory at a time

Result = TypeVar("Result")


def in_threads(read: Callable[[int], Result], rows: Sequence[int]) -> Iterator[Result]:
    """What `read` returns for each row, in their order. Few rows are read ahead, however many there are."""
    with ThreadPoolExecutor() as pool:
        for begin in range(0, len(rows), CHUNK):
            yield from pool.map(read, rows[begin : begin + CHUNK])


def check_readable_rows(read: Callable[[int], object], rows: Sequence[int], limit: int) -> None:
    """Read rows before the run begins, so that a corrupt one ends it at once. All processes call this.

    Each process reads its share, and nothing of what was read is kept.

    Args:
        read: takes a row.
        rows: those that the run needs, the same on all processes.
        limit: how many to read, evenly spread over `rows`; all if negative.

    Raises:
        InputError: on all processes, with the message of the first process whose `read` has raised one.
    """
    state, problem = PartialState(), None
    chosen = [int(rows[position]) for position in evenly_spread(len(rows), limit)]
    try:
        for _ in in_threads(read, chosen[state.process_index :: state.num_processes]):
            pass
    except InputError as error:
        problem = str(error)
    refuse_together(problem)
