"""Runs a script's main and turns how it ended into an exit code."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable

import torch

from w2s.engine.errors import Finished, InputError, NonFiniteLoss, Preempted, first_line
from w2s.engine.peers import Peers
from w2s.engine.run import Run
from w2s.record import replacing

EXIT_CODES = {InputError: 2, NonFiniteLoss: 3, Preempted: 75, Finished: 0}


def call_main(main: Callable[[], None]) -> None:
    """Run a script's main and exit: 0 done, 2 bad input, 3 non-finite loss, 75 preempted and saved."""
    Run.opened = None
    peers = Peers(_end_with_peer)
    try:
        main()
        code = 0
    except tuple(EXIT_CODES) as error:
        code = EXIT_CODES[type(error)]
        if peers.rank == 0 or code != 2:
            peers.ending.set()
        _mark_failed(error)
        _say(error, code, peers)
    except SystemExit as error:  # --help
        code = error.code or 0
    except BaseException as error:
        if (reason := lost_process(error)) is None:
            sys.excepthook(*sys.exc_info())
        elif int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one line from each machine that is left
            _print(
                f"error: process {peers.rank} has lost another one ({reason}); if its machine has failed, start all "
                "of them again with --resume auto"
            )
        _mark_failed(error)
        code = 1
    peers.stop()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error in this process for each worker's end
    for worker in multiprocessing.active_children():
        worker.kill()  # loader workers ignore SIGTERM, and the interpreter would wait for them for ever
    if code != 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        if code in (0, 75):
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.exit(code)


def lost_process(error: BaseException) -> str | None:
    """What a collective operation says of another process that has gone or has not answered; None of other errors."""
    text = first_line(error)
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in text):
        return re.sub(r"^\[\S+\] ", "", text).partition(". ")[0]  # without the place in gloo's source, and its advice
    return None


def _say(error: Exception, code: int, peers: Peers) -> None:
    """Print the one line of an error, from the main process or, if that cannot speak, from this one."""
    # the message of an error in a loader's worker begins with the worker's traceback
    message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
    if peers.rank == 0:
        _print(message if code in (0, 75) else f"error: {message}")
    elif code == 2:
        # Perhaps only this process saw it: a missing disk, a corrupt image. The main process may be waiting for this
        # one, which must not end before that has spoken; once it has, the launcher stops this one, silently.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        told = peers.tell(message)
        time.sleep(10)
        if not told:
            _print(f"error: process {peers.rank}: {message}")


def _end_with_peer(message: str) -> None:
    """End this process, wherever it is, because of the error of another one."""
    if int(os.environ.get("RANK", 0)) == 0:
        _print(f"error: {message}")
    _mark_failed(InputError(message))
    os._exit(2)  # the main thread may never return from a collective operation


def _print(line: str) -> None:
    sys.stdout.flush()
    start = "\n" if sys.stderr.isatty() else ""  # a progress bar may stand on the line
    print(f"{start}{line}", file=sys.stderr, flush=True)


def _mark_failed(error: BaseException) -> None:
    """Write into summary.json that the open run has failed, so that nobody starts it again to fail the same way.

    The status stays "running" after a kill and a second Ctrl-C, and where one of several processes ends for another
    reason than bad input: perhaps another one was killed.
    """
    run, Run.opened = Run.opened, None
    if run is None or not run.keeps:
        return
    if isinstance(error, InputError) or (isinstance(error, Exception) and run.sizes[-1] == 1):
        path = run.folder / "summary.json"  # not through the record: this may not be the process that writes it
        with contextlib.suppress(OSError, ValueError):
            summary = json.loads(path.read_text()) | {"status": "failed"}
            with replacing(path, suffix=f".{os.environ.get('RANK', 0)}.partial") as file:
                json.dump(summary, file, indent=2)
                file.write("\n")
