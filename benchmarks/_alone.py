"""Several benchmarks on one device: their compilers run side by side, and each measures while no other one runs.

A file that all of them lock: shared while they compile and check, exclusively while they measure. The system unlocks
what a process held that ended or was killed. Its path is in $JAXMODELS_BENCH_LOCK; without it there is nobody else.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

VARIABLE = "JAXMODELS_BENCH_LOCK"


class Room:
    """Made before the work starts, it keeps the others from measuring until `alone` or `leave`."""

    def __init__(self) -> None:
        path = os.environ.get(VARIABLE)
        self._file = open(path, "a") if path else None  # noqa: SIM115
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_SH)

    @contextlib.contextmanager
    def alone(self, patience: float) -> Iterator[bool]:
        """Waits until the others are done or `patience` seconds are over; says whether nobody else runs inside."""
        if self._file is None:
            yield True
            return
        fcntl.flock(self._file, fcntl.LOCK_UN)  # two that both kept it and both wanted it alone would wait for ever
        got, end = self._try(), time.monotonic() + patience
        while not got and time.monotonic() < end:
            time.sleep(0.02)
            got = self._try()
        try:
            yield got
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def leave(self) -> None:
        """The others may measure."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
