"""How a run ends early: each exception is an exit code of the scripts."""


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what is wrong and what to do. Exit code 2."""


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite. Exit code 3."""


class Preempted(Exception):
    """SIGTERM or SIGINT stopped the run, and it was saved. Exit code 75."""


class Finished(Exception):
    """The run to resume is already complete. Exit code 0."""


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of a library's message that is not blank, cut to `limit` characters."""
    return _lines(error)[0][:limit]


def last_line(error: BaseException, limit: int = 300) -> str:
    """The last line of a library's message that is not blank, cut to `limit` characters."""
    return _lines(error)[-1][:limit]


def on_one_line(error: BaseException, limit: int | None = None) -> str:
    """A library's whole message with its line breaks taken out, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
