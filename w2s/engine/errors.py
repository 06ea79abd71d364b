"""How a run ends early: each exception is an exit code of the scripts. And what goes into their messages."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what is wrong and what to do. Exit code 2."""


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite. Exit code 3."""


class Preempted(Exception):
    """SIGTERM or SIGINT stopped the run, and it was saved. Exit code 75."""


class Finished(Exception):
    """The run to resume is already complete. Exit code 0."""


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6, prefix: str = "") -> str:
    """What was probably meant by a name that does not exist, for the end of a message; "" if nothing is like it.

    Args:
        name: what was given.
        known: the names that exist.
        most: how many of them to name.
        cutoff: how like it they must be, 0-1.
        prefix: stands before each of them.
    """
    close = difflib.get_close_matches(name, known, n=most, cutoff=cutoff)
    return f", did you mean {' or '.join(prefix + match for match in close)}?" if close else ""


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of a library's message that is not blank, cut to `limit` characters."""
    return _lines(error)[0][:limit]


def last_line(error: BaseException, limit: int = 300) -> str:
    """The last line of a library's message that is not blank, cut to `limit` characters."""
    return _lines(error)[-1][:limit]


def on_one_line(error: BaseException, limit: int | None = None) -> str:
    """A library's whole message with its line breaks taken out, cut to `limit` characters; without one, its type."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
