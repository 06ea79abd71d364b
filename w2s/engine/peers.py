"""How the error of one process ends all processes of a launch: quickly, and with one line from the main process.

A process that waits for another one in a collective operation, as a GPU's does for up to the timeout of the process
group, cannot look at anything. So a thread looks at the launch's store, over a connection of its own.
"""

import os
import threading
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import TCPStore

POLL_SECONDS = 0.5
GRACE_SECONDS = 3.0  # for a process to end by itself, as it does where all of them meet the same error


class Peers:
    """The other processes of a launch, if there are any.

    Args:
        end: called in a thread, with the message of another process that has failed. It must end this process.
    """

    def __init__(self, end: Callable[[str], None]) -> None:
        self.rank, self.end = int(os.environ.get("RANK", 0)), end
        self.ending = threading.Event()  # this process ends by itself
        # a launcher may start processes again on the same store
        self._key = f"w2s-error-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self.several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_PORT" in os.environ
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.several:
            self._thread.start()

    def tell(self, message: str) -> bool:
        """Let the other processes end with this message; whether it could be said."""
        try:
            self._connect(seconds=10).set(self._key, f"process {self.rank}: {message}")
        except (RuntimeError, ValueError):  # the store has gone with the process that kept it
            return False
        return True

    def stop(self) -> None:
        """Watch no longer, because this process ends by itself."""
        self.ending.set()
        if self._thread.is_alive():
            self._thread.join(2)  # a thread that is in the store when the interpreter ends may take it down

    def _connect(self, seconds: float) -> TCPStore:
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))

    def _watch(self) -> None:
        try:
            store = self._connect(seconds=3600)
            while not store.check([self._key]):
                if self.ending.wait(POLL_SECONDS):
                    return
            message = store.get(self._key).decode()
        except (RuntimeError, ValueError):
            return
        # the main process speaks before the others end, as the launcher stops all of them when one has ended
        if not self.ending.wait(GRACE_SECONDS * (1 if self.rank == 0 else 2)):
            self.end(message)
