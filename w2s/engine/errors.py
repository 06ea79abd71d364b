"""How a run ends early: each exception is an exit code."""


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what is wrong and what to do. Exit code 2."""


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite. Exit code 3."""


class Preempted(Exception):
    """SIGTERM or SIGINT; the run is saved. Exit code 75."""


class Finished(Exception):
    """The run to resume is already complete. Exit code 0."""
