"""Asking a run to stop: a signal sets a flag, which every loop reads.

SIGTERM and SIGINT: save, stop (exit code 75). A second Ctrl-C ends the process at once; a second SIGTERM changes
nothing, for schedulers that signal every process of a job reach a run twice. SIGUSR1: save and go on. Among several
processes jax itself catches SIGTERM and agrees with the others on a step (`stop.at_step`); a handler of ours would hide
the signal from it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from jaxmodels.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Whether a signal has asked this process to stop, or to save."""

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the signal
        self.saves = 0  # how often a signal has asked to save: every loop remembers up to which it has done so
        self.distributed = False

    def check(self) -> None:
        """Raises Interrupted if a signal has come. Call it between units of work, after saving."""
        if self.requested:
            raise Interrupted(f"stopped by {self.requested}; what is finished is saved: the same command goes on")

    def at_step(self, step: int) -> bool:
        """Whether to stop after this step: the same answer, for the same step, in every process."""
        if self.distributed:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.requested = "SIGTERM"
        return self.requested is not None

    @contextlib.contextmanager
    def listening(self, distributed: bool = False, ends: bool = False) -> Iterator["StopFlag"]:
        """Handles the signals inside the block, as before it after. In another thread it only yields.

        ends: the process has nothing to do after the block; if it was asked to stop, a second SIGTERM on its way out
        must not change its exit code.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self.distributed = distributed
        handled = () if distributed else STOPPING
        before = {number: signal.signal(number, self._on_signal) for number in handled}
        # A save takes all processes, and a signal reaches one: among several SIGUSR1 does nothing.
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN if distributed else self._on_save)
        try:
            yield self
        finally:
            for number, handler in before.items():
                if not (ends and self.requested and number == signal.SIGTERM):
                    signal.signal(number, handler)
            self.requested, self.distributed = None, False

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.saves += 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system itself ends the process, even inside a long XLA call
        # os.write: a signal may arrive inside a print, where print itself is not re-entrant
        os.write(2, f"\n{self.requested}: stopping after the current step (Ctrl-C: at once)\n".encode())


stop = StopFlag()
"""The one flag of the process: a signal is for the process, not for one of its run folders."""
