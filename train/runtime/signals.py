"""Asking a run to stop: the first signal sets a flag, which loops read; the second one ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from jaxmodels.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the signal

    def check(self) -> None:
        """Raises Interrupted if a signal has come. Call it between units of work, after saving."""
        if self.requested:
            raise Interrupted(f"stopped by {self.requested}; what is finished is saved: the same command goes on")

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopFlag"]:
        """Handles SIGINT and SIGTERM inside the block, as before it after. In another thread it only yields."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._on_signal) for number in STOPPING}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.requested = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        for other in STOPPING:  # the system itself ends the process at the second signal, even inside a long XLA call
            signal.signal(other, signal.SIG_DFL)
        # os.write: a signal may arrive inside a print, where print itself is not re-entrant
        os.write(2, f"\n{self.requested}: stopping after the current step (again: at once)\n".encode())


stop = StopFlag()
"""The one flag of the process: a signal is for the process, not for one of its run folders."""
